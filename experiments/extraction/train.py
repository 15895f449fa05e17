"""Trains the extractor's classifier of blocks on the tuning part of the pages.

    python -m experiments.extraction.train --pages=../shared/data/html

Needs the extra `extraction-training`. Labels come from aligning a page's words with its true
content: longest common subsequence, and three-word shingles where a block is long enough. With
--folds=3 prints F1 by cross-validation over pages first. Writes llama3_jax/curation/page/extractor.npz
(or --out).
The same pages give the same file, byte for byte: one thread, a fixed seed, no time stamp.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from absl import flags
from catboost import CatBoostClassifier
from rapidfuzz.distance import LCSseq
from rich.console import Console
from rich.progress import track
from selectolax.lexbor import LexborHTMLParser

from experiments.extraction import pages as truth
from llama3_jax import cli
from llama3_jax.curation.page import blocks, classifier, encoding, features, metadata
from llama3_jax.files import atomic_path

MAX_BLOCKS = 300  # of a page, taken at random: long pages would take all the time
SETTINGS = {
    "iterations": 300, "depth": 6, "learning_rate": 0.07, "l2_leaf_reg": 8.0, "rsm": 0.2,
    "border_count": 64, "random_seed": 0, "thread_count": 1, "verbose": False,
    "allow_writing_files": False,
}  # fmt: skip

FLAGS = flags.FLAGS
console = Console(soft_wrap=True, highlight=False)


def label(texts: list[list[str]], content: list[str]) -> np.ndarray:
    """The share of each block's words that belong to the content."""
    flat = [word for text in texts for word in text]
    matched = np.zeros(len(flat))
    for tag, start, end, _, _ in LCSseq.opcodes(flat, content):
        if tag == "equal":
            matched[start:end] = 1
    shingles = {tuple(content[i : i + 3]) for i in range(len(content) - 2)}
    labels, at = [], 0
    for text in texts:
        part = matched[at : at + len(text)]
        at += len(text)
        share = part.mean() if len(text) else 0.0
        if len(text) >= 5:
            found = [tuple(text[i : i + 3]) in shingles for i in range(len(text) - 2)]
            share = max(share * np.mean(found) ** 0.5, np.mean(found) if share > 0.3 else 0)
        labels.append(share)
    return np.array(labels)


def examples(page: truth.Page):
    """(features, labels, words) of a page's blocks, or None if it has none."""
    text = encoding.decode(page.html).text
    tree = LexborHTMLParser(text)
    title = metadata.read(tree, text, page.url).title
    found = blocks.read(tree)
    if not found.blocks:
        return None
    tokens = [truth.words(block.text) for block in found.blocks]
    y = label(tokens, truth.words(page.content))
    x = features.of_page(found, title)
    return x, y, np.array([len(token) for token in tokens], float), found


def fit(sets) -> CatBoostClassifier:
    """Each page weighs the same; a block weighs as its words and as its label is clear."""
    rng = np.random.default_rng(0)
    xs, ys, weights = [], [], []
    for x, y, words, _ in sets:
        taken = rng.permutation(len(x))[:MAX_BLOCKS]
        weight = np.sqrt(words[taken] + 0.5)
        xs.append(x[taken])
        ys.append(y[taken])
        weights.append(weight / weight.sum() * np.abs(2 * y[taken] - 1))
    x, y, weight = np.concatenate(xs), np.concatenate(ys), np.concatenate(weights)
    weight *= len(weight) / weight.sum()
    return CatBoostClassifier(**SETTINGS).fit(x, y > 0.5, sample_weight=weight)


def to_arrays(model: CatBoostClassifier) -> dict[str, np.ndarray]:
    """The trees in the arrays of classifier.Forest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.json")
        model.save_model(str(path), format="json")
        saved = json.loads(path.read_text())
    trees = saved["oblivious_trees"]
    depth = max(len(tree["splits"]) for tree in trees)
    feature = np.zeros((len(trees), depth), np.uint8)
    threshold = np.full((len(trees), depth), np.inf, np.float32)  # of levels that ask nothing
    value = np.zeros((len(trees), 1 << depth), np.float32)
    for number, tree in enumerate(trees):
        for level, split in enumerate(tree["splits"]):
            feature[number, level] = split["float_feature_index"]
            threshold[number, level] = split["border"]
        value[number, : len(tree["leaf_values"])] = tree["leaf_values"]
    scale, bias = saved["scale_and_bias"]
    return {
        "feature": feature, "threshold": threshold, "value": value * np.float32(scale),
        "base": np.array(float(np.ravel(bias)[0])),
    }  # fmt: skip


def score(forest: classifier.Forest, page: truth.Page, example) -> float:
    if example is None:
        return truth.word_f1("", page.content)
    kept = classifier.keep(forest.probability(example[0]), example[2])
    texts = [block.text for block, keep in zip(example[3].blocks, kept, strict=True) if keep]
    return truth.word_f1("\n".join(texts), page.content)


def cross_validate(pages: list[truth.Page], sets: list, folds: int) -> None:
    """Prints word F1 of pages that the trees were not trained on, by kind of page."""
    order = np.random.default_rng(0).permutation(len(pages))
    scores = {}
    for fold in track(range(folds), "cross-validating", console=console):
        held = set(order[fold::folds])
        used = [one for i, one in enumerate(sets) if i not in held and one is not None]
        forest = classifier.Forest(to_arrays(fit(used)))
        scores |= {i: score(forest, pages[i], sets[i]) for i in held}
    for kind in [*sorted({page.kind for page in pages}), "all"]:
        part = [scores[i] for i, page in enumerate(pages) if kind in (page.kind, "all")]
        console.print(f"{kind:14} {np.mean(part):.4f} ({len(part)} pages)")


def main(argv) -> None:
    folder = Path(FLAGS.pages) if FLAGS.pages else truth.DATA / "html"
    pages = [page for page in truth.load(folder) if not page.aside]
    sets = [examples(page) for page in track(pages, "aligning", console=console)]
    if FLAGS.folds:
        cross_validate(pages, sets, FLAGS.folds)
    model = fit([one for one in sets if one is not None])
    with atomic_path(Path(FLAGS.out)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **to_arrays(model))


if __name__ == "__main__":
    flags.DEFINE_integer("folds", 0, "Parts of the pages for cross-validation; 0: none.")
    flags.DEFINE_string(
        "pages", None, "Folder with truth.jsonl and pages/; else the shared data's."
    )
    flags.DEFINE_string("out", str(classifier.WEIGHTS), "File that takes the trees.")
    cli.run(main)
