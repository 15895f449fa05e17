"""The demo's curation: pages and text of installed packages to documents.

    make demo
    python -m llama3_jax.curate --config=experiments/demo/curation.py --workdir=runs/demo/curation

The second line needs what `make demo` collects under runs/demo/corpus.
"""

from llama3_jax.curation.config import curation_config
from llama3_jax.curation.gopher import GopherConfig

# Code and formulas hide the language, and repeat lines (imports, brackets) for good reason.
NO_PROSE = ("code", "math")
# Documentation and lists of messages have the same words and signs in many lines.
USUAL = [override.model_dump() for override in GopherConfig().overrides]
LISTS = dict(
    sources=("math", "multilingual"),
    rules=dict.fromkeys(
        ["max_ellipsis_ratio", "max_ellipsis_share", "min_alphabetic_share", "max_top_2gram",
         "max_top_3gram", "max_top_4gram", *(f"max_dup_{n}gram" for n in range(5, 11))]
    ),
)  # fmt: skip


def get_config(directory: str = "runs/demo"):
    folder = f"{directory}/corpus"
    return curation_config(
        inputs=dict(
            general=dict(paths=(f"{folder}/general.warc.gz",)),
            math=dict(paths=(f"{folder}/math.warc.gz",)),
            code=dict(paths=(f"{folder}/code.jsonl",), fields={"language": "lang"}),
            multilingual=dict(paths=(f"{folder}/multilingual.jsonl",), fields={"language": "lang"}),
        ),
        stages=dict(
            extract={},
            urls={},
            url_dedup={},
            languages=dict(exempt_sources=NO_PROSE),
            minhash={},
            lines=dict(exempt_sources=NO_PROSE),
            gopher=dict(overrides=[*USUAL, LISTS]),
            divergence=dict(exempt_sources=NO_PROSE),
            safety={},
            pii={},
        ),
    )
