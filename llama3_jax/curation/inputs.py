"""The files of a run's sources, as pieces that are read one by one."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from llama3_jax.curation.config import Input
from llama3_jax.curation.documents import HTML, SUFFIXES, File, Piece
from llama3_jax.errors import UserError

# HTML files are small: so many bytes of them, or so many files, are one piece.
PIECE_BYTES, PIECE_FILES = 64 << 20, 2_000


def plan(inputs: Mapping[str, Input]) -> list[Piece]:
    """Every source's files, in order.

    Raises:
      UserError: a path that is not there, a file of unknown format, or a source without files.
    """
    pieces = []
    for source, given in inputs.items():
        files = [file for i, path in enumerate(given.paths) for file in _files(source, i, path)]
        html = [file for file in files if file.path.lower().endswith(HTML)]
        pieces += [Piece(source, (f,)) for f in files if not f.path.lower().endswith(HTML)]
        pieces += [Piece(source, tuple(group)) for group in _groups(html)]
    return pieces


def passed_over(inputs: Mapping[str, Input]) -> dict[str, dict[str, int]]:
    """How many files in each source's folders are of formats that are not read, by suffix."""
    found = {}
    for source, given in inputs.items():
        suffixes = Counter(
            _suffix(path)
            for folder in map(Path, given.paths)
            if folder.is_dir()
            for path in folder.rglob("*")
            if path.is_file() and not path.name.lower().endswith(SUFFIXES)
        )
        if suffixes:
            found[source] = dict(suffixes.most_common())
    return found


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] in ([".gz"], [".zst"], [".bz2"], [".xz"])
    return "".join(suffixes[-2:] if packed else suffixes[-1:]) or "none"


def sample(pieces: list[Piece], documents: int) -> list[Piece]:
    """Of each source enough files, chosen by a hash, for some documents of many files."""
    chosen, taken = [], {}
    for piece in pieces:
        chosen += [Piece(piece.source, (file,)) for file in piece.files]
    chosen.sort(key=lambda p: hashlib.sha256(f"{p.source}/{p.files[0].name}".encode()).digest())
    kept = []
    for piece in chosen:
        if taken.get(piece.source, 0) < documents:
            kept.append(piece)
            taken[piece.source] = taken.get(piece.source, 0) + 1
    return sorted(kept)


def _files(source: str, number: int, path: str) -> Iterator[File]:
    where = f"config.inputs.{source}.paths"
    if os.path.isdir(path):
        root = Path(path)
        found = [p for p in root.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file()]
        if not found:
            raise UserError(f"{where}: {path} holds no file that is read ({', '.join(SUFFIXES)})")
    else:
        found = [Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        root = Path(os.path.commonpath([p.parent for p in found])) if found else Path()
        if not found:
            raise UserError(f"{where}: {path}: no such file")
        for unknown in (p for p in found if not p.name.lower().endswith(SUFFIXES)):
            raise UserError(f"{where}: {unknown}: unknown format; known: {', '.join(SUFFIXES)}")
    for file in sorted(found):
        stat = file.stat()
        name = f"{number}/{file.relative_to(root).as_posix()}"
        yield File(str(file.resolve()), name, stat.st_size, stat.st_mtime_ns)


def _groups(files: list[File]) -> Iterator[list[File]]:
    group: list[File] = []
    size = 0
    for file in files:
        if group and (size + file.size > PIECE_BYTES or len(group) == PIECE_FILES):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield group
