"""Web archives to documents: all stages at their published settings.

    python -m llama3_jax.curate --config=experiments/curation/web.py:crawl --workdir=runs/web

The argument is a folder of .warc.gz files (or of HTML, parquet or JSON lines).
"""

from llama3_jax.curation.config import curation_config


def get_config(folder: str = "crawl"):
    return curation_config(
        inputs={"web": dict(paths=(folder,))},
        stages=dict(extract={}),
    )
