"""The stages of quality together: on no documents, and the same rows on Ray as in this process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY

from llama3_jax.curation.fasttext_classifier import FastTextConfig, train_fasttext
from llama3_jax.curation.labelled import Labelled
from llama3_jax.curation.roberta_training import RobertaTrainingConfig, train_roberta

GOLDEN = Path(__file__).parent / "golden" / "roberta"


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    words = np.array("the first tokens of a document with it reads in classifier end".split())
    texts = [" ".join(random.choice(words, n)) for n in random.integers(1, 60, 300)]
    labels = ["yes" if "classifier" in text else "no" for text in texts]
    documents = [Labelled(*pair) for pair in zip(texts, labels, strict=True)]
    config = FastTextConfig(dim=4, pair_buckets=0, holdout=0.3)
    train_fasttext(documents, tmp_path / "fasttext", config)
    config = RobertaTrainingConfig(
        base=str(GOLDEN), epochs=1, learning_rate=1e-3, holdout=0.3, max_length=64, dtype="float32"
    )
    train_roberta(documents, tmp_path / "roberta", config)
    rows = {"question": " ".join(texts[0].split()[:9]), "answer": texts[1]}
    (tmp_path / "benchmark.jsonl").write_text(json.dumps(rows) + "\n")
    table = pa.table(
        {
            "doc": [f"{i:032x}" for i in range(len(texts))],
            "text": texts,
            "language": ["en" if i % 3 else "de" for i in range(len(texts))],
            "score": random.random(len(texts)),
        }
    )
    (tmp_path / "documents").mkdir()
    for part in range(4):
        pq.write_table(table.slice(part * 75, 75), tmp_path / "documents" / f"{part}.parquet")
    return tmp_path


def rows_of(folder, runner):
    script = Path(__file__).with_name("quality_stages.py")
    command = [sys.executable, str(script), runner, str(folder)]
    subprocess.run(command, check=True, timeout=900, cwd=REPOSITORY)
    return json.loads((folder / f"{runner}.json").read_text())


@pytest.mark.slow
def test_native_and_ray_give_the_same_rows(folder):
    native, ray = rows_of(folder, "native"), rows_of(folder, "ray")
    assert set(native) == set(ray) and len(native) == 6
    for stage, rows in native.items():
        assert len(rows) == 300
        if stage not in ("quality_roberta", "page_kinds"):
            assert len({row["reason"] for row in rows}) > 1, stage
        if stage in ("quality_roberta", "page_kinds"):
            rows, other = map(without_last_bits, (rows, ray[stage]))
            assert rows == other, stage
        else:
            assert rows == ray[stage], stage


def without_last_bits(rows):
    """A network's products depend in the last bits on which documents are in one batch."""
    return [
        {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]


@pytest.mark.slow
def test_no_documents(folder):
    for path in sorted((folder / "documents").glob("*.parquet")):
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert all(rows == [] for rows in rows_of(folder, "native").values())
