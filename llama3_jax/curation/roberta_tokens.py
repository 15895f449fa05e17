"""Documents as RoBERTa's tokens, in padded batches of few shapes.

Every batch has one of a few lengths and, for each, one number of rows, so that a handful of
programs is compiled whatever comes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from llama3_jax.curation.roberta import RobertaConfig
from llama3_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
_SHORTEST = 64
# No token is longer in a tokenizer trained on text; what lies beyond is not looked at.
_CHARACTERS_OF_A_TOKEN = 64


class Batch(NamedTuple):
    """`tokens` [rows, length]; `documents` are the numbers of the first rows, the rest is padding."""

    documents: list[int]
    tokens: Int[np.ndarray, "rows length"]


class RobertaTokens:
    def __init__(self, folder: Path, config: RobertaConfig, max_length: int):
        """The tokenizer.json in `folder`; documents are cut to `max_length` tokens.

        Raises:
          UserError: no tokenizer, or one that does not fit the network.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise UserError(f"{path}: file not found; a RoBERTa needs its tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{path}: damaged or not a tokenizer ({error})") from None
        if not 2 < max_length <= config.max_length:
            raise UserError(
                f"max_length={max_length}: {folder} has positions for 3 to {config.max_length} tokens"
            )
        self._tokenizer.no_padding()
        # The name of a special token in a text is text: <pad> in its middle would be unseen.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.enable_truncation(max_length)
        self._config, self.max_length = config, max_length
        if (frame := self.encode([""])[0]) != [config.bos_id, config.eos_id]:
            raise UserError(
                f"{path}: frames a document by {frame}; the network in {folder} expects "
                f"{[config.bos_id, config.eos_id]}"
            )
        if (size := self._tokenizer.get_vocab_size()) > config.vocab_size:
            raise UserError(f"{path}: has {size} tokens, the network {config.vocab_size}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Begin, the first tokens of each text, end."""
        limit = self.max_length * _CHARACTERS_OF_A_TOKEN
        found = self._tokenizer.encode_batch([text[:limit] for text in texts])
        return [encoding.ids for encoding in found]

    def batches(self, ids: Sequence[list[int]], rows: int | None, size: int) -> Iterator[Batch]:
        """All documents, those of similar length together, in the order given within a length.

        A batch has `rows` rows, or as many as make `size` tokens.
        """
        lengths = self.lengths()
        groups: dict[int, list[int]] = {length: [] for length in lengths}
        for number, document in enumerate(ids):
            groups[next(length for length in lengths if length >= len(document))].append(number)
        for length, numbers in groups.items():
            count = rows or max(1, size // length)
            for start in range(0, len(numbers), count):
                chosen = numbers[start : start + count]
                tokens = np.full((count, length), self._config.pad_id, np.int32)
                # A row of padding alone would be a softmax of nothing.
                tokens[:, 0] = self._config.bos_id
                for row, number in enumerate(chosen):
                    tokens[row, : len(ids[number])] = ids[number]
                yield Batch(chosen, tokens)

    def lengths(self) -> list[int]:
        """64, 128, 256, …, max_length."""
        found = [self.max_length]
        length = _SHORTEST
        while length < self.max_length:
            found.append(length)
            length *= 2
        return sorted(found)
