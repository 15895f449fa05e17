"""The newest version of a URL stays: against a plain sort, on any partitioning."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation.url_dedup import UrlDedupConfig, page, url_dedup
from tests.curation.frames import document, frame, run

TIMES = ["", "2023-01-01", "2023-01-01T00:00:00Z", "2023-01-01T00:00:00.5Z", "2023-01-02 00:00:00+00:00", "2024-05-06T07:08:09Z"]  # fmt: skip
row = st.tuples(
    st.sampled_from(["", "a", "b", "c"]), st.integers(0, len(TIMES) - 1), st.integers(0, 12)
)


@settings(max_examples=20, deadline=None)
@given(st.lists(row, min_size=1, max_size=40), st.integers(1, 3))
def test_survivors_are_those_of_a_plain_sort(tmp_path_factory, cases, files):
    rows = [
        document(urls_canonical=url, time=TIMES[time], text="x" * length, title=str(number))
        for number, (url, time, length) in enumerate(cases)
    ]
    out = run(url_dedup, UrlDedupConfig(), rows, tmp_path_factory.mktemp("url"), files)
    for url in "abc":
        versions = [one for one in rows if one["urls_canonical"] == url]
        versions.sort(key=lambda one: (TIMES.index(one["time"]), len(one["text"]), one["doc"]))
        for one in versions[:-1]:
            assert out[one["doc"]]["url_dedup_survivor"] == versions[-1]["doc"]
            assert out[one["doc"]]["reason"] == "url_dedup_older"
        for one in versions[-1:]:
            assert out[one["doc"]]["url_dedup_survivor"] is out[one["doc"]]["reason"] is None
    for one in rows:
        if not one["urls_canonical"]:
            assert out[one["doc"]]["reason"] is None


def test_documents_without_url_do_not_meet_in_one_partition(tmp_path):
    urls = ["", None, "", "https://a.b/", "https://a.b/", "https://c.d/"]
    rows = [document(title=str(n), urls_canonical=url) for n, url in enumerate(urls)]
    pages = frame(rows, tmp_path / "in").select(page().alias("page")).to_pydict()["page"]
    assert len(set(pages)) == 5 and pages.count("https://a.b/") == 2
