"""Which code an experiment was launched with: git revisions, uncommitted changes, config files."""

import dataclasses
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import llama3_jax
from llama3_jax.files import write_text

LAUNCHES = "launches"  # in an experiment's directory: a folder for each launch
SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Revision:
    """A git checkout: its folder, HEAD, and what of it is not committed ("" where all is)."""

    folder: Path
    commit: str
    changes: str

    def __str__(self) -> str:
        return f"{self.folder.name} at {self.commit[:10]}{' with changes' if self.changes else ''}"


def revisions(files: Iterable[Path]) -> list[Revision]:
    """The checkouts of this package and of `files`; without those that git does not know."""
    places = [Path(llama3_jax.__file__).parent, *(path.absolute().parent for path in files)]
    tops = dict.fromkeys(
        top for place in places if (top := _git(place, "rev-parse", "--show-toplevel"))
    )
    found = []
    for top in tops:
        folder = Path(top.strip())
        if commit := _git(folder, "rev-parse", "HEAD").strip():  # none before the first commit
            changes = _git(folder, "diff", "HEAD")
            unknown = _git(
                folder, "ls-files", "--others", "--exclude-standard", "--directory"
            ).splitlines()
            changes += "".join(f"untracked: {name}\n" for name in unknown)
            found.append(Revision(folder, commit, changes))
    return found


def _git(folder: Path, *command: str) -> str:
    """What git prints; "" where it fails, is not installed or hangs."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=SECONDS,
            errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def save(folder: Path, found: Iterable[Revision], files: Iterable[Path]) -> None:
    """Writes uncommitted changes as NAME.diff and copies of config files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, revision in enumerate(found, start=1):
        if revision.changes:
            write_text(folder / f"{number}-{revision.folder.name}.diff", revision.changes)
    for number, path in enumerate(files, start=1):
        shutil.copyfile(path, folder / f"{number}-{path.name}")
