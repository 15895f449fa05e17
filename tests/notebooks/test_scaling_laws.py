"""The notebook runs from its first cell to its last in a fresh kernel."""

import nbclient
import nbformat
import pytest
from conftest import REPOSITORY


@pytest.mark.slow
def test_the_notebook_runs():
    path = REPOSITORY / "notebooks" / "scaling_laws.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    for text in ("over all methods and their intervals", "back-test", "interval becomes"):
        assert text in printed
