"""Encodings: declared rightly, wrongly, twice, or not at all."""

import codecs

import pytest

from llama3_jax.curation.page.encoding import decode

RUSSIAN = "Река берёт начало на холмах над городом и течёт по открытой местности. " * 5
JAPANESE = "川は町の上の丘から流れ出て、広い平野を通って海に注いでいる。" * 8
FRENCH = "La rivière naît dans les collines, près d'une forêt très âgée où l'été est court. " * 5


def html(text: str, declared: str | None) -> str:
    meta = f'<meta charset="{declared}">' if declared else ""
    return f"<html><head>{meta}<title>x</title></head><body><p>{text}</p></body></html>"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (RUSSIAN, "windows-1251"), (RUSSIAN, "koi8-r"), (JAPANESE, "shift_jis"), (JAPANESE, "euc-jp"),
        (JAPANESE, "iso-2022-jp"), (FRENCH, "iso-8859-1"), (RUSSIAN, "utf-8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["meta", "header"])
def test_a_declared_encoding_is_used(text, encoding, where):
    page = html(text, encoding if where == "meta" else None).encode(encoding)
    header = f"text/html; charset={encoding}" if where == "header" else None
    assert text in decode(page, header).text


@pytest.mark.parametrize("declared", [None, "iso-8859-1", "windows-1251", "no-such-encoding"])
def test_valid_utf8_is_utf8_whatever_is_declared(declared):
    decoded = decode(html(RUSSIAN, declared).encode())
    assert RUSSIAN in decoded.text and decoded.encoding == "utf-8"


@pytest.mark.parametrize(
    ("text", "encoding"), [(RUSSIAN, "cp1251"), (JAPANESE, "euc-jp"), (JAPANESE, "shift_jis")]
)
@pytest.mark.parametrize("declared", [None, "utf-8"])
def test_undeclared_or_wrongly_declared_bytes_are_detected(text, encoding, declared):
    decoded = decode(html(text, declared).encode(encoding))
    assert text in decoded.text and decoded.found == "detected"


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
def test_a_byte_order_mark_wins(mark, encoding):
    decoded = decode(mark + html(FRENCH, "iso-8859-1").encode(encoding), "text/html; charset=ascii")
    assert FRENCH in decoded.text and decoded.found == "bom"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(encoding):
    assert FRENCH in decode(html(FRENCH, None).encode(encoding)).text


def test_a_page_cut_inside_a_character_is_still_utf8():
    page = html(RUSSIAN, "windows-1251").encode()
    cut = page[: page.index("море".encode()[:1], 200) + 1]
    decoded = decode(cut)
    assert decoded.encoding == "utf-8" and "\ufffd" not in decoded.text
