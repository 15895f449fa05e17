"""Personal data in text, by shape and checksum; every pattern is bounded and cannot backtrack far.

Kinds, the first wins where two overlap:

    email  RFC 5322's usual form, a host with a top-level domain that is no file's suffix
    iban   ISO 13616: the country's length, and 1 modulo 97
    card   13 to 19 digits, plain or in a card's groups, an issuer's prefix, Luhn's checksum
    id     US social security (ranges); China (ISO 7064 mod 11-2), Spain DNI and NIE (mod 23), France
           NIR (mod 97), Italy codice fiscale, Brazil CPF, India Aadhaar (Verhoeff), Sweden (Luhn)
    ip     IPv4 and IPv6 addresses that are routed in public and are no section's number
    phone  international with +, North American with separators, any after a word for telephone
"""

import datetime
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, get_args

Kind = Literal["email", "iban", "card", "id", "ip", "phone"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Item(NamedTuple):
    kind: Kind
    start: int
    stop: int


class Finder(NamedTuple):
    """Spans of one kind of item; a text in which RE2 does not find `gate` has none."""

    kind: Kind
    gate: str
    spans: Callable[[str], Iterator[tuple[int, int]]]


def find(text: str, finders: Iterable[Finder] | None = None) -> list[Item]:
    """All items in the order of the text, none overlapping another; by all finders or by some."""
    found: list[Item] = []
    by_kind: dict[Kind, set[tuple[int, int]]] = {}
    for finder in FINDERS if finders is None else finders:
        by_kind.setdefault(finder.kind, set()).update(finder.spans(text))
    for kind, spans in by_kind.items():
        own: list[Item] = []
        at = end = 0  # the first item found that may overlap; where this kind's last one ends
        for start, stop in sorted(spans):
            while at < len(found) and found[at].stop <= start:
                at += 1
            if end <= start and (at == len(found) or stop <= found[at].start):
                own.append(Item(kind, start, stop))
                end = stop
        found = sorted([*found, *own], key=lambda item: item.start)
    return found


def luhn(digits: str) -> bool:
    odd = [int(digit) for digit in digits[-1::-2]]
    even = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(odd) + sum(even)) % 10 == 0


def iban(number: str) -> bool:
    number = number[4:] + number[:4]
    return int("".join(str(int(character, 36)) for character in number)) % 97 == 1


def verhoeff(digits: str) -> bool:
    check = 0
    for place, digit in enumerate(reversed(digits)):
        check = _VERHOEFF[check][_PERMUTED[place % 8][int(digit)]]
    return check == 0


_LOCAL = re.compile(r"[A-Za-z0-9_%+\-](?:[A-Za-z0-9._%+\-]{0,63})\Z")
_HOST = re.compile(r"@([A-Za-z0-9](?:[A-Za-z0-9.\-]{1,253}+))")
_FILES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "mp4", "pdf", "html", "py"}


def _emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" not in text:
        return
    for match in _HOST.finditer(text):
        host = match[1].rstrip(".-")
        labels = host.split(".")
        top = labels[-1].lower()
        if len(labels) < 2 or "" in labels or top in _FILES or not 2 <= len(top) <= 24:
            continue
        if not (top.isalpha() or top.startswith("xn--")):
            continue
        before = text[max(0, match.start() - 64) : match.start()]
        local = _LOCAL.search(before)
        if local and ".." not in local[0] and not local[0].endswith("."):
            yield match.start() - len(local[0]), match.start(1) + len(host)


_IBAN = re.compile(r"\b[A-Z]{2}\d{2} ?[A-Z0-9]{4}")
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15,
    "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24,
    "SM": 27, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN.finditer(text):
        length, stop, number = _IBAN_LENGTHS.get(match[0][:2], 0), match.start(), ""
        while len(number) < length and stop < len(text):
            if text[stop] == " " and text[stop - 1] != " ":
                stop += 1
            elif text[stop].isascii() and (text[stop].isdigit() or text[stop].isupper()):
                number, stop = number + text[stop], stop + 1
            else:
                break
        if (
            length
            and len(number) == length
            and not text[stop : stop + 1].isalnum()
            and iban(number)
        ):
            yield match.start(), stop


_DIGITS = re.compile(r"(?<![\d.,\-])\d{13,19}+(?![\d\-]|[.,]\d)", re.A)
_GROUPS = re.compile(
    r"(?<![\d\-])(?:\d{4}([ \-])\d{4}\1\d{4}\1\d{4}|\d{4}([ \-])\d{6}\2\d{4,5})(?![\d\-])", re.A
)
_ISSUERS = re.compile(r"3[0-9]|4|5[0-9]|2[2-7]|6")


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_DIGITS, _GROUPS):
        for match in pattern.finditer(text):
            digits = re.sub(r"\D", "", match[0])
            if _ISSUERS.match(digits) and len(set(digits)) > 1 and luhn(digits):
                yield match.span()


def _shaped(
    pattern: str, check: Callable[[re.Match], bool]
) -> Callable[[str], Iterator[tuple[int, int]]]:
    compiled = re.compile(rf"(?<![\w\-]){pattern}(?![\w\-])", re.A)

    def finder(text: str) -> Iterator[tuple[int, int]]:
        return (match.span() for match in compiled.finditer(text) if check(match))

    return finder


def _is_date(year: str, month: str, day: str) -> bool:
    try:
        datetime.date(int(year), int(month), int(day))
    except ValueError:
        return False
    return True


def _us(match: re.Match) -> bool:
    area, group, serial = match.groups()
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


def _china(match: re.Match) -> bool:
    number = match[0].upper()
    weighted = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return (
        _is_date(number[6:10], number[10:12], number[12:14])
        and "10X98765432"[weighted % 11] == number[17]
    )


def _spain(match: re.Match) -> bool:
    number = match[1].translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == match[2]


def _france(match: re.Match) -> bool:
    digits = re.sub(r"\s", "", match[0])
    body = digits[:13].replace("2A", "19").replace("2B", "18")
    return 1 <= int(digits[3:5]) <= 12 and 97 - int(body) % 97 == int(digits[13:])


_ITALY_ODD = dict(
    zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", (
        1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10,
        22, 25, 24, 23,
    ), strict=True)
)  # fmt: skip


def _italy(match: re.Match) -> bool:
    code = match[0]
    total = sum(_ITALY_ODD[one] for one in code[0:15:2])
    total += sum(int(one, 36) if one.isdigit() else ord(one) - ord("A") for one in code[1:15:2])
    return chr(ord("A") + total % 26) == code[15]


def _brazil(match: re.Match) -> bool:
    digits = [int(digit) for digit in match[0] if digit.isdigit()]
    for count in (9, 10):
        total = sum((count + 1 - place) * digits[place] for place in range(count))
        if total * 10 % 11 % 10 != digits[count]:
            return False
    return len(set(digits)) > 1


def _india(match: re.Match) -> bool:
    return verhoeff(match[0].replace(" ", ""))


def _sweden(match: re.Match) -> bool:
    date, rest = match[1], match[2]
    day = int(date[4:]) - (60 if int(date[4:]) > 60 else 0)
    return _is_date("2000", date[2:4], str(day)) and luhn(date + rest)


_IPV4 = re.compile(r"(?<![\w.\-])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?![\w\-]|\.\d)", re.A)
# Global unicast addresses are 2000::/3.
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}+(?![\w:])", re.A)


def _ips(text: str) -> Iterator[tuple[int, int]]:
    for match in (*_IPV4.finditer(text), *_IPV6.finditer(text)):
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        # Sections and versions (2.5.1.3) have small parts only; one address in 4,000 does.
        if address.is_global and (address.version == 6 or max(address.packed) >= 32):
            yield match.span()


_SEPARATORS = r"[ .\-\u00a0\u2011/]{0,2}+"
_PLUS = re.compile(
    rf"(?<![\w+.])(?!\+\d\.\d+\b)(?P<number>\+\(?[1-9]\d{{0,2}}+\)?"
    rf"(?:{_SEPARATORS}\(?\d{{1,5}}+\)?){{2,6}}+)(?!\w)",
    re.A,
)
_AMERICA = re.compile(
    r"(?<![\w.\-+])(?P<number>(?:1[ .\-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .\-])[2-9]\d\d[ .\-]\d{4})"
    r"(?![\w\-]|\.\d)",
    re.A,
)
# No letter stands before these ("hotel 1234567" names no telephone).
_WHOLE_WORDS = (
    "tel", "tél", "telephone", "téléphone", "phone", "cellphone", "telefon", "mobiltelefon", "teléfono", "telefone",
    "telefono", "mobile", "handy", "fax", "telefax", "whatsapp", "тел", "телефон",
)  # fmt: skip
# Of scripts that write the words before them, or an article, without a space.
_JOINED_WORDS = ("电话", "電話", "手机", "전화", "هاتف", "फ़ोन")
_NAMED = re.compile(
    rf"(?i:(?<![^\W\d_])(?:{'|'.join(_WHOLE_WORDS)})|{'|'.join(_JOINED_WORDS)})[.:：]{{0,2}}+[ \t]{{0,3}}+"
    rf"(?P<number>\(?\d{{1,5}}+\)?(?:{_SEPARATORS}\(?\d{{1,5}}+\)?){{1,6}}+)(?!\w)"
)
_YEAR = r"(?:19|20)\d\d"
# Years, ranges of them and dates: what follows the name of a product or a company, too.
_DATES = re.compile(
    rf"{_YEAR}(?:[ \-/]{{1,3}}{_YEAR})++|{_YEAR}[\-./]\d\d?[\-./]\d\d?|\d\d?[\-./]\d\d?[\-./]{_YEAR}"
)


def _phones(pattern: re.Pattern, least: int) -> Callable[[str], Iterator[tuple[int, int]]]:
    def finder(text: str) -> Iterator[tuple[int, int]]:
        for match in pattern.finditer(text):
            start, stop = match.span("number")
            number = match["number"]
            if number.endswith(")") and number.count("(") < number.count(")"):
                stop -= 1
            if least <= sum(one.isdigit() for one in number) <= 15 and not _DATES.fullmatch(number):
                yield start, stop

    return finder


# Gates are shapes only, no checksum, and may be wider than what the finder finds. Kinds in order.
FINDERS = (
    Finder("email", r"[A-Za-z0-9_%+\-]@[A-Za-z0-9]", _emails),
    Finder("iban", r"[A-Z]{2}[0-9]{2} ?[A-Z0-9]{4}", _ibans),
    Finder(
        "card",
        r"[0-9]{13}|[0-9]{4}[ \-][0-9]{4}[ \-][0-9]{4}[ \-]|[0-9]{4}[ \-][0-9]{6}[ \-][0-9]{4}",
        _cards,
    ),
    Finder("id", r"[0-9]{3}-[0-9]{2}-[0-9]{4}", _shaped(r"(\d{3})-(\d{2})-(\d{4})", _us)),
    Finder("id", r"[0-9]{17}", _shaped(r"[1-9]\d{5}(?:19|20)\d{9}[\dXx]", _china)),
    Finder(
        "id", r"[0-9XYZ][0-9]{7}-?[A-Z]", _shaped(r"(\d{8}|[XYZ]\d{7})-?([A-HJ-NP-TV-Z])", _spain)
    ),
    Finder(
        "id",
        r"[12] ?[0-9]{2} ?[0-9]{2} ?[0-9][0-9AB] ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}",
        _shaped(r"[12] ?\d{2} ?\d{2} ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}", _france),
    ),
    Finder(
        "id",
        r"[A-Z]{6}[0-9]{2}[A-Z][0-9]{2}[A-Z][0-9]{3}",
        _shaped(r"[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z]", _italy),
    ),
    Finder("id", r"[0-9]{3}\.[0-9]{3}-[0-9]{2}", _shaped(r"\d{3}\.\d{3}\.\d{3}-\d{2}", _brazil)),
    Finder("id", r"[0-9]{4} [0-9]{4} [0-9]{4}", _shaped(r"[2-9]\d{3} \d{4} \d{4}", _india)),
    Finder("id", r"[0-9]{6}[-+][0-9]{4}", _shaped(r"(\d{6})[-+](\d{4})", _sweden)),
    Finder(
        "ip",
        r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:",
        _ips,
    ),
    Finder("phone", r"\+\(?[1-9][0-9 .()/\-\x{a0}\x{2011}]{6}", _phones(_PLUS, 8)),
    Finder("phone", r"[2-9][0-9]{2}\)? ?[ .\-]?[2-9][0-9]{2}[ .\-][0-9]{4}", _phones(_AMERICA, 10)),
    Finder(
        "phone",
        rf"(?i:{'|'.join(_WHOLE_WORDS + _JOINED_WORDS)})[.:：]{{0,2}}[ \t]{{0,3}}\(?[0-9]",
        _phones(_NAMED, 7),
    ),
)
GATE = "|".join(finder.gate for finder in FINDERS)

_VERHOEFF = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 0, 6, 7, 8, 9, 5], [2, 3, 4, 0, 1, 7, 8, 9, 5, 6],
             [3, 4, 0, 1, 2, 8, 9, 5, 6, 7], [4, 0, 1, 2, 3, 9, 5, 6, 7, 8], [5, 9, 8, 7, 6, 0, 4, 3, 2, 1],
             [6, 5, 9, 8, 7, 1, 0, 4, 3, 2], [7, 6, 5, 9, 8, 2, 1, 0, 4, 3], [8, 7, 6, 5, 9, 3, 2, 1, 0, 4],
             [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]  # fmt: skip
_PERMUTED = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 5, 7, 6, 2, 8, 3, 0, 9, 4], [5, 8, 0, 3, 7, 9, 6, 1, 4, 2],
             [8, 9, 1, 6, 0, 4, 3, 5, 2, 7], [9, 4, 5, 3, 1, 2, 6, 8, 7, 0], [4, 2, 8, 6, 5, 7, 3, 9, 0, 1],
             [2, 7, 9, 3, 8, 0, 6, 4, 1, 5], [7, 0, 4, 6, 9, 1, 3, 2, 5, 8]]  # fmt: skip
