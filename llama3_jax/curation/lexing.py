"""Text as the words that classifiers and n-gram comparisons see.

Lower case; letters, marks and digits in one word; every punctuation character a word of its own,
so that no text can spell fastText's `__label__` or `</s>`. Scripts that put no spaces between words
are cut into characters.
"""

import re

import regex

# Scripts that put no spaces between words, for a pattern's brackets.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTERS = r"[\p{L}\p{M}\p{N}]"
# Scripts have symbols, too: a radical of a dictionary's index is Han, and no word.
_WORD = rf"[{_LETTERS}&&[{UNSPACED}]]|[{_LETTERS}--[{UNSPACED}]]+"
_WORDS = regex.compile(f"(?V1){_WORD}")
_PIECES = regex.compile(rf"(?V1){_WORD}|[^\s\p{{C}}]")
# The same for text that is ASCII, at twice the speed.
_ASCII_WORDS = re.compile(r"[a-z0-9]+")
_ASCII_PIECES = re.compile(r"[a-z0-9]+|[!-/:-@\[-`{-~]")


def words(text: str) -> list[str]:
    """The words alone, without punctuation."""
    return (_ASCII_WORDS if text.isascii() else _WORDS).findall(text.lower())


def pieces(text: str) -> list[str]:
    """Words and punctuation characters; joined by spaces they are a line for fastText."""
    return (_ASCII_PIECES if text.isascii() else _PIECES).findall(text.lower())
