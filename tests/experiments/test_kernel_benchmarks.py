"""The GPU benchmarks' logic, as far as it needs no GPU."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from experiments.benchmarks import (
    check_kernels,
    gpu,
    h100,
    kernels,
    kernels_attention,
    kernels_loss,
    planner_constants,
    pointwise,
    step_h100,
    tune_kernels,
)
from llama3_jax.errors import UserError
from llama3_jax.kernels.gpu import tuning
from llama3_jax.planning.constants import load_constants
from tests.conftest import REPOSITORY


def run(module: str, *arguments: str, cache) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", f"experiments.benchmarks.{module}", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=300
    )


MEASURING = ["check_kernels", "kernels", "pointwise", "tune_kernels", "step_h100"]


@pytest.mark.parametrize("module", MEASURING)
def test_without_a_gpu_one_line_says_so(module, tmp_path):
    done = run(module, cache=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: this measures an NVIDIA GPU, and jax finds none")


@pytest.mark.slow
def test_compile_only_prints_what_a_kernel_takes(tmp_path):
    done = run("kernels", "--compile_only", "--kernel=flash_forward", cache=tmp_path)
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


def test_cases_and_their_operations():
    one, mixed = kernels_attention.attention_cases([8192])
    sizes = kernels_attention.sizes()
    assert one.documents == (8192,) and sum(mixed.documents) == 8192 and len(mixed.documents) > 1
    pairs = 8192 * 8193 // 2
    assert one.flops(kernels.FORWARD) == 2 * 2 * pairs * sizes.heads * sizes.head_dim
    assert one.flops(kernels.BOTH) == 3.5 * one.flops(kernels.FORWARD)
    assert mixed.flops(kernels.BOTH) < one.flops(kernels.BOTH) / 2
    places = mixed.places()
    assert (np.bincount(np.asarray(places.segments[0]))[1:] == mixed.documents).all()
    half, whole = kernels_loss.LossCase(0.5), kernels_loss.LossCase(1.0)
    assert whole.flops(kernels.FORWARD) == 2 * 8192 * 4096 * 128_256
    assert 0.45 < half.flops(kernels.BOTH) / whole.flops(kernels.BOTH) < 0.55


def test_bytes_of_pointwise_operations():
    rows, width = 2 * 8, pointwise.DIM
    norm, residual, rope, swiglu = pointwise.operations(batch=2, length=8)
    assert norm.bytes(pointwise.FORWARD) == 2 * (2 * rows * width) + 4 * width
    assert residual.bytes(pointwise.FORWARD) == 2 * (4 * rows * width) + 4 * width
    heads = rows * (pointwise.HEADS + pointwise.KV_HEADS) * pointwise.HEAD_DIM
    assert rope.bytes(pointwise.FORWARD) == 2 * 2 * heads + 4 * rows * pointwise.HEAD_DIM
    # Gate and up read twice, the result, its cotangent, two gradients.
    assert swiglu.bytes(pointwise.BOTH) == 2 * 8 * rows * pointwise.FFN


@pytest.mark.parametrize("operation", pointwise.operations(1, 4), ids=lambda o: o.name)
def test_pointwise_operations_give_results_and_gradients(operation):
    inputs = operation.arrays()
    out, gradients = operation.function("reference", pointwise.BOTH)(*inputs)
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), (out, gradients)))
    wanted = inputs[: operation.differentiated]
    assert [g.shape for g in gradients] == [x.shape for x in wanted]


def test_ratios_are_taken_within_a_round():
    taken = {"ours": [1.0, 2.0, 4.0], "other": [2.0, 4.0, 8.0]}
    case = kernels_loss.LossCase(1.0)
    ours, other = kernels.rows_of("loss", case, kernels.FORWARD, taken, dict(tflops=8.0))
    assert (ours["ours_over_it"], other["ours_over_it"]) == (1.0, 2.0)
    tflops = case.flops(kernels.FORWARD) / 2 / 1e12
    assert ours["tflops"] == pytest.approx(tflops)
    assert ours["share_of_product"] == pytest.approx(tflops / 8)


@pytest.mark.parametrize("number", [0, 1], ids=["one document", "documents"])
def test_attentions_contenders_agree_and_one_that_does_not_is_named(number, rehearsal):
    case = kernels_attention.attention_cases([64])[number]
    contenders = kernels_attention.attention_contenders(case, kernels.BOTH)
    jax_ones = [c for c in contenders if c.name in ("XLA", "chunked")]
    gpu.compare(jax_ones, 0.03)
    wrong = jax_ones[1]._replace(start=lambda: jax.tree.map(lambda x: 1.1 * x, jax_ones[1].start()))
    with pytest.raises(UserError, match="XLA and chunked differ by 0.1"):
        gpu.compare([jax_ones[0], wrong], 0.03)
    with pytest.raises(UserError, match="nothing to compare"):
        gpu.compare([jax_ones[0], wrong._replace(results=None)], 0.03)


def test_a_peer_that_fails_is_told_and_ours_must_run():
    def fails():
        raise NotImplementedError("no such mask")

    ours, bad = gpu.Contender("ours", lambda: 1, lambda _: None), gpu.Contender("cuDNN", fails)
    assert gpu.running([ours, bad]) == ([ours], {"cuDNN": "NotImplementedError: no such mask"})
    with pytest.raises(NotImplementedError):
        gpu.running([bad, ours])


def test_documents_as_rows_and_back():
    documents = (5, 1, 7)
    x = np.random.default_rng().normal(size=(1, 13, 2, 3))
    rows = kernels_attention.as_rows(x, documents)
    assert rows.shape == (3, 7, 2, 3) and (np.asarray(rows[1, 1:]) == 0).all()
    np.testing.assert_array_equal(kernels_attention.from_rows(rows, documents), np.float32(x))


def test_a_kernel_that_is_wrong_is_found(rehearsal, monkeypatch):
    random = np.random.default_rng()
    problem = check_kernels.attention_problem(random, "documents", "float32", 16, [9, 30, -5], 1)

    def right(how, *inputs):
        return problem.compute("reference", *inputs)

    ours, plain = check_kernels.errors(problem._replace(compute=right), 0)
    assert ours == plain < 1e-5

    def broken(how, q, k, v):
        return problem.compute("reference", q, k, v * (1.001 if how == "triton" else 1))

    ours, plain = check_kernels.errors(problem._replace(compute=broken), 0)
    assert ours > check_kernels.FACTOR * plain + check_kernels.LEAST

    @jax.custom_vjp
    def no_gradient(v):
        return v

    no_gradient.defvjp(lambda v: (v, None), lambda _, g: (g * np.nan,))

    def lost(how, q, k, v):
        return problem.compute("reference", q, k, no_gradient(v) if how == "triton" else v)

    ours, plain = check_kernels.errors(problem._replace(compute=lost), 0)
    assert np.isnan(ours) and plain < 1e-5


def test_the_planner_takes_what_was_measured(tmp_path):
    def row(part, what, flops, milliseconds, case="8,192 tokens, 1 document", contender="ours"):
        return dict(part=part, what=what, case=case, contender=contender, flops=flops,
                    milliseconds=milliseconds)  # fmt: skip

    results = dict(
        chip="NVIDIA H100 80GB HBM3", date="2030-01-02T00:00:00", ceilings=dict(gb_per_s=3000.0),
        rehearsal=False,
        results=[
            row("products", kernels.BOTH, 6e12, 10.0), row("products", kernels.BOTH, 2e12, 2.0),
            row("products", kernels.FORWARD, 9e12, 1.0),
            row("attention", kernels.FORWARD, 1e12, 2.0), row("attention", kernels.BOTH, 3.5e12, 7.0),
            row("attention", kernels.FORWARD, 9e12, 1.0, "8,192 tokens, 6 documents"),
            row("attention", kernels.FORWARD, 9e12, 1.0, contender="cuDNN"),
        ],
    )  # fmt: skip
    path = tmp_path / "kernels_H100.json"
    path.write_text(json.dumps(results))
    done = run("planner_constants", f"--results={tmp_path}", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    constants, peak = load_constants(str(tmp_path / "constants_H100.json")), 989.4e12
    assert constants.gemm_efficiency == pytest.approx(8e12 / 12e-3 / peak)
    assert constants.attention_forward_efficiency == pytest.approx(1e12 / 2e-3 / peak)
    assert constants.attention_backward_efficiency == pytest.approx(2.5e12 / 5e-3 / peak)
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
    done = run("h100", "--parts=check,kernels", cache=tmp_path)
    assert done.returncode == 1
    assert "check: FAILED with 2" in done.stdout
    assert "kernels: not begun: the check failed" in done.stdout
    done = run("h100", "--parts=chekc", cache=tmp_path)
    assert done.returncode == 2 and "known: check, tune, kernels" in done.stderr
    assert set(h100.PARTS) == {"check", "tune", "kernels", "pointwise", "step", "constants"}


def test_a_days_calls_fill_one_file(rehearsal, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "results_folder", lambda: tmp_path)
    assert gpu.saved("kernels") == {}
    first, second = (dict(part="loss", case=case, what="forward", x=1) for case in "ab")
    gpu.save("kernels", dict(results=[first, second]))
    assert gpu.saved("kernels")["results"] == [first, second]
    again = dict(first, x=2)
    assert [kernels.same_case(row, again) for row in (first, second)] == [True, False]
    versions = gpu.about() | dict(versions={"jax": "other"})
    monkeypatch.setattr(gpu, "about", lambda: versions)
    assert gpu.saved("kernels") == {}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["check", "kernels", "pointwise", "step"])
def test_every_part_can_be_rehearsed_without_a_gpu(part, tmp_path):
    done = run("h100", f"--parts={part}", "--rehearse", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{part}: passed" in done.stdout


def test_contenders_run_in_an_order_that_alternates():
    started = []
    contenders = [
        gpu.Contender(name, lambda name=name: started.append(name), lambda _: None)
        for name in ("a", "b")
    ]
    taken = gpu.seconds(contenders, rounds=4, least_seconds=0)
    assert all(len(times) == 4 for times in taken.values())
    assert started[-8:] == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_the_tuned_table_is_written_as_it_is_read():
    assert tune_kernels.as_text(tuning.table()) == tuning.TABLE.read_text(encoding="utf-8")
    assert set(tune_kernels.CANDIDATES) <= set(tuning.table()["kernels"])


@pytest.mark.parametrize("kernel", tune_kernels.CANDIDATES)
def test_tuning_gives_a_kernel_arguments_that_mean_something(kernel, rehearsal):
    row = "bfloat16" if kernel == "cross_entropy" else "64 bfloat16"
    blocks = tuning.blocks_for(kernel, row)
    problem = tune_kernels.PROBLEMS[kernel](row, blocks, tune_kernels.sizes())
    arrays = tune_kernels.arguments(kernel, problem.shapes)
    assert [(x.shape, x.dtype) for x in arrays] == [(s.shape, s.dtype) for s in problem.shapes]


def test_tuning_leaves_out_what_a_compiler_got_wrong(capsys):
    right, wrong = (gpu.Contender(str(x), lambda x=x: np.full(3, x)) for x in (1.0, 1.2))
    assert tune_kernels.right_ones([right, wrong, right]) == [right, right]
    assert "left out: 1.0 and 1.2 differ" in capsys.readouterr().out


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
    assert step_h100.needed_bytes(compiled) > 16 * config.parameter_count()
    state = step_h100.init_state(config, optimizer, layout, 0)
    _, metrics = compiled(state, placed, np.float32(1e-3))
    assert float(metrics.loss) == pytest.approx(np.log(64), rel=0.05)


def test_utilisation_by_the_three_accountings():
    mfu = step_h100.utilisation(step_h100.model_config(4), 1.0, 1e15)
    assert 0 < mfu["document"] < mfu["causal"] < mfu["full"] < 1


def test_as_many_layers_as_fit_both_sides():
    assert [step_h100.most_layers(lambda n, k=k: n <= k) for k in (1, 7, 40)] == [1, 7, 32]
    with pytest.raises(UserError, match="not even one layer"):
        step_h100.most_layers(lambda _: False)
    assert step_h100.layers_of_both(6, lambda side, n: {} if n <= 4 else None) == 4
    with pytest.raises(UserError, match="with one layer"):
        step_h100.layers_of_both(6, lambda side, n: None)
