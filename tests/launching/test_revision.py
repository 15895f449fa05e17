"""Which code a launch found."""

import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

from llama3_jax.launching import revision


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with one commit of config.py; `git` runs git in it."""
    folder = tmp_path / "mine"
    folder.mkdir()

    def git(*command: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", folder, *own, *command], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (folder / "config.py").write_text("lr = 1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    return folder, git


def of(folder: Path, file: Path) -> revision.Revision:
    (found,) = [r for r in revision.revisions([file]) if r.folder == folder.resolve()]
    return found


def test_commit_and_changes(checkout, tmp_path):
    folder, git = checkout
    file = folder / "config.py"
    clean = of(folder, file)
    assert (clean.commit, clean.changes) == (git("rev-parse", "HEAD").strip(), "")
    assert str(clean) == f"mine at {clean.commit[:10]}"
    file.write_text("lr = 2\n")
    (folder / "new.py").touch()
    dirty = of(folder, file)
    assert dirty.commit == clean.commit and str(dirty).endswith(" with changes")
    assert "-lr = 1\n+lr = 2\n" in dirty.changes and "untracked: new.py\n" in dirty.changes
    revision.save(tmp_path / "saved", [dirty], [file])
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "1-config.py", "1-mine.diff",
    ]  # fmt: skip
    assert (tmp_path / "saved/1-config.py").read_text() == "lr = 2\n"
    # The saved changes make of the commit what was launched.
    file.write_text("lr = 1\n")
    subprocess.run(
        ["git", "-C", folder, "apply", tmp_path / "saved/1-mine.diff"],
        capture_output=True,
        check=True,
    )
    assert file.read_text() == "lr = 2\n"


def test_without_git_there_is_no_revision(tmp_path, monkeypatch):
    file = tmp_path / "config.py"
    file.touch()
    assert all(r.folder == REPOSITORY for r in revision.revisions([file]))
    monkeypatch.setenv("PATH", "")
    assert revision.revisions([file]) == []
