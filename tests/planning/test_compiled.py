"""The closed forms against XLA's GPU compiler, on this machine."""

import json
import os
import subprocess
import sys

import jax
import pytest
from conftest import REPOSITORY

from llama3_jax.planning.memory import forecast
from llama3_jax.planning.traffic import in_step
from tests.planning.compile_cases import CASES

QUICK = ("zero3", "all four")
BY_NAME = {case.name: case for case in CASES}


def compiled(names) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.compile_cases", *names],
        capture_output=True, text=True, cwd=REPOSITORY, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick() -> dict:
    return compiled(QUICK)


def check(name: str, result: dict) -> None:
    case = BY_NAME[name]
    memory = forecast(case)
    assert memory.parameters + memory.optimizer == pytest.approx(result["arguments"], rel=0.01)
    # One small case takes JAX 0.12's XLA 5% less than 0.10's: 7% above became 13%.
    newer = jax.version.__version_info__ >= (0, 12) and name == "zero3 again"
    assert memory.total == pytest.approx(result["peak"], rel=0.14 if newer else 0.1)
    expected = in_step(case)
    seen = {(kind, tuple(axes)): n for kind, axes, _, n in result["bytes"] if n > 1e6}
    assert set(seen) == {key for key, n in expected.items() if n > 1e6}
    for key, received in seen.items():
        assert received == pytest.approx(expected[key], rel=0.01), key


@pytest.mark.parametrize("name", QUICK)
def test_memory_and_traffic_are_those_of_the_compiled_step(quick, name):
    check(name, quick[name])


def test_links_are_those_that_the_groups_span(quick):
    links = {(tuple(axes), link) for _, axes, link, n in quick["all four"]["bytes"] if n > 1e6}
    assert (("tensor",), "NVLink") in links and (("data", "context"), "network") in links


def test_most_of_what_fsdp_sends_has_products_under_it(quick):
    overlap = quick["zero3"]["overlap"]
    assert overlap["all_gather"]["data"] > 0.7 and overlap["reduce_scatter"]["data"] > 0.7


@pytest.mark.slow
def test_the_other_cases():
    results = compiled([name for name in BY_NAME if name not in QUICK])
    for name, result in results.items():
        check(name, result)
    assert results["kernels"]["kernels"] > 5 and results["zero3 again"]["kernels"] == 0


def planned(config: str, folder) -> dict:
    """A stage as the program compiles it."""
    target = folder / "plan.json"
    done = subprocess.run(
        [sys.executable, "-m", "llama3_jax.plan", f"--json={target}",
         f"--config=experiments/production/{config}"],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text())["stages"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", ["llama3_8b.py:all_kernels", "llama3_70b.py", "llama3_405b.py:8k_8192",
               "llama3_405b.py:8k_16384"],
)  # fmt: skip
def test_production_layouts_fit_as_forecast(tmp_path, config):
    stage = planned(config, tmp_path)
    assert stage["fits"]
    peak = stage["memory_compiled"]["peak"]
    assert stage["memory_forecast"]["total"] == pytest.approx(peak, rel=0.1)
    assert stage["memory_compiled"]["compile_process_bytes"] < 12e9
    axes = "tensor" if stage["mesh"]["tensor"] > 1 else "data"
    gathers, sums = (stage["overlap"][kind][axes] for kind in ("all_gather", "reduce_scatter"))
    least = (0.65, 0.65) if axes == "tensor" else (0.75, 0.80)
    assert gathers >= least[0] and sums >= least[1]
    if config.endswith("8k_16384"):  # an exchange in each tick that carries something, and no other
        (permutes,) = (c for c in stage["collectives"] if c["kind"] == "collective-permute")
        assert permutes["times"] == 286


@pytest.fixture(scope="module")
def long_context(tmp_path_factory) -> dict:
    """The paper's step of 131,072 tokens a row on 16,384 H100s."""
    return planned("llama3_405b.py:128k_16384", tmp_path_factory.mktemp("plan"))


@pytest.mark.slow
def test_keys_and_values_are_gathered_and_queries_are_not(long_context):
    found = {(c["kind"], *c["axes"]): c for c in long_context["collectives"]}
    assert not any(kind == "all-to-all" for kind, *_ in found)
    gathers = found["all-gather", "context"]
    # One KV head of 128 a tensor rank, and the integers that say where the keys are; a rank's 16
    # query heads would be 2,048 wide.
    shapes = {tuple(shape) for shape in gathers["shapes"]}
    assert shapes == {("bf16", 131_072, 128), ("s32", 131_072)}
    assert gathers["link"] == "network"
    case = long_context
    passes = case["micro_batches"] * 126 / 16
    assert gathers["bytes"] == pytest.approx(4 * passes * 131_072 * 128 * 2 * 15 / 16, rel=0.02)


@pytest.mark.slow
def test_sites_of_each_collective_are_as_many_as_were_written(long_context):
    """An upgrade that gathers twice, or keeps apart what was one, is seen here."""
    sites = {(c["kind"], *c["axes"]): c["sites"] for c in long_context["collectives"]}
    # In four pieces a layer gathers 2 x 4 times forward, 4 x 4 backward (half of them again, for the
    # products' gradients), and reduces 2 x 4 times in each. Two of the pipeline's three loops have a
    # forward, two a backward; embedding and head add four of each.
    assert sites["all-gather", "tensor"] == 52
    assert sites["reduce-scatter", "tensor"] == 36
    # Nine kinds of weight, gathered once a step (Llama 3 paper, section 3.3.2: kept).
    assert sites["all-gather", "data", "context"] == 9
    assert sites["collective-permute", "pipe"] == 4
    weights = next(
        c for c in long_context["collectives"]
        if c["kind"] == "all-gather" and c["axes"] == ["data", "context"]
    )  # fmt: skip
    assert weights["times"] == 9


def test_the_long_context_step_fits(long_context):
    assert long_context["fits"]
    assert long_context["memory_compiled"]["compile_process_bytes"] < 12e9
    forecast_total = long_context["memory_forecast"]["total"]
    assert forecast_total == pytest.approx(long_context["memory_compiled"]["peak"], rel=0.1)
