"""Runs the stages of quality on a runner and writes their rows: `quality_stages.py RUNNER FOLDER`.

FOLDER holds documents/*.parquet, the classifiers fasttext/ and roberta/, and benchmark.jsonl.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"DO_NOT_TRACK": "true", "DAFT_ANALYTICS_ENABLED": "0", "JAX_PLATFORMS": "cpu"}

import daft

from llama3_jax.curation import (
    classes,
    contamination,
    language_quality,
    page_kinds,
    quality_fasttext,
    quality_roberta,
)


def main(runner: str, folder: Path) -> None:
    if runner == "ray":
        import ray

        ray.init(address="local", num_cpus=2, log_to_driver=False)
        daft.set_runner_ray(noop_if_initialized=True)
    models = {kind: str(folder / kind) for kind in ("fasttext", "roberta")}
    benchmark = contamination.Benchmark(path=str(folder / "benchmark.jsonl"))
    stages = (
        (
            quality_fasttext.quality_fasttext,
            quality_fasttext.QualityFastTextConfig(model=models["fasttext"], label="yes"),
        ),
        (
            quality_roberta.quality_roberta,
            quality_roberta.QualityRobertaConfig(model=models["roberta"]),
        ),
        (page_kinds.page_kinds, page_kinds.PageKindsConfig(models=models)),
        (classes.classes, classes.ClassesConfig(model=models["fasttext"], max_share=0.5)),
        (
            language_quality.language_quality,
            language_quality.LanguageQualityConfig(score="score", keep=0.7),
        ),
        (
            contamination.contamination,
            contamination.ContaminationConfig(benchmarks={"exam": benchmark}, ngram=5),
        ),
    )
    found = {}
    for stage, config in stages:
        scratch = folder / f"scratch_{runner}_{stage.__name__}"
        scratch.mkdir()
        frame = daft.read_parquet(str(folder / "documents" / "*.parquet"))
        rows = stage(frame, config, scratch).to_pylist()
        found[stage.__name__] = sorted(rows, key=lambda row: row["doc"])
    (folder / f"{runner}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
