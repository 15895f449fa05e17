"""Real pages in many languages, with code and mathematics: Debian's documentation packages.

    python -m experiments.curation.debian_pages --output=debian_pages
    python -m llama3_jax.curate --config=experiments/curation/debian.py:debian_pages --workdir=runs/debian

README.md beside this file tells what came of it.
"""

from experiments.curation.debian_pages import LANGUAGES
from llama3_jax.curation.config import curation_config


def get_config(folder: str = "debian_pages"):
    def pages(*packages: str) -> dict:
        paths = tuple(f"{folder}/{package}" for package in packages)
        return dict(paths=paths, url_prefix="https://docs.debian.example/")

    helps = [f"libreoffice-help-{language}" for language in LANGUAGES if language != "en-us"]
    return curation_config(
        inputs=dict(
            general=pages("libreoffice-help-en-us"),
            code=pages("python3.11-doc", "postgresql-doc-15", "cppreference-doc-en-html"),
            math=pages("python-sympy-doc", "python-scipy-doc"),
            multilingual=pages(*helps, "debian-handbook"),
        ),
        stages=dict(
            extract={},
            urls={},
            url_dedup={},
            languages=dict(exempt_sources=("code", "math")),
            # Translations hold many pages in English: those of the other sources are the originals.
            minhash=dict(prefer=("math", "code", "general")),
            lines={},
            gopher={},
            divergence=dict(exempt_sources=("code", "math")),
            safety={},
            pii={},
        ),
    )  # fmt: skip
