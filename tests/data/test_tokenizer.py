"""Tokenizers and their files, beside the libraries whose files they are."""

import base64
import json
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers as peer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.data import bpe, tokenizer_json
from llama3_jax.data import tokenizer as tokenizer_module
from llama3_jax.data.tokenizer import BEGIN, END, LLAMA3_PATTERN, Tokenizer, load, load_ranks
from llama3_jax.data.tokenizer_training import BYTES
from llama3_jax.errors import UserError

UNREACHABLE = "xqjz"  # a token to which no merge leads
TEXTS = {
    "Hello there, hello again: the attention layers attend to their own mistakes.\n\n": 9,
    "def attend(query, key, value):\n    return softmax(query @ key.T) @ value  # 12345\n": 5,
    "Всё смешалось в доме Облонских. Все счастливые семьи похожи друг на друга.": 7,
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。": 6,
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।": 6,
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.": 4,
    "aaaa aaaaaaaa aaa  bababab \t\r\n .... ====== \u00a0\u2003 I'LL don't": 3,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    counts = {}
    for text, number in TEXTS.items():
        for pretoken in regex.findall(LLAMA3_PATTERN, text):
            counts[pretoken] = counts.get(pretoken, 0) + number
    base = BYTES | {UNREACHABLE.encode(): 256}
    return Tokenizer(bpe.extend(base, counts, 350), 8)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "tokenizer.json"
    tokenizer.save_json(path)
    return path


unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
familiar = st.lists(
    st.sampled_from([*TEXTS, *" .\n", UNREACHABLE, BEGIN, "e\u0301", "🙂", "ﬃ", "Ǆ"]).flatmap(
        lambda text: st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(
            lambda span: text[min(span) : max(span)]
        )
    ),
    max_size=6,
).map("".join)


class TestSameIds:
    @settings(max_examples=400, deadline=None)
    @given(text=unicode | familiar)
    def test_as_hugging_face_reading_our_file(self, tokenizer, exported, text):
        other = peer.Tokenizer.from_file(str(exported))
        other.encode_special_tokens = True
        assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert other.decode(tokenizer.encode(text)) == text

    @settings(max_examples=200, deadline=None)
    @given(text=unicode | familiar)
    def test_as_tiktoken_reading_our_file(self, tokenizer, exported, text):
        path = exported.with_name("tokenizer.model")
        if not path.exists():
            tokenizer.save_ranks(path)
        lines = path.read_bytes().splitlines()
        ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
        other = tiktoken.Encoding(
            "other", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        assert other.encode_ordinary(text) == tokenizer.encode(text)

    def test_specials_are_parsed_only_when_asked(self, tokenizer, exported):
        text = f"a{END}b"
        plain = tokenizer.encode(text)
        assert tokenizer.eos not in plain and tokenizer.decode(plain) == text
        parsed = tokenizer.encode(text, parse_specials=True)
        assert parsed == [97, tokenizer.eos, 98]
        other = peer.Tokenizer.from_file(str(exported))
        assert other.encode(text).ids == [tokenizer.bos, *parsed]
        other.encode_special_tokens = True
        assert other.encode(text, add_special_tokens=False).ids == plain

    def test_a_token_that_no_merge_reaches_is_used(self, tokenizer, exported):
        assert tokenizer.encode(UNREACHABLE) == [256]
        assert tokenizer.encode(UNREACHABLE + "a") != [256, 97]
        content = json.loads(exported.read_text())
        assert content["model"]["ignore_merges"] is True
        content["model"]["ignore_merges"] = False
        exported.with_name("merging.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="without ignore_merges 1 of its tokens"):
            load(exported.with_name("merging.json"))


class TestLongRuns:
    """tiktoken's search for the pattern runs out of its stack in a million spaces."""

    spaces = st.lists(st.sampled_from(" \t\n\r\x0b\u00a0\u2028\x1c\u200b"), max_size=9).map("".join)
    part = spaces | st.sampled_from(
        ["a", "é", "7", ".", "e\u0301", "🙂", "\ud800", "語", "'s", END]
    )

    @settings(max_examples=600, deadline=None)
    @given(text=st.lists(part, max_size=9).map("".join), least=st.integers(1, 4))
    def test_cut_at_spaces_gives_the_ids_of_the_whole(self, tokenizer, text, least):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizer_module, "_LONG_SPACE", least)
            pretokens = []
            for piece, whole in tokenizer_module._cut_long_spaces(text):
                pretokens += [piece] if whole else regex.findall(LLAMA3_PATTERN, piece)
            assert [*filter(None, pretokens)] == regex.findall(LLAMA3_PATTERN, text)
            assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)
            with_specials = tokenizer._encoding.encode(text, allowed_special="all")
            assert tokenizer.encode(text, parse_specials=True) == with_specials

    @pytest.mark.parametrize(
        "run",
        [" ", "\t", "\u00a0", "\n", "\n ", "a", "-", "🙂", "\u0301", "1"],
        ids=lambda run: f"U+{ord(run[0]):04X}x{len(run)}",
    )
    def test_a_million_of_one_character(self, tokenizer, run):
        text = f"(a {run * (1_000_000 // len(run))} b)"
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_a_million_spaces_around_specials_and_at_the_ends(self, tokenizer):
        spaces = " " * 1_000_000
        ids = tokenizer.encode(f"{spaces}{END}{spaces}x{spaces}", parse_specials=True)
        assert ids.count(tokenizer.eos) == 1
        assert tokenizer.decode(ids) == f"{spaces}{END}{spaces}x{spaces}"

    def test_lone_surrogates(self, tokenizer):
        text = "\ud800" * 100_000 + " " * 100_000 + "x"
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\ud800", "\ufffd")

    def test_a_panic_is_an_error_that_can_be_handled(self, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer_module, "_LONG_SPACE", 10**9)
        with pytest.raises(ValueError, match="tiktoken failed on a text of 1,000,000 characters"):
            tokenizer.encode(" " * 1_000_000)


@pytest.mark.parity
def test_metas_tokenizer_in_both_formats(tmp_path):
    path = Path(util.find_spec("llama_models").origin).parent / "llama3/tokenizer.model"
    meta = load(path)
    assert (meta.vocab_size, meta.bos, meta.eos) == (128_256, 128_000, 128_001)
    meta.save_ranks(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()
    meta.save_json(tmp_path / "tokenizer.json")
    back = load(tmp_path / "tokenizer.json")
    assert back.ranks == meta.ranks and back.special_ids == meta.special_ids

    other = peer.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    random = np.random.default_rng()
    tokens = random.integers(0, 128_000, (2_000, 8))
    texts = ["".join(meta.decode([token]) for token in row) for row in tokens.tolist()]
    codes = random.integers(1, 0xD800, (2_000, 30))
    texts += ["".join(map(chr, row)) for row in codes.tolist()]
    for text in texts:
        assert other.encode(text, add_special_tokens=False).ids == meta.encode(text), ascii(text)
    # Tokens that lower ranks do not merge to are tokens all the same.
    lost = []
    for token, rank in meta.ranks.items():
        if rank >= 100_256:
            lower = _Below(meta.ranks, rank)
            if len(bpe.merge([bytes([byte]) for byte in token], lower)) != 2:
                lost.append(token)
    assert len(lost) == 678
    whole = [text for text in (token.decode(errors="replace") for token in lost)
             if len(regex.findall(LLAMA3_PATTERN, text)) == 1 and "\ufffd" not in text]  # fmt: skip
    assert len(whole) > 300
    for text in whole:
        assert meta.encode(text) == [meta.ranks[text.encode()]]
        assert other.encode(text, add_special_tokens=False).ids == meta.encode(text)


class _Below(dict):
    """Ranks below a limit."""

    def __init__(self, ranks, limit):
        self.ranks, self.limit = ranks, limit

    def __contains__(self, token):
        return self.ranks.get(token, self.limit) < self.limit

    def __getitem__(self, token):
        return self.ranks[token]


class TestFiles:
    def test_every_format_comes_back(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        tokenizer.save_json(tmp_path / "tokenizer.json")
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            back = load(path)
            assert back.ranks == tokenizer.ranks
            assert back.special_ids == tokenizer.special_ids
            assert back.fingerprint == tokenizer.fingerprint
        tokenizer.save_ranks(tmp_path / "x.tiktoken")
        assert load(tmp_path / "x.tiktoken").ranks == tokenizer.ranks
        assert load(tmp_path / "x.tiktoken").specials == 256

    def test_a_folder_of_hugging_face(self, tokenizer, exported):
        assert load(exported.parent).fingerprint == tokenizer.fingerprint

    def test_names_of_specials_are_kept(self, tmp_path):
        names = ["<|first|>", END, BEGIN]
        Tokenizer(BYTES, names).save(tmp_path)
        loaded = load(tmp_path)
        assert list(loaded.special_ids) == names
        assert (loaded.bos, loaded.eos) == (258, 257)
        assert loaded.fingerprint != Tokenizer(BYTES, 3).fingerprint

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "empty tokenizer file"),
            (b"YQ== 0\nYg== x\n", ":2: not a base64 token and its rank"),
            (b"YQ== 0\n!!!! 1\n", ":2: not a base64 token"),
            (b"YQ== 0\nYQ== 1\n", ":2: the token of rank 0 again"),
            (b"YQ== 0\nYg== 2\n", "ranks must be 0 to 1, each once"),
            (b"YQ== 0\nYg== 1\n", "lacks a token for byte 0"),
        ],
    )
    def test_damaged_ranks(self, tmp_path, content, message):
        (tmp_path / "x.tiktoken").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load(tmp_path / "x.tiktoken")

    def test_damaged_folder(self, tokenizer, tmp_path):
        with pytest.raises(UserError, match="no tokenizer here"):
            load(tmp_path)
        tokenizer.save(tmp_path)
        for content in ("{", '{"specials": "many"}', "[]"):
            (tmp_path / "tokenizer_config.json").write_text(content)
            with pytest.raises(UserError, match="tokenizer_config.json: damaged"):
                load(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c["model"]["merges"].pop(), "merging by rank would give other ids"),
            (lambda c: c["model"]["merges"].reverse(), "not in the order of the ids"),
            (lambda c: c.pop("model"), "not a byte-level BPE tokenizer.json"),
            (lambda c: c["model"].update(type="Unigram"), "only a BPE model"),
            (lambda c: c.update(normalizer={"type": "NFC"}), "without a normalizer"),
            (lambda c: c["added_tokens"].pop(0), "ids of its added tokens must follow"),
            (
                lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\S+"),
                "not by Llama 3's pattern",
            ),
        ],
    )
    def test_a_json_that_would_give_other_ids(self, exported, tmp_path, change, message):
        content = json.loads(exported.read_text())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load(tmp_path / "tokenizer.json")

    def test_not_json(self, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes(b"\xff{")
        with pytest.raises(UserError, match="not a byte-level BPE tokenizer.json"):
            load(tmp_path / "tokenizer.json")
        with pytest.raises(UserError, match="none.json: tokenizer file not found"):
            load(tmp_path / "none.json")


def test_merges_are_all_pairs_that_join(tokenizer):
    ranks = tokenizer.ranks
    expected = [
        (ranks[left + right], ranks[left], ranks[right])
        for left in ranks
        for right in ranks
        if left + right in ranks
    ]
    found = [(ranks[a + b], ranks[a], ranks[b]) for a, b in tokenizer_json.merges(ranks)]
    assert found == sorted(expected)


@pytest.mark.parametrize("specials", [1, ["<|a|>", BEGIN], [BEGIN, END, END]])
def test_bad_specials(specials):
    with pytest.raises(UserError, match="specials"):
        Tokenizer(BYTES, specials)


def test_ranks_of_a_saved_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert load_ranks(tmp_path / "tokenizer.tiktoken") == tokenizer.ranks
