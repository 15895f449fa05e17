"""Canonical URLs and lists: written-out cases, laws on random URLs, and lists that are wrong."""

from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation import urls as urls_module
from llama3_jax.curation.urls import BlockList, UrlsConfig, canonical, find_entry, read_list, urls
from llama3_jax.errors import UserError
from tests.curation.frames import document, run

CONFIG = UrlsConfig()
SAME = [
    ["http://example.com", "https://example.com/", "HTTP://WWW.Example.COM:80/", "https://example.com:443/#top",
     "https://user:secret@example.com./", "https://example.com/?utm_source=a&UTM_Medium=b&fbclid=c", "http://example.com/?"],
    ["https://example.com/a/c?x=1&y=2", "https://example.com/a/b/../c?y=2&x=1", "https://example.com/a/./c?x=1&y=2&gclid=z",
     "https://example.com/a/c;jsessionid=12AB?y=2&x=1"],
    ["https://例え.jp/パス", "https://xn--r8jz45g.jp/%E3%83%91%E3%82%B9", "https://xn--r8jz45g.jp/%e3%83%91%e3%82%b9"],
    ["https://example.com/#!/page/1"], ["https://example.com/#!/page/2"], ["https://example.com:8080/"],
    ["https://sub.example.com/"], ["https://example.com/a%2Fb"], ["https://example.com/a/b"], ["https://example.com/A/b"],
    ["http://[::1]/", "https://[0:0::1]:443/"], ["ftp://example.com/"], ["https://example.com/a?x="], [""],
]  # fmt: skip


def test_urls_of_one_page_are_one_and_of_others_are_not():
    seen = [{canonical(url, CONFIG) for url in group} for group in SAME]
    assert all(len(one) == 1 for one in seen), seen
    assert len(set.union(*seen)) == len(SAME)


def test_merging_can_be_switched_off():
    config = UrlsConfig(merge_schemes=False, merge_www=False, drop_parameters=())
    assert canonical("http://www.a.b/?utm_id=1", config) == "http://www.a.b/?utm_id=1"


parts = st.tuples(
    st.sampled_from(["http", "https", "HTTPS"]), st.sampled_from(["a.b", "www.a.b", "A.b:80", "x.a.b:443", "bücher.de"]),
    st.text(max_size=12), st.dictionaries(st.sampled_from(["q", "utm_x", "id", "ß"]), st.text(max_size=4)),
)  # fmt: skip


@settings(deadline=None)
@given(parts)
def test_canonical_is_idempotent_and_blind_to_campaigns(url):
    scheme, host, path, query = url
    text = f"{scheme}://{host}/{path.replace('#', '').replace('?', '').replace(';', '')}"
    pairs = [f"{quote(key)}={quote(value)}" for key, value in query.items()]
    try:
        once = canonical(text + "?" + "&".join(pairs), CONFIG)
    except ValueError:
        return
    assert canonical(once, CONFIG) == once
    assert (
        canonical(text + "?" + "&".join([*pairs, "utm_campaign=mail", "gclid=1"]), CONFIG) == once
    )


@settings(deadline=None)
@given(st.text(max_size=40) | st.text(max_size=20).map("http://".__add__))
def test_any_text_gives_a_url_or_a_value_error(text):
    try:
        canonical(text, CONFIG)
    except ValueError:
        pass


def test_entries_match_hosts_under_them_and_paths_below_them(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text(
        "# a comment\n\nBad.com  # why\nxxx\nmixed.org/forum/private\nbücher.de/Ä\n", "utf-8"
    )
    entries = read_list(BlockList(name="mine", files=(str(file),)))
    assert entries == {"bad.com", "xxx", "mixed.org/forum/private", "xn--bcher-kva.de/%C3%84"}
    hits = {
        "https://bad.com/": "bad.com", "https://a.b.bad.com/x?y": "bad.com", "https://bad.com:8080/": "bad.com",
        "https://notbad.com/": None, "https://bad.com.org/": None, "https://good.xxx/": "xxx", "https://xxx.com/": None,
        "https://mixed.org/forum/private": "mixed.org/forum/private", "https://mixed.org/forum/privateer": None,
        "https://mixed.org/forum/private/1": "mixed.org/forum/private", "https://mixed.org/forum": None, "": None,
    }  # fmt: skip
    assert {url: find_entry(url, entries) for url in hits} == hits


label = st.text("abz019-xn", min_size=1, max_size=5)
step = st.text("aZ0_~.-%;", max_size=4)
host = st.lists(label | st.just("www"), min_size=1, max_size=4).map(".".join)


@settings(deadline=None, max_examples=500)
@given(host, st.lists(step, max_size=3))
def test_a_line_that_is_taken_as_it_stands_is_canonical(host, steps):
    line = "/".join([host, *steps])
    if urls_module._PLAIN.fullmatch(line):
        assert urls_module._entry(line, "x:1") == line.rstrip("/")


def test_a_large_list_is_read_line_by_line_and_only_once(tmp_path, monkeypatch):
    file = tmp_path / "list.txt"
    file.write_text("".join(f"site-{n}.example.com\n" for n in range(200_000)))
    slow = []
    monkeypatch.setattr(urls_module, "_entry", lambda entry, where: slow.append(entry) or entry)
    config = UrlsConfig(lists=(BlockList(name="mine", files=(str(file),)),))
    (one,) = urls_module._lists(config)
    assert len(one[1]) == 200_000 and not slow
    assert urls_module._lists(config)[0] is one


def test_a_folder_of_ut1_is_read_as_it_is(tmp_path, caplog):
    folder = tmp_path / "adult"
    folder.mkdir()
    (folder / "domains").write_bytes(b"bad.com\nwww.other.org\n1.2.3.4\ncaf\xe9.fr\n")
    (folder / "urls").write_bytes(b"mixed.org/~x/page.html\nhost.org/a?id=3\ntwo words\n")
    (folder / "expressions").write_text("(porn|sex)\n")
    (folder / "usage").write_text("black\n")
    entries = read_list(BlockList(name="adult", files=(str(folder),)))
    wanted = {"bad.com", "other.org", "1.2.3.4", "mixed.org/~x/page.html"}
    assert wanted <= entries and len(entries) == 5
    assert "domains: 1 lines are no host" in caplog.text and "urls: 1 lines" in caplog.text
    config = UrlsConfig(lists=(BlockList(name="adult", files=(str(folder),)),))
    assert urls_module.list_files(config) == [folder]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: a folder without domains or urls"):
        read_list(BlockList(name="x", files=(str(tmp_path / "none"),)))


@pytest.mark.parametrize(
    "content", [b"http://a.b/\n", b"two words\n", b"\xff\xfe", b"ok.com\n[::1\n"]
)
def test_a_wrong_list_is_named_with_its_line(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt"):
        read_list(BlockList(name="mine", files=(str(tmp_path / "list.txt"),)))


def test_the_stage_names_the_list_and_the_entry(tmp_path):
    cases = {
        "https://www.pornhub.com/x": ("urls_adult", "pornhub.com"), "http://clustrmaps.com/person/A": ("urls_pii", "clustrmaps.com/person"),
        "http://clustrmaps.com/map": (None, None), "http://a.b:port/": ("urls_malformed", None), "http:///x": ("urls_malformed", None),
        "": (None, None), "file:///tmp/a.html": (None, None), "http://[::1/": ("urls_malformed", None),
    }  # fmt: skip
    rows = [document(url=url) for url in cases]
    out = run(urls, CONFIG, rows, tmp_path, files=2)
    assert {row["url"]: (row["reason"], row["urls_entry"]) for row in out.values()} == cases
    with pytest.raises(UserError, match="absent"):
        run(urls, UrlsConfig(lists=(BlockList(name="x", files=("absent",)),)), rows, tmp_path / "b")


@settings(max_examples=5, deadline=None)
@given(st.lists(st.text(max_size=20).map("http://a.".__add__), max_size=20))
def test_the_stage_is_the_function(tmp_path_factory, addresses):
    def expected(url):
        try:
            return canonical(url, CONFIG), None
        except ValueError:
            return "", "urls_malformed"

    rows = [document(url=url, title=str(number)) for number, url in enumerate(["", *addresses])]
    out = run(urls, UrlsConfig(lists=()), rows, tmp_path_factory.mktemp("urls"), files=3)
    for row in rows:
        assert (out[row["doc"]]["urls_canonical"], out[row["doc"]]["reason"]) == expected(
            row["url"]
        )
