"""Classifiers of page kinds with their text features, on real code, mathematics and prose."""

import ast
import os
from pathlib import Path

import daft
import pytest

from llama3_jax.curation.fasttext_classifier import FastTextConfig, load_fasttext, train_fasttext
from llama3_jax.curation.labelled import Labelled
from llama3_jax.curation.page_kinds import PageKindsConfig, page_kinds
from llama3_jax.errors import UserError
from llama3_jax.schema import parse


@pytest.fixture(scope="module")
def pages():
    """Examples in docstrings, docstrings of mathematics, and docstrings of neither."""
    found = {"code": [], "math": [], "plain": []}
    library = Path(os.__file__).parent
    for path in sorted(library.glob("[a-g]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                doc = ast.get_docstring(node) or ""
                if 250 < len(doc):
                    found["code" if ">>>" in doc or "\n    " in doc else "plain"].append(doc)
    for index in range(150):
        # Deductions over small equations: the words are few, the numbers all different.
        a, b = index * 7 % 23 + 2, index * 11 % 31 + 1
        found["math"].append(
            f"Suppose that x satisfies {a}x + {b} = {a * 5 + b}. Subtracting {b} from both sides we "
            f"get {a}x = {a * 5}, hence x = 5. It follows that x^2 = 25; therefore $x^2 > {a}$ "
            f"if and only if {a} < 25, which completes the proof of the lemma for n = {index}."
        )
    return found


@pytest.fixture(scope="module")
def models(pages, tmp_path_factory):
    config = FastTextConfig(
        dim=8, pair_buckets=0, epochs=25, holdout=0.3, page_features=True, learning_rate=0.3
    )
    folders = {}
    for kind in ("code", "math"):
        folder = tmp_path_factory.mktemp(kind)
        documents = [
            Labelled(text, "yes" if of == kind else "no") for of, ts in pages.items() for text in ts
        ]
        result = train_fasttext(documents, folder, config)
        assert result.accuracy > 0.85, (kind, str(result))
        folders[kind] = str(folder)
    return folders


def run(texts, config, tmp_path):
    series = daft.Series.from_pylist(texts).cast(daft.DataType.string())
    frame = daft.from_pydict({"doc": [f"{i:032x}" for i in range(len(texts))], "text": series})
    return page_kinds(frame, config, tmp_path).sort("doc").to_pylist()


def test_against_one_page_at_a_time(pages, models, tmp_path):
    texts = [pages[kind][i] for i in range(20) for kind in pages] + [None]
    rows = run(texts, PageKindsConfig(models=models, keep=("math",), threshold=0.6), tmp_path)
    for row, text in zip(rows, texts, strict=True):
        if text is None:
            assert row["reason"] == "page_kinds_failed" and row["page_kinds_code"] is None
            continue
        scores = {}
        for kind, folder in models.items():
            classifier = load_fasttext(Path(folder))
            found = classifier.probabilities([text])[0, classifier.labels.index("yes")]
            assert row[f"page_kinds_{kind}"] == found
            scores[kind] = found
        best = max(scores, key=scores.get)
        kind = best if scores[best] >= 0.6 else ""
        assert row["page_kinds_kind"] == kind
        assert row["reason"] == (None if kind == "math" else "page_kind_not_kept")
    assert {row["page_kinds_kind"] for row in rows} == {"code", "math", ""}
    free = run(texts[:-1], PageKindsConfig(models=models), tmp_path)
    assert {row["reason"] for row in free} == {None}


def test_bad_input(models, tmp_path):
    with pytest.raises(UserError, match="page_kinds.models.code: .*: no classifier here"):
        run(["x"], PageKindsConfig(models={"code": str(tmp_path)}), tmp_path)
    with pytest.raises(UserError, match="models.code: label 'good' is unknown .* has no, yes"):
        run(["x"], PageKindsConfig(models=models, label="good"), tmp_path)
    with pytest.raises(UserError, match="keep: 'stem' is none of a"):
        parse(PageKindsConfig, {"models": {"a": "b"}, "keep": ["stem"]})
    with pytest.raises(UserError, match="models is empty"):
        parse(PageKindsConfig, {"models": {}})
