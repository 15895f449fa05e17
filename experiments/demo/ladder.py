"""The demo's scaling-law ladder: three budgets, five sizes, a few seconds a run, all of them real.

Fitted, they give the size and tokens of the demo's main model and a forecast of its loss, which is
written down before that model trains; the report shows what came of it. FLOPs are counted as
6 x matmul parameters x tokens: at this size most parameters are in the head.
"""

import csv
import html
import io
import json
import math
from pathlib import Path

import numpy as np

from experiments.demo.train import (
    DIM,
    LADDER_LENGTH,
    LAYERS,
    MIX,
    TOKENS,
    VALIDATION_LENGTH,
    VALIDATION_TOKENS,
    corpora,
    main_shape,
    model_config,
)
from llama3_jax.data.validation import validation_batches
from llama3_jax.files import write_json, write_text
from llama3_jax.model.definition import define
from llama3_jax.parallel.mesh import make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.recipe.config import RunConfig, run_config
from llama3_jax.recipe.prepare import Run, prepare
from llama3_jax.reporting.page import Section, Table, plots_html, table_html
from llama3_jax.scaling import isoflop
from llama3_jax.scaling.figures import isoflop_plots
from llama3_jax.scaling.runs import make_runs
from llama3_jax.schema import parse
from llama3_jax.training.metrics import read_metrics
from llama3_jax.training.state import init_state
from llama3_jax.training.step import compile_step, compile_validation

BUDGETS = (6e10, 1.2e11, 2.4e11)
# (layers, dim) of the ladder, and of what the main model may be: runs of seconds end in the steep part
# of training, where the smallest model always looks best, so below (3, 96) it is not believed.
SIZES = ((1, 8), (2, 16), (2, 24), (2, 32), (3, 48))
MAIN_SIZES = ((3, 96), (4, 128), (5, 160), (6, 192))
# What the main model may cost, on a laptop's CPU: 1.3M matmul parameters on 2.4M tokens.
MAIN_FLOPS = 1.9e13
# Whatever the fit says, the main model reads at least and at most so much.
MAIN_TOKENS = (1_200_000, 2_400_000)
BATCH_TOKENS = 512
RUNS_FILE, PLAN_FILE = "runs.csv", "plan.json"
COLUMNS = ("flops", "tokens", "params", "loss", "label")


def run_ladder(result: Path, say) -> None:
    """Trains what is missing of the ladder; its runs end up in result/runs.csv."""
    result.mkdir(exist_ok=True)
    path = result / RUNS_FILE
    rows = _read(path)
    done = {row["label"] for row in rows}
    for layers, dim in SIZES:
        for budget in BUDGETS:
            label = f"{layers}x{dim} {budget:.2g}"
            if label in done:
                continue
            run = prepare(parse(RunConfig, config(str(result.parent), layers, dim, budget)))
            params = define(run.config.model).matmul_parameters()
            loss = mixed(train_small(run))
            rows.append(dict(flops=budget, tokens=run.timeline.tokens, params=params, loss=loss,
                             label=label))  # fmt: skip
            say(f"{label} FLOPs: {params:,} parameters, {run.timeline.tokens:,} tokens, "
                f"held-out loss {loss:.4f}")  # fmt: skip
            write_rows(path, rows)
    write_json(result / PLAN_FILE, plan(rows))


def write_rows(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{**row, **{key: float(row[key]) for key in COLUMNS[:-1]}} for row in rows]


def config(directory: str, layers: int, dim: int, budget: float):
    """A run of the ladder, on the corpora in `directory`."""
    params = define(main_shape(layers, dim)).matmul_parameters()
    steps = max(round(budget / 6 / params / BATCH_TOKENS), 1)
    return small_run(directory, layers, dim, steps)


def small_run(directory: str, layers: int, dim: int, steps: int, mix: dict[str, float] = MIX):
    """A run of seconds on the demo's text."""
    tokens = steps * BATCH_TOKENS
    return run_config(
        seed=0,
        model=model_config(layers, dim),
        data=dict(sources=corpora(directory), packing="best_fit"),
        stages=[
            dict(
                name="ladder", tokens=tokens, length=LADDER_LENGTH, batch_tokens=BATCH_TOKENS,
                mix=mix,
                lr=dict(shape="linear", peak=5e-3 * (128 / dim) ** 0.5, end=0.0,
                        warmup_tokens=tokens // 10),
            )
        ],
        checkpoint=dict(every_steps=steps),
        validation=dict(every_tokens=tokens, tokens=VALIDATION_TOKENS, length=VALIDATION_LENGTH),
    )  # fmt: skip


def train_small(run: Run) -> dict[str, float]:
    """Trains a run of one stage; its held-out loss by source. Nothing of it needs to be kept."""
    config, stage = run.config, run.timeline.stages[0]
    layout = make_mesh(stage.mesh)
    state = init_state(config.model, config.optimizer, layout, config.seed)
    step = compile_step(
        config.model, config.optimizer, layout, stage.micro_batches, len(run.batches.sources)
    )
    for number, batch in enumerate(run.batches.load(0)):
        rate = np.float32(run.timeline.step_learning_rate(number))
        state, _ = step(state, put_batch(batch, layout), rate)
    evaluate = compile_validation(config.model, layout)
    losses = {}
    for name, corpus in run.validation.items():
        sums = np.zeros(2)
        for batch in validation_batches(corpus, VALIDATION_LENGTH, 16, VALIDATION_TOKENS):
            sums += [float(v) for v in evaluate(state.params, put_batch(batch, layout))]
        losses[name] = float(sums[0] / sums[1])
    return losses


def mixed(losses: dict[str, float]) -> float:
    """Held-out loss of the mix: sources by their weight in training."""
    return sum(MIX[name] * losses[name] for name in MIX) / sum(MIX.values())


# ------------------------------------------------------------------------------- fit and forecast


def fit_rows(rows: list[dict]) -> isoflop.IsoflopFit:
    columns = {name: np.array([row[name] for row in rows]) for name in COLUMNS[:-1]}
    runs = make_runs(**columns, label=[row["label"] for row in rows], where="the ladder")
    return isoflop.fit_isoflop(runs, isoflop.Options(MAIN_FLOPS, resamples=400))


def plan(rows: list[dict]) -> dict:
    """Size and tokens of the main model by the fitted surface, and its loss with an interval.

    Where the runs determine no surface, the main model keeps its default size and no loss is
    forecast; the warnings say why.
    """
    fit = fit_rows(rows)
    found = isoflop.result(fit)
    made = {"level": fit.options.level, "spread": found["spread"], "warnings": found["warnings"]}
    if "surface" not in fit.methods:
        shape = dict(layers=LAYERS, dim=DIM, tokens=TOKENS)
        return (
            made
            | shape
            | dict(params=define(main_shape(LAYERS, DIM)).matmul_parameters(), loss=None)
        )
    optimum = found["methods"]["surface"]
    sizes = [(define(main_shape(*size)).matmul_parameters(), size) for size in MAIN_SIZES]
    params, (layers, dim) = min(sizes, key=lambda s: abs(math.log(s[0] / optimum["params"])))
    low, high = MAIN_TOKENS
    tokens = int(min(max(MAIN_FLOPS / 6 / params, low), high))
    surfaces, runs = fit.methods["surface"].surfaces, fit.runs
    losses = surfaces.loss(params, tokens)
    residual = runs.loss / surfaces.rows(0).loss(runs.params, runs.tokens) - 1
    # A run scatters around the surface as the ladder's do.
    drawn = np.random.default_rng(0).choice(residual, len(losses) - 1)
    return made | {
        "layers": layers, "dim": dim, "tokens": tokens, "params": params,
        "wanted_params": optimum["params"], "wanted_tokens": optimum["tokens"],
        "loss": float(losses[0]),
        "loss_ci": isoflop.interval(losses[1:] * (1 + drawn), fit.options.level),
    }  # fmt: skip


def section(workdir: Path, ladder: Path | None = None, plots: bool = True) -> Section:
    """The forecast beside the outcome, and the ladder's plots, for the run's report.

    `ladder` is the directory of the ladder's runs and plan, by default that in `workdir`.
    """
    ladder = ladder or workdir / "ladder"
    rows = _read(ladder / RUNS_FILE)
    made = json.loads((ladder / PLAN_FILE).read_text())
    final = [r for r in read_metrics(workdir) if r["kind"] == "validation"][-1]
    outcome = mixed(final["losses"])
    parts = []
    if made["loss"] is None:
        reasons = html.escape(" ".join(made["warnings"]))
        parts.append(f'<p class="note">The ladder supports no forecast. {reasons}</p>')
    else:
        parts.append(table_html(_forecast_table(made, outcome)))
    decades = math.log10(6 * made["params"] * made["tokens"] / max(BUDGETS))
    parts.append(
        f'<p class="note">From {len(rows)} small runs, fitted before the main model trained, '
        f"{decades:.1f} decades of FLOPs below it. The interval holds the noise of those runs, not "
        "what the main run does differently (longer rows, a batch ramp, an annealing mix) nor "
        "that so small runs end in the first, steep part of training. The main model is the "
        f"nearest of {len(MAIN_SIZES)} shapes, on {MAIN_TOKENS[0]:,} to {MAIN_TOKENS[1]:,} "
        "tokens.</p>"
    )
    if plots:
        parts.append(plots_html("ladder", isoflop_plots(fit_rows(rows))))
    return Section("Scaling laws", "".join(parts))


def _forecast_table(made: dict, outcome: float) -> Table:
    low, high = made["loss_ci"]
    where = "inside" if low <= outcome <= high else "outside"
    spread = made["spread"]
    return Table(
        ["", "forecast", f"{made['level']:.0%} interval", "outcome"],
        [
            ["held-out loss of the mix", f"{made['loss']:.3f}", f"{low:.3f} to {high:.3f}",
             f"{outcome:.3f} ({where})"],
            ["compute-optimal parameters", f"{made['wanted_params']:.3g}",
             f"{spread['params'][0]:.3g} to {spread['params'][1]:.3g} (all methods)",
             f"{made['params']:,} ({made['layers']} layers of {made['dim']})"],
            ["compute-optimal tokens", f"{made['wanted_tokens']:.3g}",
             f"{spread['tokens'][0]:.3g} to {spread['tokens'][1]:.3g} (all methods)",
             f"{made['tokens']:,}"],
        ],
    )  # fmt: skip
