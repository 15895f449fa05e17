"""Byte-pair tokenizer of tiktoken with Llama 3's split pattern and special tokens.

A tokenizer is a file of ranks (base64 token, rank, a line each: any `.tiktoken`, Meta's
`tokenizer.model`), a Hugging Face `tokenizer.json`, or a directory written by `save`. Llama 3 adds
256 specials after the ranks: <|begin_of_text|>, <|end_of_text|> and reserved ones (Llama 3 paper,
section 3.2).
"""

import base64
import binascii
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import regex
import tiktoken

from llama3_jax.data import tokenizer_json
from llama3_jax.errors import UserError
from llama3_jax.files import write_json, write_text

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = 256
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
RANKS_FILE, CONFIG_FILE = "tokenizer.tiktoken", "tokenizer_config.json"
# tiktoken's search for the pattern runs out of its stack in a million spaces: runs of white space
# (Unicode's White_Space, the pattern's \s) of at least so many characters are cut here.
_LONG_SPACE = 1 << 16
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_PUNCTUATION = regex.compile(r"[^\s\p{L}\p{N}]")


class Tokenizer:
    """Text to token ids and back. Text that looks like a special is parsed as one only if asked."""

    def __init__(self, ranks: Mapping[bytes, int], specials: int | Sequence[str] = LLAMA3_SPECIALS):
        """`ranks` maps tokens to 0..n-1; the ids of `specials` (names, or how many) follow."""
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise UserError(f"tokenizer ranks must be 0 to {len(ranks) - 1}, each once")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise UserError(
                f"tokenizer lacks a token for byte {missing[0]}: it cannot encode all text"
            )
        if isinstance(specials, int):
            if specials < 2:
                raise UserError(f"tokenizer specials={specials}: begin and end of text need 2")
            reserved = (f"<|reserved_special_token_{i}|>" for i in range(specials - 2))
            specials = [BEGIN, END, *reserved]
        if missing := {BEGIN, END} - set(specials):
            raise UserError(f"tokenizer specials lack {min(missing)}")
        if len(set(specials)) != len(specials):
            raise UserError("tokenizer specials: a name occurs twice")
        self.ranks = dict(ranks)
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(specials)}
        self._encoding = tiktoken.Encoding(
            name="llama3",
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=self.ranks,
            special_tokens=self.special_ids,
        )
        self.specials = len(specials)
        self.vocab_size = len(ranks) + self.specials
        self.bos = self.special_ids[BEGIN]
        self.eos = self.special_ids[END]

    def encode(self, text: str, parse_specials: bool = False) -> list[int]:
        """Ids of `text`, without begin and end of text.

        The names of specials in it become their ids with `parse_specials`; otherwise they are text.
        Half a surrogate pair is encoded as U+FFFD.

        Raises:
          ValueError: tiktoken fails on this text.
        """
        try:
            if len(text) >= _LONG_SPACE:
                return self._encode_long(text, parse_specials)
            if parse_specials:
                return self._encoding.encode(text, allowed_special="all")
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # A panic of Rust code is no Exception: it would pass by all who handle one bad text.
            if type(error).__name__ != "PanicException":
                raise
            message = f"tiktoken failed on a text of {len(text):,} characters: {error}"
            raise ValueError(message) from None

    def _encode_long(self, text: str, parse_specials: bool) -> list[int]:
        specials = "|".join(map(re.escape, self.special_ids))
        texts = re.split(f"({specials})", text) if parse_specials else [text]
        ids: list[int] = []
        for part in texts:
            if parse_specials and part in self.special_ids:
                ids.append(self.special_ids[part])
                continue
            for piece, is_pretoken in _cut_long_spaces(part):
                encoding = self._whole if is_pretoken else self._encoding
                ids += encoding.encode_ordinary(piece)
        return ids

    @functools.cached_property
    def _whole(self) -> tiktoken.Encoding:
        """Merges a text as one pre-token."""
        return tiktoken.Encoding(
            name="whole", pat_str=r"(?s:.+)", mergeable_ranks=self.ranks, special_tokens={}
        )

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document: begin of text, `text`, end of text."""
        return [self.bos, *self.encode(text), self.eos]

    def decode(self, tokens: list[int]) -> str:
        """Text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(tokens)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal exactly for tokenizers that give documents the same ids."""
        digest = hashlib.sha256(f"{LLAMA3_PATTERN} {self.specials}".encode())
        if [self.bos, self.eos] != [len(self.ranks), len(self.ranks) + 1]:
            digest.update(f"{self.bos} {self.eos}".encode())
        for token in sorted(self.ranks, key=self.ranks.__getitem__):
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's own folder: ranks, and the specials' names."""
        self.save_ranks(directory / RANKS_FILE)
        write_json(directory / CONFIG_FILE, {"specials": list(self.special_ids)})

    def save_ranks(self, path: Path) -> None:
        """Writes a `.tiktoken` file or Meta's `tokenizer.model`, which hold no specials."""
        lines = (
            f"{base64.b64encode(token).decode()} {rank}\n"
            for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])
        )
        write_text(path, "".join(lines))

    def save_json(self, path: Path) -> None:
        """Writes Hugging Face's `tokenizer.json`.

        That library parses specials in text, unless its `encode_special_tokens` is set.
        """
        write_json(path, tokenizer_json.dump(self.ranks, self.special_ids, LLAMA3_PATTERN, BEGIN))


def _cut_long_spaces(text: str) -> Iterator[tuple[str, bool]]:
    """Parts of `text` with the same pre-tokens as the whole; True for one that is a pre-token.

    A long run of white space is cut as LLAMA3_PATTERN does: line breaks at its start belong to
    punctuation before it; then comes all up to its last line break, then the rest without its last
    character, which may begin the next word.
    """
    at = 0
    for run in re.finditer(f"{_SPACE}{{{_LONG_SPACE},}}", text):
        start, stop = run.span()
        if start and _PUNCTUATION.match(text, start - 1):
            start = stop - len(run[0].lstrip("\r\n"))
        yield text[at:start], False
        last_break = max(text.rfind("\n", start, stop), text.rfind("\r", start, stop)) + 1
        if last_break:
            yield text[start:last_break], True
            start = last_break
        at = stop if stop == len(text) else max(start, stop - 1)
        yield text[start:at], True
    yield text[at:], False


def load(path: str | Path) -> Tokenizer:
    """A tokenizer from a file of ranks (with Llama 3's 256 specials), tokenizer.json, or a folder.

    Raises:
      UserError: no such file, it is damaged, or it gives other ids than this class would.
    """
    path = Path(path)
    if path.is_dir():
        config = path / CONFIG_FILE
        ranks = path / RANKS_FILE
        if ranks.is_file() and config.is_file():
            return Tokenizer(load_ranks(ranks), _specials(config))
        if not (path / tokenizer_json.FILE).is_file():
            raise UserError(
                f"{path}: no tokenizer here (no {RANKS_FILE} with {CONFIG_FILE}, "
                f"no {tokenizer_json.FILE})"
            )
        path = path / tokenizer_json.FILE
    if path.suffix == ".json":
        return Tokenizer(*tokenizer_json.load(path, LLAMA3_PATTERN))
    return Tokenizer(load_ranks(path))


def load_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks from a `.tiktoken` file.

    Raises:
      UserError: no such file, or a line that is not a base64 token and its rank.
    """
    if not path.is_file():
        raise UserError(f"{path}: tokenizer file not found")
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if token in ranks:
                raise UserError(f"{path}:{number}: the token of rank {ranks[token]} again")
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: not a base64 token and its rank") from None
    if not ranks:
        raise UserError(f"{path}: empty tokenizer file")
    return ranks


def _specials(config: Path) -> int | list[str]:
    try:
        specials = json.loads(config.read_bytes())["specials"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{config}: damaged, no JSON with specials") from None
    names = isinstance(specials, list) and all(isinstance(name, str) for name in specials)
    if not names and type(specials) is not int:
        raise UserError(f"{config}: damaged, specials are neither names nor a number")
    return specials


def find(path: Path) -> Path | None:
    """The tokenizer folder in the workdir of the run that `path` is, or is a checkpoint of."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / "tokenizer").is_dir():
            return folder / "tokenizer"
    return None
