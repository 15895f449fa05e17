"""Stage urls: canonical URL, and the lists of adult and PII domains (sec. 3.1.1 of the paper).

    urls_canonical  the key by which url_dedup compares; "" for a page without a URL
    urls_entry      the list's entry that the page fell under, else null
    reason          urls_<list's name>, or urls_malformed where no host can be read

A list is a UTF-8 text file, one entry a line; blank lines and what follows a # are ignored:

    example.com            the host and all hosts under it
    xxx                    a top-level domain
    example.com/forum      pages of the host (and hosts under it) at this path and below it

or a folder of the UT1 lists, of which the files `domains` and `urls` are read: what is no entry in
them is passed over, and how many these are is logged.

The paper's own lists ("known to contain adult content", "high volumes of PII") are not public. The
two built in, lists/adult.txt and lists/pii.txt, are small and hand-made: name your own files, such
as the folders of the UT1 lists, for real work.
"""

import fnmatch
import functools
import ipaddress
import logging
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import daft
import pyarrow as pa
from daft import col
from w3lib.url import canonicalize_url

from llama3_jax.errors import UserError
from llama3_jax.schema import Config

VERSION = 1
_FOLDER = Path(__file__).parent / "lists"
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Hosts and paths that are canonical as they stand: a hundred times as quick as to make them so.
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_STEP = r"/[A-Za-z0-9_~-][A-Za-z0-9_~.-]*"
_PLAIN = re.compile(rf"(?!www\.){_LABEL}(?:\.{_LABEL})*(?:\.[a-z]{{2,63}})(?:{_STEP})*/?", re.A)
_UT1_FILES = ("domains", "urls")
_SESSION = re.compile(r";(?:jsessionid|phpsessid|sid)=[^/;]*+", re.I)
_COLUMNS = {"canonical": pa.string(), "entry": pa.string(), "reason": pa.string()}


class BlockList(Config):
    """Pages to reject as urls_<name>: `files` are files, UT1's folders, or names of built-in lists."""

    name: str
    files: tuple[str, ...]


class UrlsConfig(Config):
    """`drop_parameters` are patterns of query parameters that name a visit and not a page.

    `merge_schemes` and `merge_www` make http://www.a.b/ and https://a.b/ one page (as the keys of
    Common Crawl's index do).
    """

    drop_parameters: tuple[str, ...] = (
        "utm_*", "fbclid", "gclid", "gclsrc", "dclid", "msclkid", "yclid", "igshid", "mc_cid",
        "mc_eid", "_ga", "_gl", "_hsenc", "_hsmi", "phpsessid", "jsessionid", "aspsessionid*",
    )  # fmt: skip
    merge_schemes: bool = True
    merge_www: bool = True
    lists: tuple[BlockList, ...] = (
        BlockList(name="adult", files=("adult",)),
        BlockList(name="pii", files=("pii",)),
    )


def urls(frame: daft.DataFrame, config: UrlsConfig, scratch: Path) -> daft.DataFrame:
    """Adds urls_canonical, urls_entry and reason.

    Raises:
      UserError: a list that is missing or has a line that is no entry.
    """
    _lists(config)  # an error of a list ends the run here
    judged = _Urls(config)(col("url"))
    frame = frame.with_column("_urls", judged)
    columns = {"urls_canonical": "canonical", "urls_entry": "entry", "reason": "reason"}
    frame = frame.with_columns({name: col("_urls").get(key) for name, key in columns.items()})
    return frame.exclude("_urls")


def list_files(config: UrlsConfig) -> list[Path]:
    """The files that the result depends on besides frame and config."""
    return [_path(name) for one in config.lists for name in one.files]


def _lists(config: UrlsConfig) -> tuple[tuple[str, frozenset[str]], ...]:
    """Names and entries, read once in a process while the files stay as they are."""
    changed = tuple(
        (str(file), file.stat().st_mtime_ns)
        for one in config.lists
        for name in one.files
        for file in _files(name)
    )
    return _read_lists(tuple((one.name, one.files) for one in config.lists), changed)


@functools.lru_cache(maxsize=2)
def _read_lists(lists: tuple, _changed: tuple) -> tuple[tuple[str, frozenset[str]], ...]:
    return tuple((name, read_list(BlockList(name=name, files=files))) for name, files in lists)


def read_list(block: BlockList) -> frozenset[str]:
    """The entries of a list's files, hosts in lower case and punycode.

    Raises:
      UserError: a file that is missing, or has a line that is no entry.
    """
    entries: set[str] = set()
    for name in block.files:
        for path in _files(name):
            _read_entries(path, entries, strict=not _path(name).is_dir())
    return frozenset(entries)


def _files(name: str) -> list[Path]:
    path = _path(name)
    if path.is_dir():
        if found := [path / file for file in _UT1_FILES if (path / file).is_file()]:
            return found
        raise UserError(f"urls.lists: {name}: a folder without {' or '.join(_UT1_FILES)}")
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in _FOLDER.glob("*.txt")))
        raise UserError(f"urls.lists: {name}: no such file or folder; built in: {known}")
    return [path]


def _read_entries(path: Path, entries: set[str], strict: bool) -> None:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8", "strict" if strict else "replace")
    except UnicodeDecodeError as error:
        raise UserError(f"urls.lists: {path}: cannot be read as UTF-8 text ({error})") from None
    odd = 0
    for number, line in enumerate(text.splitlines(), 1):
        if _PLAIN.fullmatch(line):
            entries.add(line.rstrip("/"))
        elif entry := line.split("#")[0].strip():
            try:
                entries.add(_entry(entry, f"{path}:{number}"))
            except UserError:
                if strict:
                    raise
                odd += 1
    if odd:
        logging.warning("%s: %d lines are no host or host/path and were passed over", path, odd)


def _path(name: str) -> Path:
    built_in = _FOLDER / f"{name}.txt"
    return built_in if built_in.is_file() else Path(name)


def _entry(entry: str, where: str) -> str:
    try:
        url = canonical("//" + entry, UrlsConfig(lists=()))
    except ValueError as error:
        raise UserError(f"{where}: {entry!r} is no host or host/path ({error})") from None
    if "://" in entry or " " in entry or "\ufffd" in entry:
        raise UserError(f"{where}: {entry!r} is no host or host/path")
    return url.removeprefix("//").rstrip("/")


def canonical(url: str, config: UrlsConfig) -> str:
    """The URL without what does not name the page.

    w3lib sorts the query, normalises percent-encoding, resolves dots, drops the fragment and puts
    the host in lower-case punycode. On top of it go default ports, user names, a host's last dot,
    session and campaign parameters; #! fragments, which do name a page, stay.

    Raises:
      ValueError: no host or port can be read.
    """
    url = url.strip()
    if not url:
        return ""
    parts = urlsplit(canonicalize_url(url, keep_fragments="#!" in url))
    host, port = parts.hostname or "", parts.port
    scheme = parts.scheme
    if scheme in _DEFAULT_PORTS and not host:
        raise ValueError("no host")
    if port == _DEFAULT_PORTS.get(scheme):
        port = None
    if config.merge_schemes and scheme == "http" and port is None:
        scheme = "https"
    host = host.rstrip(".")
    if config.merge_www and host.count(".") > 1:
        host = host.removeprefix("www.")
    if ":" in host:
        host = f"[{ipaddress.ip_address(host)}]"
    query = parts.query
    if query:
        pairs = parse_qsl(query, keep_blank_values=True)
        dropped = _parameters(config.drop_parameters)
        kept = [pair for pair in pairs if not dropped.match(pair[0].lower())]
        query = query if len(kept) == len(pairs) else urlencode(kept)
    path = _SESSION.sub("", parts.path) if ";" in parts.path else parts.path
    fragment = parts.fragment if parts.fragment.startswith("!") else ""
    return urlunsplit((scheme, host if port is None else f"{host}:{port}", path, query, fragment))


@functools.cache
def _parameters(patterns: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(fnmatch.translate(one) for one in patterns) or r"(?!)")


def find_entry(url: str, entries: frozenset[str]) -> str | None:
    """The entry of a list that a canonical URL falls under: the shortest path of the longest host."""
    parts = urlsplit(url)
    labels = (parts.hostname or "").split(".")
    steps = [step for step in parts.path.split("/") if step]
    for start in range(len(labels)):
        host = ".".join(labels[start:])
        if host in entries:
            return host
        prefix = host
        for step in steps:
            prefix += "/" + step
            if prefix in entries:
                return prefix
    return None


@daft.cls
class _Urls:
    def __init__(self, config: UrlsConfig):
        # Not the lists: millions of entries would travel with every task.
        self.config = config

    @daft.method.batch(
        return_dtype=daft.DataType.struct(
            {name: daft.DataType.string() for name in ("canonical", "entry", "reason")}
        ),
        batch_size=4096,
    )
    def __call__(self, url: daft.Series) -> pa.Array:
        lists = _lists(self.config)
        rows = [self.judge(one or "", lists) for one in url.to_pylist()]
        return pa.array(rows, pa.struct(_COLUMNS))

    def judge(
        self, url: str, lists: tuple[tuple[str, frozenset[str]], ...]
    ) -> dict[str, str | None]:
        try:
            address = canonical(url, self.config)
        except ValueError:
            return {"canonical": "", "entry": None, "reason": "urls_malformed"}
        for name, entries in lists:
            if entry := find_entry(address, entries):
                return {"canonical": address, "entry": entry, "reason": f"urls_{name}"}
        return {"canonical": address, "entry": None, "reason": None}
