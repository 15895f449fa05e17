"""The GPU benchmarks' logic, as far as it needs no GPU."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from experiments.benchmarks import (
    check_kernels,
    float64,
    gpu,
    h100,
    kernel_speed,
    kernels_attention,
    kernels_loss,
    kernels_pointwise,
    planner_constants,
    step_h100,
    tune_kernels,
)
from llama3_jax.errors import UserError
from llama3_jax.kernels.gpu import tuning
from llama3_jax.kernels.gpu.catalogue import entry
from llama3_jax.kernels.gpu.compile import compile_for_hopper
from llama3_jax.model.definition import define
from llama3_jax.planning.constants import load_constants
from tests.conftest import REPOSITORY


def run(module: str, *arguments: str, cache) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", f"experiments.benchmarks.{module}", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=300
    )


MEASURING = ["check_kernels", "kernel_speed", "tune_kernels", "step_h100"]


@pytest.mark.parametrize("module", MEASURING)
def test_without_a_gpu_one_line_says_so(module, tmp_path):
    done = run(module, cache=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: this measures an NVIDIA GPU, and jax finds none")


@pytest.mark.slow
def test_compile_only_prints_what_a_kernel_takes(tmp_path):
    done = run("kernel_speed", "--compile_only", "--kernel=flash_forward", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sizes not yet measured" in done.stdout or "sizes measured on" in done.stdout
    assert done.stdout.count("flash_forward: ") == 4 and " NO " not in done.stdout


def test_the_loss_takes_under_a_tenth_of_xlas_memory(tmp_path):
    done = run("loss_memory", "--tokens=8192", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("│ \n").split("│") for line in done.stdout.splitlines() if "│" in line]
    share = {(row[0].strip(), row[1].strip()): float(row[3]) for row in rows}
    assert len(share) == 6 and share["bfloat16", "XLA"] == 1
    assert share["bfloat16", "ours"] < 0.1


def test_documents_fill_rows_and_their_pairs_are_counted():
    random = np.random.default_rng()
    lengths = gpu.document_lengths(50_000, 1536, random)
    assert sum(lengths) == 50_000 and min(lengths) > 0
    long = [np.mean(gpu.document_lengths(10**6, 1536, random)) for _ in range(3)]
    assert 1200 < np.mean(long) < 1900
    lengths = [1, 5, 3]
    segments = np.repeat([0, 1, 2], lengths)
    seen = (segments[:, None] == segments) & np.tri(9, dtype=bool)
    assert gpu.pairs_of(lengths) == seen.sum()


@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.setattr(gpu, "_rehearsing", True)


def test_no_benchmark_hides_a_package_from_what_it_imports():
    # A file that is started has its folder first on the path; transformers looks for `kernels`.
    names = {path.stem for path in Path(gpu.__file__).parent.glob("*.py")}
    packages = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), "kernels"}
    assert not names & packages


def test_cases_and_their_operations():
    one, mixed = kernels_attention.attention_cases([8192])
    assert one.documents == (8192,) and mixed.length == 8192 and len(mixed.documents) > 1
    pairs = 8192 * 8193 // 2
    assert one.work(gpu.FORWARD) == 2 * 2 * pairs * one.heads * one.head_dim
    assert one.work(gpu.BOTH) == 3.5 * one.work(gpu.FORWARD)
    assert mixed.work(gpu.BOTH) < one.work(gpu.BOTH) / 2
    places = mixed.places()
    assert (np.bincount(np.asarray(places.segments[0]))[1:] == mixed.documents).all()
    whole, half, wide = kernels_loss.LOSS_CASES
    assert whole.work(gpu.FORWARD) == 2 * 8192 * 4096 * 128_256
    assert 0.45 < half.work(gpu.BOTH) / whole.work(gpu.BOTH) < 0.55
    assert wide.work(gpu.FORWARD) == 2 * 32_768 * 2560 * 128_256


def test_ceilings_are_those_of_random_numbers(rehearsal, monkeypatch):
    # Of constant numbers a product draws less power and runs faster.
    def results(implementations):
        for implementation in implementations:
            assert len(np.unique(np.asarray(implementation.start(), np.float32))) > 100
        return dict(product=[1.0], copy=[1.0])

    monkeypatch.setattr(gpu, "seconds", results)
    assert gpu.ceilings()["tflops"] > 0


def test_bytes_of_pointwise_operations():
    rows, width = 2 * 8, kernels_pointwise.DIM
    norm, residual, rope, swiglu = kernels_pointwise.operations(batch=2, length=8)
    assert norm.work(gpu.FORWARD) == 2 * (2 * rows * width) + 4 * width
    assert residual.work(gpu.FORWARD) == 2 * (4 * rows * width) + 4 * width
    heads = (
        rows * (kernels_pointwise.HEADS + kernels_pointwise.KV_HEADS) * kernels_pointwise.HEAD_DIM
    )
    assert rope.work(gpu.FORWARD) == 2 * 2 * heads + 4 * rows * kernels_pointwise.HEAD_DIM
    # Gate and up read twice, the result, its cotangent, two gradients.
    assert swiglu.work(gpu.BOTH) == 2 * 8 * rows * kernels_pointwise.FFN


@pytest.mark.parametrize("operation", kernels_pointwise.operations(1, 4), ids=lambda o: o.operation)
def test_pointwise_operations_give_results_and_gradients(operation):
    inputs = operation.arrays()
    out, gradients = operation.function("reference", gpu.BOTH)(*inputs)
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), (out, gradients)))
    wanted = inputs[: operation.differentiated]
    assert [g.shape for g in gradients] == [x.shape for x in wanted]


def test_ratios_are_taken_within_a_round():
    taken = {"ours": [1.0, 2.0, 4.0], "other": [2.0, 4.0, 8.0]}
    case = kernels_loss.LossCase(1.0)
    ours, other = kernel_speed.rows_of(case, gpu.BOTH, taken, dict(tflops=8.0), {"other": 5})
    assert (ours["ours_over_it"], other["ours_over_it"]) == (1.0, 2.0)
    tflops = case.work(gpu.BOTH) / 2 / 1e12
    assert ours["rate"] == pytest.approx(tflops) and ours["unit"] == "TFLOP/s"
    assert ours["share"] == pytest.approx(tflops / 8)
    assert (ours["temporary_bytes"], other["temporary_bytes"]) == (None, 5)
    (row, _) = kernel_speed.rows_of(
        kernels_pointwise.operations()[0], gpu.BOTH, taken, dict(gb_per_s=1e3), {}
    )
    assert row["unit"] == "GB/s" and row["share"] == pytest.approx(row["rate"] / 1e3)


def of(name: str, *values) -> gpu.Implementation:
    return gpu.Implementation(name, lambda: np.float32(values), lambda _: None)


def test_what_does_not_agree_is_left_out_and_named():
    ours, same, other = of("ours", 1, 2), of("XLA", 1.01, 2), of("cuDNN", 1, 2.2)
    nan, silent = of("torch", 1, np.nan), of("SDPA", 5, 5)._replace(results=None)
    able, failed = gpu.agreeing([ours, same, other, nan, silent], 0.03)
    assert able == [ours, same, silent]
    assert failed == {
        "cuDNN": "differs by 0.1 of the largest value", "torch": "differs by nan of the largest value",
    }  # fmt: skip
    with pytest.raises(UserError, match="ours: nothing agrees with it; cuDNN differs by 0.1"):
        gpu.agreeing([ours, other, silent], 0.03)
    with pytest.raises(UserError, match="nothing to compare"):
        gpu.agreeing([ours, silent], 0.03)
    assert gpu.agreeing([ours, other], 0.03, least=1)[0] == [ours]


@pytest.mark.parametrize("number", [0, 1], ids=["one document", "documents"])
def test_attention_in_xla_is_the_definition(number, rehearsal):
    case = kernels_attention.attention_cases()[number].toy()
    arrays = jax.random.normal(jax.random.key(0), (3, 1, case.length, 2, 16), np.float32)
    with jax.enable_x64(True):
        places = case.places()
        exact = float64.attention(*map(np.float64, arrays), places, places)
    np.testing.assert_allclose(kernels_attention._xla(*arrays, places), exact, atol=1e-5)


def test_one_that_fails_stops_no_other_and_ours_must_run():
    def fails():
        raise NotImplementedError("no such mask")

    ours, bad = of("ours", 1), gpu.Implementation("cuDNN", fails)
    assert gpu.running([ours, bad]) == ([ours], {"cuDNN": "NotImplementedError: no such mask"})
    with pytest.raises(NotImplementedError):
        gpu.running([bad, ours])


def test_a_kernel_that_is_wrong_is_found(rehearsal):
    random = np.random.default_rng()
    heads = 2, 1, 16
    problem = check_kernels.attention_problem(random, "documents", "float32", heads, [9, 30, -5], 1)

    def right(how, *arguments):
        return problem.compute("reference", *arguments)

    ours, plain = check_kernels.errors(problem._replace(compute=right), 0)
    assert ours == plain < 1e-5

    def broken(how, q, k, v, *data):
        return problem.compute("reference", q, k, v * (1.001 if how == "triton" else 1), *data)

    row = check_kernels.check(problem._replace(compute=broken), 0)
    assert not row["right"] and row["error"] > 2 * row["plain_error"]

    @jax.custom_vjp
    def no_gradient(v):
        return v

    no_gradient.defvjp(lambda v: (v, None), lambda _, g: (g * np.nan,))

    def lost(how, q, k, v, *data):
        return problem.compute("reference", q, k, no_gradient(v) if how == "triton" else v, *data)

    row = check_kernels.check(problem._replace(compute=lost), 0)
    assert np.isnan(row["error"]) and row["plain_error"] < 1e-5 and not row["right"]


def test_that_cudnn_fails_is_told_and_fails_nothing(rehearsal):
    # There is none here, so that it fails is what is seen.
    problem = check_kernels.packed_problem(np.random.default_rng(), (2, 1, 16))
    row = check_kernels.check(problem, 0)
    assert row["implementation"] == check_kernels.PACKED and not row["right"] and row["why"]
    # What it is held against is the definition, here by the plain implementation's hand.
    plain = problem._replace(implementation=check_kernels.PLAIN)
    ours, same = check_kernels.errors(plain._replace(dtype="float32"), 0)
    assert ours == same < 1e-5


def test_the_planner_takes_what_was_measured(tmp_path):
    def row(
        part, what, flops, milliseconds, case="8,192 tokens, 1 document", implementation="ours"
    ):
        return dict(part=part, what=what, case=case, implementation=implementation, work=flops,
                    milliseconds=milliseconds)  # fmt: skip

    results = dict(
        chip="NVIDIA H100 80GB HBM3", date="2030-01-02T00:00:00", ceilings=dict(gb_per_s=3000.0),
        rehearsal=False,
        results=[
            row("products", gpu.BOTH, 6e12, 10.0), row("products", gpu.BOTH, 2e12, 2.0),
            row("products", gpu.FORWARD, 9e12, 1.0),
            row("attention", gpu.FORWARD, 1e12, 2.0), row("attention", gpu.BOTH, 3.5e12, 7.0),
            row("attention", gpu.FORWARD, 9e12, 1.0, "8,192 tokens, 6 documents"),
            row("attention", gpu.FORWARD, 9e12, 1.0, implementation="cuDNN"),
        ],
    )  # fmt: skip
    path = tmp_path / "kernels_H100.json"
    path.write_text(json.dumps(results))
    done = run("planner_constants", f"--results={tmp_path}", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    constants, peak = load_constants(str(tmp_path / "constants_H100.json")), 989.4e12
    assert constants.gemm_efficiency == pytest.approx(8e12 / 12e-3 / peak)
    assert constants.triton_forward_efficiency == pytest.approx(1e12 / 2e-3 / peak)
    assert constants.triton_backward_efficiency == pytest.approx(2.5e12 / 5e-3 / peak)
    assert constants.memory_bandwidth == 3e12
    assert "measured on NVIDIA H100" in constants.sources["gemm_efficiency"]
    shorter = [row | {"case": "2,048 tokens, 1 document"} for row in results["results"]]
    with pytest.raises(UserError, match="both ways over 8,192 tokens, 1 document"):
        planner_constants.constants_of(results | dict(results=shorter), "x.json")
    with pytest.raises(UserError, match="lacks products"):
        planner_constants.constants_of(results | dict(results=[]), "x.json")
    done = run("planner_constants", f"--results={tmp_path / 'none'}", cache=tmp_path)
    assert done.returncode == 2 and "no kernels_*.json" in done.stderr


def test_nothing_is_timed_of_kernels_whose_check_failed(tmp_path):
    done = run("h100", "--parts=check,loss", f"--results={tmp_path}", cache=tmp_path)
    assert done.returncode == 1
    assert "check: FAILED with 2" in done.stdout
    assert "loss: not begun: the check failed" in done.stdout
    assert "jax finds none" in (tmp_path / "check.log").read_text()
    states = json.loads((tmp_path / "parts.json").read_text())
    assert list(states) == ["check", "loss"]
    done = run("h100", "--parts=chekc", cache=tmp_path)
    assert done.returncode == 2 and "known: check, attention, loss, step" in done.stderr


def test_a_part_is_not_begun_where_less_than_half_its_time_is_left(tmp_path):
    done = run("h100", "--minutes=0.5", f"--results={tmp_path}", "--parts=step", cache=tmp_path)
    assert done.returncode == 1
    assert "step: not begun: 30 s of --minutes=0.5 are left" in done.stdout


def test_a_part_is_ended_with_all_it_started_and_keeps_what_it_wrote(tmp_path):
    # A grandchild in a session of its own, whose parent has ended: as a compiler's workers are.
    program = (
        "import subprocess, sys, time\n"
        'child = \'import subprocess; subprocess.Popen(["sleep", "987"], start_new_session=True)\'\n'
        "subprocess.run([sys.executable, '-c', child])\n"
        "open(sys.argv[1], 'w').write('measured')\n"
        "print('begun', flush=True)\n"
        "time.sleep(987)\n"
    )
    parent = (
        "import ctypes, sys\n"
        "from pathlib import Path\n"
        "from experiments.benchmarks import h100\n"
        "ctypes.CDLL(None).prctl(h100._SUBREAPER, 1, 0, 0, 0)\n"
        "command = [sys.executable, '-c', sys.argv[1], sys.argv[2]]\n"
        "print(h100.run_part(command, Path(sys.argv[3]), float(sys.argv[4])))\n"
        "print(h100.psutil.Process().children())\n"
    )
    written, log = tmp_path / "row", tmp_path / "log"
    command = [sys.executable, "-c", parent, program, written, log, "12"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.stdout.split("\n")[:3] == ["begun", "None", "[]"], done.stderr
    assert written.read_text() == "measured" and log.read_text() == "begun\n"
    assert time.monotonic() - begun < 100
    assert "987" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_what_a_gpu_would_take_is_summed_over_the_processes_of_a_part(tmp_path):
    path = tmp_path / gpu.EXPECTED
    path.write_text('{"processes": 12.0}\n{"processes": 12.0, "steps": 3.5}\n')
    assert gpu.expected_seconds(path) == {"processes": 24.0, "steps": 3.5}
    assert {part for call in h100.CALLS for part in call} == set(h100.PARTS)


def test_a_days_calls_fill_one_file(rehearsal, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "results_folder", lambda: tmp_path)
    assert gpu.saved("kernels") == {}
    first, second = (dict(part="loss", case=case, what="forward", x=1) for case in "ab")
    gpu.save("kernels", dict(results=[first, second]))
    assert gpu.saved("kernels")["results"] == [first, second]
    again = dict(first, x=2)
    assert [kernel_speed.same_case(row, again) for row in (first, second)] == [True, False]
    versions = gpu.about() | dict(versions={"jax": "other"})
    monkeypatch.setattr(gpu, "about", lambda: versions)
    assert gpu.saved("kernels") == {}


@pytest.mark.slow
@pytest.mark.parametrize("part", h100.PARTS)
def test_every_part_can_be_rehearsed_without_a_gpu(part, tmp_path):
    done = run("h100", f"--parts={part}", "--rehearse", f"--results={tmp_path}", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{part}: passed" in done.stdout
    seconds = float(done.stdout.split(f"\n{part}: about ")[1].split()[0])
    assert 0 < seconds < h100.PARTS[part].seconds


@pytest.mark.slow
def test_the_pointwise_kernels_can_be_rehearsed_without_a_gpu(tmp_path):
    done = run("kernel_speed", "--only=pointwise", "--rehearse", cache=tmp_path)
    assert done.returncode == 0, done.stderr


def test_implementations_run_in_an_order_that_alternates():
    started = []
    implementations = [
        gpu.Implementation(name, lambda name=name: started.append(name), lambda _: None)
        for name in ("a", "b")
    ]
    taken = gpu.seconds(implementations, rounds=4, least_seconds=0)
    assert all(len(times) == 4 for times in taken.values())
    assert started[-8:] == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_the_tuned_table_is_written_as_it_is_read():
    assert tune_kernels.as_text(tuning.table()) == tuning.TABLE.read_text(encoding="utf-8")
    assert set(tune_kernels.SHORTLIST) <= set(tuning.table()["kernels"])


def test_the_shortlist_is_short_and_prefetches():
    found = [x for kernel in tune_kernels.SHORTLIST for x in tune_kernels.candidates(kernel)]
    assert len(found) <= 12
    # With two stages a kernel's loop begins by waiting for all that it loads.
    assert all(blocks.num_stages >= 3 for blocks in found)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", tune_kernels.SHORTLIST)
def test_the_shortlist_fits(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for blocks in tune_kernels.candidates(kernel):
        for launch in entry(kernel, tune_kernels.SHORTLIST[kernel][0], blocks).launches:
            assert compile_for_hopper(launch).fits, blocks


@pytest.mark.parametrize("kernel", tune_kernels.SHORTLIST)
def test_tuning_gives_a_kernel_arguments_that_mean_something(kernel, rehearsal):
    row = tune_kernels.SHORTLIST[kernel][0]
    problem = tune_kernels.PROBLEMS[kernel](
        row, tuning.blocks_for(kernel, row), tune_kernels.sizes()
    )
    arrays = tune_kernels.arguments(kernel, problem.shapes)
    assert [(x.shape, x.dtype) for x in arrays] == [(s.shape, s.dtype) for s in problem.shapes]


@pytest.mark.slow
def test_our_step_of_the_whole_model_runs_on_packed_documents(rehearsal):
    config = step_h100.model_config(
        1, dim=16, heads=2, kv_heads=1, head_dim=8, ffn_dim=32, vocab_size=64, dtype="float32"
    )
    batch = step_h100.make_batch(64)
    ends = np.r_[batch["positions"][0, 1:] == 0, True]
    assert len(step_h100.documents()) == ends.sum() > 1
    assert (batch["loss_mask"][0] == ~ends).all()
    compiled, placed, layout, optimizer = step_h100.compiled_step(config)
    assert step_h100.needed_bytes(compiled) > 16 * define(config).parameter_count()
    state = step_h100.init_state(config, optimizer, layout, 0)
    _, metrics = compiled(state, placed, np.float32(1e-3))
    assert float(metrics.loss) == pytest.approx(np.log(64), rel=0.05)


def test_utilisation_by_the_three_accountings():
    mfu = step_h100.utilisation(step_h100.model_config(4), 1.0, 1e15)
    assert 0 < mfu["document"] < mfu["causal"] < mfu["full"] < 1


@pytest.mark.parametrize("remat", ["save_dots", "offload"])
def test_the_step_takes_what_a_config_takes_for_remat(remat, tmp_path):
    done = run("step_h100", f"--remat={remat}", cache=tmp_path)
    assert done.returncode == 2 and "jax finds none" in done.stderr, done.stderr


def test_a_side_that_fails_leaves_the_other_its_figures(rehearsal, monkeypatch, tmp_path, capsys):
    def run_side(side, changes):
        if side == step_h100.TORCH:
            raise UserError("out of memory with 8 layers; try fewer --layers")
        return dict(seconds=[0.5, 0.4], losses=[1.0], peak_bytes=1)

    monkeypatch.setattr(step_h100, "run_side", run_side)
    monkeypatch.setattr(gpu, "has_torch", lambda: True)
    monkeypatch.setattr(gpu, "results_folder", lambda: tmp_path)
    values = flags.FlagValues()
    flags.DEFINE_integer("layers", 8, "", flag_values=values)
    flags.DEFINE_integer("rounds", 2, "", flag_values=values)
    flags.DEFINE_multi_string("variant", [], "", flag_values=values)
    values(["test"])
    monkeypatch.setattr(step_h100, "FLAGS", values)
    with pytest.raises(UserError, match="torch: out of memory with 8 layers"):
        step_h100.measure_sides({})
    saved = gpu.saved("step")
    assert len(saved["runs"]["ours"]) == 2 and saved["runs"]["torch"] == []
    assert "out of memory" in saved["failures"]["torch"]
    assert "450.0" in capsys.readouterr().out
