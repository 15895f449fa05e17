"""Byte-pair tokenizer of tiktoken with Llama 3's split pattern and special tokens.

A tokenizer is a `.tiktoken` file (base64 token, rank, a line each; Meta's `tokenizer.model` is
one) or a directory written by `save`. Llama 3 adds 256 specials after the ranks: <|begin_of_text|>,
<|end_of_text|> and reserved ones (Llama 3 paper, section 3.2).
"""

import base64
import binascii
import functools
import hashlib
import json
from pathlib import Path

import tiktoken

from llama3_jax.errors import UserError
from llama3_jax.files import write_json, write_text

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = 256
_RANKS_FILE, _CONFIG_FILE = "tokenizer.tiktoken", "tokenizer_config.json"


class Tokenizer:
    """Text to token ids and back. Text that looks like a special token is never parsed as one."""

    def __init__(self, ranks: dict[bytes, int], specials: int = LLAMA3_SPECIALS):
        """`ranks` maps tokens to 0..n-1; `specials` (at least 2) ids follow from n on."""
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise UserError(f"tokenizer ranks must be 0 to {len(ranks) - 1}, each once")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise UserError(
                f"tokenizer lacks a token for byte {missing[0]}: it cannot encode all text"
            )
        if specials < 2:
            raise UserError(f"tokenizer specials={specials}: begin and end of text need 2")
        names = ["<|begin_of_text|>", "<|end_of_text|>"]
        names += [f"<|reserved_special_token_{i}|>" for i in range(specials - 2)]
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            name="llama3",
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={name: len(ranks) + i for i, name in enumerate(names)},
        )
        self.specials = specials
        self.vocab_size = len(ranks) + specials
        self.bos = len(ranks)
        self.eos = len(ranks) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin and end of text."""
        return self._encoding.encode_ordinary(text)

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document: begin of text, `text`, end of text."""
        return [self.bos, *self.encode(text), self.eos]

    def decode(self, tokens: list[int]) -> str:
        """Text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(tokens)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal exactly for tokenizers that give the same ids: ranks, pattern and specials."""
        digest = hashlib.sha256(f"{LLAMA3_PATTERN} {self.specials}".encode())
        for token in sorted(self._ranks, key=self._ranks.__getitem__):
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()[:16]

    def save(self, directory: Path) -> None:
        lines = (
            f"{base64.b64encode(token).decode()} {rank}\n"
            for token, rank in sorted(self._ranks.items(), key=lambda item: item[1])
        )
        write_text(directory / _RANKS_FILE, "".join(lines))
        write_json(directory / _CONFIG_FILE, {"specials": self.specials})


def load(path: str | Path) -> Tokenizer:
    """A tokenizer from a `.tiktoken` file (with Llama 3's 256 specials) or a saved directory.

    Raises:
      UserError: no such file, or a line that is not a base64 token and its rank.
    """
    path, specials = Path(path), LLAMA3_SPECIALS
    if path.is_dir():
        config = path / _CONFIG_FILE
        if not config.is_file():
            raise UserError(f"{path}: no tokenizer here (no {_CONFIG_FILE})")
        specials = json.loads(config.read_text())["specials"]
        path = path / _RANKS_FILE
    if not path.is_file():
        raise UserError(f"{path}: tokenizer file not found")
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: not a base64 token and its rank") from None
    return Tokenizer(ranks, specials)


def find(path: Path) -> Path | None:
    """The tokenizer folder in the workdir of the run that `path` is, or is a checkpoint of."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / "tokenizer").is_dir():
            return folder / "tokenizer"
    return None
