"""The trees against a plain reading of their arrays, the cut against all cuts, and how they are made."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.extraction import pages as truth
from llama3_jax.curation.page import classifier

ROOT = Path(__file__).parents[3]


def plain_probability(arrays, row: np.ndarray) -> float:
    score = float(arrays["base"])
    for features, thresholds, values in zip(
        arrays["feature"], arrays["threshold"], arrays["value"], strict=True
    ):
        leaf = 0
        for level, (feature, threshold) in enumerate(zip(features, thresholds, strict=True)):
            if row[feature] > threshold:
                leaf += 2**level
        score += float(values[leaf])
    return 1 / (1 + np.exp(-score))


def test_probabilities_are_those_of_the_trees():
    with np.load(classifier.WEIGHTS) as file:
        arrays = dict(file)
    rng = np.random.default_rng()
    # Values at, just above and far from the thresholds.
    width = int(arrays["feature"].max()) + 1
    thresholds = arrays["threshold"].reshape(-1)
    rows = rng.choice(thresholds[np.isfinite(thresholds)], (20, width))
    rows = (rows + rng.choice([0, 1e-3, -5, 100], rows.shape)).astype(np.float32)
    found = classifier.Forest(arrays).probability(rows)
    np.testing.assert_allclose(found, [plain_probability(arrays, row) for row in rows], rtol=1e-5)


def test_the_cut_is_the_best_of_all_cuts():
    rng = np.random.default_rng()
    for _ in range(50):
        count = rng.integers(1, 12)
        probability, words = rng.random(count), rng.integers(1, 60, count).astype(float)

        def expected(kept, words=words, probability=probability):
            return 2 * (words * probability)[kept].sum() / (words[kept].sum() + words @ probability)

        cuts = [probability >= one for one in probability]
        best = max(expected(cut) for cut in cuts)
        assert expected(classifier.keep(probability, words)) == pytest.approx(best)


@pytest.mark.slow
def test_training_again_gives_the_same_file(tmp_path):
    """With the versions of constraints.txt, on the pages that the committed trees were made from."""
    pytest.importorskip("catboost", reason="needs the extra extraction-training")
    pytest.importorskip("rapidfuzz", reason="needs the extra extraction-training")
    if not (truth.DATA / "html" / "truth.jsonl").is_file():
        pytest.skip(f"no pages in {truth.DATA / 'html'} (LLAMA3_JAX_DATA)")
    out = tmp_path / "extractor.npz"
    command = [sys.executable, "-m", "experiments.extraction.train", f"--out={out}"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert out.read_bytes() == classifier.WEIGHTS.read_bytes()
