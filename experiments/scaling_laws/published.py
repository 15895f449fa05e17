"""Published sweeps, read as this package's inputs; the tests and the notebook fit them.

The files are not part of the repository. They are looked for in ../shared/data/scaling beside the
checkout, or in the directory that the environment variable LLAMA3_JAX_SCALING_DATA names:
porian_formll (github.com/formll/resolving-scaling-law-discrepancies, MIT), olmo_ladder
(allenai/OLMo-ladder, Apache-2.0), gadre_overtrain (mlfoundations/scaling, MIT) and regmix
(sail-sg/regmix, MIT).
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.optimize

from llama3_jax.scaling.downstream import Checkpoints, Ladder, Target
from llama3_jax.scaling.mix import MixRuns
from llama3_jax.scaling.mix_tables import read_mix
from llama3_jax.scaling.runs import Runs, make_runs
from llama3_jax.scaling.surface import DELTA, Points, Surface

DIRECTORY = Path(
    os.environ.get(
        "LLAMA3_JAX_SCALING_DATA", Path(__file__).parents[3] / "shared" / "data" / "scaling"
    )
)
PORIAN_SETTING = ("file", "dataset", "hparams", "warmup", "decay", "param_count", "val")


def rows(*path: str) -> list[dict[str, str]]:
    with open(DIRECTORY.joinpath(*path), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def porian() -> Iterator[tuple[str, Runs, dict[str, str]]]:
    """(name, runs, published fit) of the 15 settings of Porian et al. 2024 (arXiv 2406.19146)."""
    runs = rows("porian_formll", "isoflops.csv")
    for fit in rows("porian_formll", "published_fits.csv"):
        own = [r for r in runs if all(r[key] == fit[key] for key in PORIAN_SETTING)]
        columns = {
            name: np.array([float(r[name]) for r in own])
            for name in ("flops", "tokens", "loss", "params")
        }
        yield " ".join(fit[key] for key in PORIAN_SETTING), make_runs(**columns), fit


# ------------------------------------------------------------------------------------- OLMo ladder

OLMO_TARGETS = ("7B-4T", "13B-5T")
OLMO_TASKS = {
    "mmlu_avg_test_5shot": {"mmlu_stem_test": 0.215, "mmlu_humanities_test": 0.335,
                            "mmlu_social_sciences_test": 0.219, "mmlu_other_test": 0.231},
    "hellaswag_val_5shot": {"hellaswag_val": 1.0},
    "arc_challenge_test_5shot": {"arc_challenge_test": 1.0},
    "arc_easy_test_5shot": {"arc_easy_test": 1.0},
    "piqa_val_5shot": {"piqa_val": 1.0},
    "csqa_val_5shot": {"csqa_val": 1.0},
    "socialiqa_val_5shot": {"socialiqa_val": 1.0},
    "openbookqa_test_5shot": {"openbookqa_test": 1.0},
}  # fmt: skip


def olmo(task: str) -> tuple[Ladder, Checkpoints, dict[str, Target]]:
    """A task of the OLMo ladder (Bhagia et al. 2024, arXiv 2412.04403), averaged as its authors do.

    Stage 1 takes each run's mean over its last 5 checkpoints; stage 2 all checkpoints but the
    first tenth of a run, as moving averages of 5.
    """
    columns = OLMO_TASKS[task]

    def averaged(row: dict[str, str], kind: str) -> float:
        return sum(w * float(row[f"{name}_{kind}"]) for name, w in columns.items())

    by_run: dict[str, list[dict[str, str]]] = {}
    for row in rows("olmo_ladder", "ladder_slim.csv"):
        by_run.setdefault(row["run"], []).append(row)
    ladder, pairs, targets = [], [], {}
    for run, own in by_run.items():
        last = own[-1]
        params, tokens = float(last["n_params"]), float(last["tokens"])
        flops = float(last["flops_per_token"]) * tokens
        if last["model"] in OLMO_TARGETS:
            targets[last["model"]] = Target(params, tokens, flops)
        if last["mode"] != "train":
            continue
        nll = np.array([averaged(row, "bpb") for row in own])
        accuracy = np.array([averaged(row, "acc") for row in own])
        ladder.append((run, params, tokens, flops, nll[-5:].mean()))
        skipped = int(np.ceil(0.1 * len(own)))
        smoothed = zip(
            moving_mean(nll[skipped:], 5), moving_mean(accuracy[skipped:], 5), strict=True
        )
        pairs += [(run, x, y) for x, y in smoothed]
    run, *numbers = zip(*ladder, strict=True)
    names, nll, accuracy = zip(*pairs, strict=True)
    return (
        Ladder(run, *map(np.array, numbers)),
        Checkpoints(names, np.array(nll), np.array(accuracy)),
        targets,
    )


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and up to `width` - 1 before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def olmo_predictions() -> dict[str, tuple[float, float]]:
    """(published chained prediction, actual accuracy) of 13B-5T by task."""
    return {row["Task"]: (float(row["Pred"]), float(row["Actual"]))
            for row in rows("olmo_ladder", "published_chained_main.csv")}  # fmt: skip


def one_start_surface(ladder: Ladder) -> tuple[Surface, float]:
    """What one bounded start finds, as published: (surface, summed log-Huber objective).

    The start and the bounds (log A, log B, alpha, beta, E at least 0) are those of the OLMo ladder's
    code.
    """
    n, d, y = np.log(ladder.params), np.log(ladder.tokens), np.log(ladder.nll)

    def objective(p):
        a, b, alpha, beta, E = p
        terms = np.stack([np.exp(a - alpha * n), np.exp(b - beta * d), np.full_like(n, E)])
        total = terms.sum(axis=0)
        residual = np.log(total) - y
        size = np.abs(residual)
        value = np.where(size < DELTA, residual**2 / 2, DELTA * (size - DELTA / 2)).sum()
        slope = np.clip(residual, -DELTA, DELTA) / total
        gradient = [slope @ terms[0], slope @ terms[1], -slope @ (terms[0] * n),
                    -slope @ (terms[1] * d), slope.sum()]  # fmt: skip
        return value, np.array(gradient)

    found = scipy.optimize.minimize(
        objective, [3.0, 6.0, 0.1, 0.2, 1.0], jac=True, method="L-BFGS-B", bounds=[(0, None)] * 5,
        options=dict(ftol=0.0, gtol=1e-10, maxiter=1_000_000, maxfun=1_000_000),
    )  # fmt: skip
    a, b, alpha, beta, E = found.x
    return Surface(E=E, A=np.exp(a), B=np.exp(b), alpha=alpha, beta=beta), found.fun


# ------------------------------------------------------------------------- Gadre et al., over-training

# Their five fitting runs (arXiv 2403.08540, section 3): four sizes at 20 tokens a parameter, and
# the smallest one 16 times as long.
GADRE_FIT = (
    ("d=96_l=8_h=4", "1"), ("d=512_l=8_h=4", "1"), ("d=576_l=24_h=8", "1"),
    ("d=1024_l=24_h=8", "1"), ("d=96_l=8_h=4", "16"),
)  # fmt: skip
# By training set: the 1.4B models and the 6.9B one, with their multiple of 20 tokens a parameter.
GADRE_TARGETS = {
    "rpj": (("open_lm_1b", "32"), ("open_lm_7b", "1")),
    "c4_original": (("open_lm_1b", "4"), ("open_lm_7b", "1")),
    "rw_original": (("open_lm_1b", "16"), ("open_lm_7b", "1")),
}


def gadre(dataset: str, loss: str = "loss_c4_val") -> tuple[Points, dict[str, tuple]]:
    """The five small runs of a training set, and (params, tokens, loss) of each target."""
    models = {
        (row["name"].removeprefix(f"{dataset}-").rsplit("-", 1)[0], row["mult"]): row
        for row in rows("gadre_overtrain", "models.csv")
        if row["dataset"] == dataset
    }
    values = np.array([
        [float(models[key][name]) for name in ("params", "tokens", loss)] for key in GADRE_FIT
    ])  # fmt: skip
    targets = {
        f"{name} x{mult}": tuple(
            float(models[name, mult][column]) for column in ("params", "tokens", loss)
        )
        for name, mult in GADRE_TARGETS[dataset]
    }
    return Points(*values.T, np.ones(len(values))), targets


# --------------------------------------------------------------------------------------------- RegMix

# The target of Liu et al. 2024 (arXiv 2407.01492).
REGMIX_TARGET = "metric/the_pile_pile_cc_val_loss"


def regmix(part: str) -> MixRuns:
    """Mixes and losses: part is "train_1m" or "test_1m", "test_60m", "test_1B"."""
    split, size = part.split("_")
    folder = DIRECTORY / "regmix"
    return read_mix(
        folder / f"{split}_mixture_{size}.csv", folder / f"{split}_pile_loss_{size}.csv"
    )
