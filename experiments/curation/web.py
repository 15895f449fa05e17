"""Web archives to documents: the stages that need no trained classifier, at published settings.

    python -m llama3_jax.curate --config=experiments/curation/web.py:crawl --workdir=runs/web

The argument is a folder of .warc.gz files (or of HTML, parquet or JSON lines).
"""

from llama3_jax.curation.config import curation_config


def get_config(folder: str = "crawl"):
    return curation_config(
        inputs={"web": dict(paths=(folder,))},
        stages=dict(
            extract={}, urls={}, url_dedup={}, languages={}, minhash={}, lines={}, c4={},
            gopher={}, divergence={}, safety={}, pii={},
        ),
    )  # fmt: skip
