"""Fetches Debian's documentation packages and unpacks their pages, without installing anything.

    sudo apt-get update
    python -m experiments.curation.debian_pages --output=debian_pages

About 30,000 HTML pages: help in six languages, a handbook in 26, programming languages, a database,
mathematics. Works on Debian and Ubuntu; where a release names a package otherwise, say which with
--packages. The licences are the packages' own (usr/share/doc/<package>/copyright in the folder).
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from absl import flags

from llama3_jax import cli
from llama3_jax.errors import UserError

LANGUAGES = ("de", "en-us", "hi", "ja", "ru", "zh-cn")
PACKAGES = (
    *(f"libreoffice-help-{language}" for language in LANGUAGES),
    "debian-handbook",
    "python3.11-doc",
    "postgresql-doc-15",
    "cppreference-doc-en-html",
    "python-sympy-doc",
    "python-scipy-doc",
)
FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("output", "debian_pages", "Folder: each package's files below its name.")
    flags.DEFINE_list("packages", list(PACKAGES), "Packages to fetch.")


def main(_) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise UserError(f"{tool} is not there: this needs Debian or Ubuntu")
    output = Path(FLAGS.output)
    for package in FLAGS.packages:
        folder = output / package
        if not folder.exists():
            fetch(package, folder)
        pages = sum(1 for _ in folder.rglob("*.html"))
        print(f"{package}: {pages:,} pages")


def fetch(package: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        done = subprocess.run(
            ["apt-get", "download", package], cwd=work, capture_output=True, text=True
        )
        archives = list(Path(work).glob("*.deb"))
        if done.returncode or not archives:
            raise UserError(f"{package}: {done.stderr.strip() or 'nothing was downloaded'}")
        subprocess.run(["dpkg-deb", "-x", archives[0], Path(work) / "files"], check=True)
        (Path(work) / "files").rename(folder)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
