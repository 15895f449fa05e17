"""Every benchmark that has no test of its own runs to its end, at the smallest size that it takes.

Those that measure kernels on a GPU are in test_kernel_benchmarks.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, command_environment

from tests.curation.page.test_extract import PROSE, page

FOLDER = REPOSITORY / "experiments" / "benchmarks"
DATA = REPOSITORY.parent / "shared" / "data"
# Options, and the packages without which it cannot run.
CASES = {
    "faults": (["--only=kill", "--kills=1", "--seed=0", "--json={out}"], []),
    "hostile_pages": (["--count=40"], []),
    "fsdp_layouts": ([], []),
    "hostile_run": (["--scale=0.01", "--ordinary=5"], []),
    "near_duplicates": (["--pairs=50", "--templates=95", "--edits=4"], []),
    "loader": (["--seconds=0.1", "--repeats=2", "--documents=2000",
                "--step_tokens_per_second=1000", "--json={out}"], []),
    "pipeline": (["--micro_batches=8", "--layer_ms=1", "--rounds=2", "--json={out}"], []),
    "scaling_fit": (["--fits=64", "--points=60", "--scipy_fits=4", "--json={out}"], []),
    "table4": (["--json={out}"], ["jax_plugins"]),
    "tokenizer": (["--text={folder}", "--rounds=1", "--workers=1", "--seconds=0.1",
                   "--json={out}"], ["llama_models", "django"]),
    "train_step": (["--shapes=1.8M", "--rounds=2", "--json={out}"], ["torch", "transformers"]),
    "extraction": (["--json={out}"], ["trafilatura", "resiliparse"]),
    "curation": (["--docs={docs}", "--work={folder}", "--documents=20", "--families=4",
                  "--rounds=1"], []),
}  # fmt: skip


def test_every_benchmark_is_run_by_some_test():
    elsewhere = (REPOSITORY / "tests/experiments/test_kernel_benchmarks.py").read_text()
    programs = {path.stem for path in FOLDER.glob("*.py") if "cli.run(main)" in path.read_text()}
    assert len(programs) > 10
    assert [name for name in programs - CASES.keys() if name not in elsewhere] == []


@pytest.fixture
def docs(tmp_path) -> Path:
    """Two versions of a package, of few pages each."""
    for version in ("llvm-14-doc", "llvm-15-doc"):
        (tmp_path / "docs" / version).mkdir(parents=True)
        for number in range(12):
            text = f"<p>Page {number} of the manual.</p>" + f"<p>{number} {PROSE}</p>" * 4
            (tmp_path / "docs" / version / f"{number}.html").write_text(page(text))
    return tmp_path / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_runs_at_toy_size(name, docs, tmp_path, compilation_cache):
    options, packages = CASES[name]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if name in ("extraction", "curation") and not (DATA / "html").is_dir():
        pytest.skip("the shared pages are not here")
    (tmp_path / "work").mkdir()
    out = tmp_path / "out.json"
    values = dict(out=out, folder=tmp_path / "work", docs=docs)
    environment = command_environment(compilation_cache) | {"HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.benchmarks.{name}",
         *(option.format(**values) for option in options)],
        cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    if "--json={out}" in options:
        assert json.loads(out.read_text())
