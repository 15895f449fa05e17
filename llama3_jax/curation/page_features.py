"""What tells pages of code mixed with prose, of deduction and of STEM from others, in numbers.

Llama 3's pipelines for code and reasoning have text features of their own (paper, section 3.1.1),
which it does not name; these are ours. For fastText each becomes a word with its magnitude, such as
`@code_lines=3`, that no page can spell, since words never join a letter and a sign.
"""

import math

import regex

_CODE_LINE = regex.compile(
    r"(?m)^[ \t]*(?:(?:def|class|import|from|for|while|if|else|return|function|var|let|const|"
    r"public|private|static|void|int|struct|#include|package|using|fn|func|SELECT|INSERT)\b.*"
    r"[:;{}(),=]|.*[;{}]|[\w.\[\]]+[ \t]*[-+*/|&^]?=[^=].*|[$>]{1,3} \S.*)[ \t]*$"
)
_MATH = regex.compile(
    r"\\(?:frac|sum|int|sqrt|left|right|begin|alpha|beta|theta|lambda|mathbb|in|le|ge|to|cdot)\b"
    r"|[∑∫√≤≥≠≈∈∀∃∂∞±×÷→⇒⇔]|\$[^$\n]{1,200}\$|\b[a-zA-Z]\s?[=<>^]\s?[-\w(\\]"
)
_DEDUCTION = regex.compile(
    r"(?i)\b(?:therefore|hence|thus|it follows|suppose|assume|given that|let us|consider|implies|"
    r"q\.?e\.?d|proof|prove|lemma|theorem|corollary|if and only if|contradiction|w\.?l\.?o\.?g|"
    r"solve|solution|step \d+|we (?:have|get|obtain|conclude|find)|because|since)\b"
)
_STEM = regex.compile(
    r"(?i)\b(?:equation|function|algorithm|velocity|energy|mass|force|molecule|cell|protein|reaction|"
    r"electron|probability|variance|matrix|vector|circuit|voltage|temperature|hypothesis|experiment|"
    r"equilibrium|derivative|integral|frequency|wavelength|entropy|genome|enzyme|acid|ion)s?\b"
    r"|\d\s?(?:kg|km|cm|mm|nm|mol|hz|khz|mhz|kpa|joules?|volts?|ohms?|kelvin|°c)\b"
)
_PROSE_LINE = regex.compile(r"(?m)^.{60,}[.!?:][ \t]*$")
_LEVELS = 8


def features(text: str) -> dict[str, float]:
    """Shares of lines, and counts for 100 words, of what each kind of page has."""
    lines = max(1, sum(1 for line in text.splitlines() if line.strip()))
    words = max(1, len(text.split()))
    hundreds = words / 100
    return {
        "code_lines": len(_CODE_LINE.findall(text)) / lines,
        "prose_lines": len(_PROSE_LINE.findall(text)) / lines,
        "indented_lines": text.count("\n    ") / lines,
        "math": len(_MATH.findall(text)) / hundreds,
        "deduction": len(_DEDUCTION.findall(text)) / hundreds,
        "stem": len(_STEM.findall(text)) / hundreds,
    }


def feature_words(text: str) -> list[str]:
    """The features as words with a level from 0 to 7, each level twice the one before."""
    found = []
    for name, value in features(text).items():
        scaled = value * 100 if name.endswith("lines") else value * 10
        found.append(f"@{name}={min(_LEVELS - 1, int(math.log2(1 + scaled)))}")
    return found
