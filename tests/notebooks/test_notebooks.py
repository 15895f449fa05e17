"""The notebooks run from their first cell to their last in a fresh kernel, and say what they should."""

import nbclient
import nbformat
import pytest
from conftest import REPOSITORY

# What the outputs must hold: what a notebook is there to show.
SAID = {
    "model": (
        "in all others: 0.0",
        "in 2 x CP chunks: the busiest rank over the mean 1.000",
        "attention weights [layer, row, head, query, key]: (2, 1, 4, 18, 18)",
        "ten steps of fine-tuning lower the loss: True",
    ),
    "training": (
        "on the mesh {'data': 2, 'pipe': 2, 'context': 2, 'tensor': 1}",
        "attention/logits",
        "as the trainer's, which stayed on eight data ranks: True",
    ),
    "curation": (
        "v = \\frac{s}{t}",
        "kept 25, no_text 5",
        "minhash_near_duplicate 5",
        "extract: REJECTED, no_text",
    ),
    "scaling_laws": ("over all methods and their intervals", "back-test", "interval becomes"),
    "long_context": ("7 tokens apart at the start 0.810400, and at 1,000 0.810400", "depth 1.0:"),
    "planning": ("temporary", " fit\n", "rank 3"),
}


def test_all_notebooks_are_listed():
    assert {path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb")} == set(SAID)


# The model and the training loop are what readers change first; the others take minutes.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("scaling_laws", "planning") else ())
        for n in SAID
    ],
)
def test_a_notebook_runs(name):
    path = REPOSITORY / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    for text in SAID[name]:
        assert text in printed
