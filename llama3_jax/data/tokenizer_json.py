"""Hugging Face's `tokenizer.json` of a tokenizer that, as tiktoken, merges by rank alone.

There a merge is a listed pair of tokens. tiktoken joins any two neighbours whose bytes are a token,
the lowest rank first, so the list holds every such pair, by the rank of what they join to; and it
looks a whole pre-token up first, which is `ignore_merges` there: the only way to tokens that no
merge leads to. (Where two of one rank overlap, which text hardly ever has, tiktoken takes the
left one and that library the first listed.)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama3_jax.data.bpe import merge
from llama3_jax.errors import UserError

FILE = "tokenizer.json"


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte: itself, or one from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = {byte: chr(byte) for byte in shown}
    characters |= {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return [characters[byte] for byte in range(256)]


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}
_TO_CHARACTERS = dict(enumerate(_CHARACTERS))  # for str.translate


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that join to a token, by its rank and then by theirs."""
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right, cut, token))
    found.sort()
    return [(token[:cut], token[cut:]) for _, _, _, cut, token in found]


def dump(
    ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str, begin: str
) -> dict[str, Any]:
    """The content of the file; `begin` names the special that begins a text."""
    vocabulary = {_show(token): rank for token, rank in sorted(ranks.items(), key=lambda i: i[1])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    frame = {"SpecialToken": {"id": begin, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number, "content": name, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
            for name, number in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                    "invert": False,
                },
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [frame, sequence],
            "pair": [frame, sequence, {"SpecialToken": {"id": begin, "type_id": 1}}, second],
            "special_tokens": {
                begin: {"id": begin, "ids": [specials[begin]], "tokens": [begin]}
            },
        },
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": [f"{_show(left)} {_show(right)}" for left, right in merges(ranks)],
        },
    }  # fmt: skip


def load(path: Path, pattern: str) -> tuple[dict[bytes, int], list[str]]:
    """Ranks and the names of the specials, which must follow the ranks.

    Raises:
      UserError: no such file, damaged, or a tokenizer that merges by rank would give other ids.
    """
    if not path.is_file():
        raise UserError(f"{path}: tokenizer file not found")
    try:
        content = json.loads(path.read_bytes())
        model, splitter = content["model"], content["pre_tokenizer"]
        vocabulary, listed = model["vocab"], model["merges"]
        added = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
        ignores_merges = model.get("ignore_merges", False)
        patterns = _patterns(splitter)
        listed = [pair.split(" ") if isinstance(pair, str) else pair for pair in listed]
        listed = [(_hide(left), _hide(right)) for left, right in listed]
        ranks = {_hide(token): rank for token, rank in vocabulary.items() if rank not in added}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: not a byte-level BPE tokenizer.json ({reason})") from None
    if model.get("type", "BPE") != "BPE" or content.get("normalizer"):
        raise UserError(f"{path}: only a BPE model without a normalizer can be read")
    if patterns != [pattern]:
        raise UserError(f"{path}: splits text by {patterns}, not by Llama 3's pattern")
    if sorted(added) != list(range(len(ranks), len(ranks) + len(added))):
        raise UserError(f"{path}: the ids of its added tokens must follow those of the vocabulary")
    possible = merges(ranks)
    if set(listed) != set(possible):
        raise UserError(
            f"{path}: lists {len(listed):,} merges where {len(possible):,} pairs join to a token: "
            "merging by rank would give other ids"
        )
    targets = [ranks[left + right] for left, right in listed]
    if targets != sorted(targets):
        raise UserError(f"{path}: its merges are not in the order of the ids they join to")
    if not ignores_merges:
        singles = ([bytes([byte]) for byte in token] for token in ranks)
        if lost := sum(len(merge(parts, ranks)) > 1 for parts in singles):
            raise UserError(f"{path}: without ignore_merges {lost:,} of its tokens are never used")
    return ranks, [added[number] for number in sorted(added)]


def _patterns(splitter: Mapping[str, Any]) -> list[str]:
    """The regular expressions that cut text one after the other."""
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    found = []
    for step in steps:
        if step["type"] == "Split":
            if step["behavior"] != "Isolated" or step["invert"]:
                raise ValueError("Split that is not isolated")
            found.append(step["pattern"]["Regex"])
        elif step["type"] != "ByteLevel" or step["add_prefix_space"]:
            raise ValueError(f"pre-tokenizer {step['type']}")
        elif step.get("use_regex", True):
            found.append("GPT-2's pattern")
    return found


def _show(token: bytes) -> str:
    return token.decode("latin-1").translate(_TO_CHARACTERS)


def _hide(text: str) -> bytes:
    return bytes(_BYTES[character] for character in text)
