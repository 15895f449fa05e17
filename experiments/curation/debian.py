"""Real pages in many languages, with code and mathematics: Debian's documentation packages.

    python -m experiments.curation.debian_pages --output=debian_pages
    python -m llama3_jax.curate --config=experiments/curation/debian.py:debian_pages --workdir=runs/debian

README.md beside this file tells what came of it, and why the settings are as they are.
"""

from experiments.curation.debian_pages import LANGUAGES
from llama3_jax.curation.config import curation_config
from llama3_jax.curation.gopher import GopherConfig, Rules

REFERENCE = ("code", "math")
USUAL = [override.model_dump() for override in GopherConfig().overrides]
# A reference names the same things over and over.
TWICE = {
    name: 2 * limit
    for name, limit in Rules().model_dump().items()
    if name.startswith("max_dup_") and name.endswith("gram") or name.startswith("max_top_")
}


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
            # Code and formulas hide the language.
            languages=dict(exempt_sources=REFERENCE),
            # Translations hold many pages in English: those of the other sources are the originals.
            minhash=dict(prefer=("math", "code", "general")),
            lines={},
            gopher=dict(overrides=[*USUAL, dict(sources=REFERENCE, rules=TWICE)]),
            divergence=dict(exempt_sources=REFERENCE),
            safety={},
            # Addresses in a handbook are examples; a section's number looks like an IP address.
            pii=dict(most=None, exempt_sources=REFERENCE),
        ),
    )
