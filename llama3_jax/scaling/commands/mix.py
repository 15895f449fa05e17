"""`fit mix`: from small runs on many mixes to the loss of any mix, and to the best one."""

from pathlib import Path

import numpy as np
from absl import flags

from llama3_jax.errors import UserError
from llama3_jax.scaling.commands.common import (
    between,
    check_outputs,
    console,
    define_output,
    required_path,
    say_warnings,
    table,
    write_result,
)
from llama3_jax.scaling.mix import LAWS, MixLaw, MixRuns, fit_mix, rank_transfer
from llama3_jax.scaling.mix_optimum import epoch_caps, optimum
from llama3_jax.scaling.mix_tables import read_mix

FLAGS = flags.FLAGS
MEAN = "mean"


def define_flags() -> None:
    flags.DEFINE_string("weights", None, "CSV: run, a weight per source, params optional.")
    flags.DEFINE_string("losses", None, "CSV: run, a loss per target.")
    flags.DEFINE_string("test_weights", None, "Mixes of larger models, never fitted.")
    flags.DEFINE_string("test_losses", None, "Their losses: a test of rank transfer.")
    flags.DEFINE_string("target", MEAN, "Target whose loss is minimised, or the mean of all.")
    flags.DEFINE_multi_enum("laws", list(LAWS), tuple(LAWS), "Laws to choose from.")
    flags.DEFINE_list("available", None, "Tokens at hand, as source=tokens,…")
    flags.DEFINE_float("total_tokens", None, "Tokens of the run that the mix is for.")
    flags.DEFINE_float("max_epochs", 4.0, "How often a source may be read.", 0.01)
    flags.DEFINE_list("bounds", [], "Least and greatest weights, as source=0.1:0.5,…")
    flags.DEFINE_float("target_params", None, "Size to predict for, where runs have params.")
    flags.DEFINE_integer("seed", 0, "Seed of folds and random mixes.")
    define_output()


def main() -> None:
    weights = required_path("weights", "a CSV of mixes")
    losses = required_path("losses", "a CSV of losses")
    if bool(FLAGS.test_weights) != bool(FLAGS.test_losses):
        raise UserError("--test_weights and --test_losses belong together")
    tests = [path for path in (FLAGS.test_weights, FLAGS.test_losses) if path]
    check_outputs(weights, losses, *tests)
    runs = read_mix(weights, losses)
    if FLAGS.target not in (*runs.targets, MEAN):
        raise UserError(f"--target {FLAGS.target!r} is unknown; known: mean, "
                        f"{', '.join(runs.targets)}")  # fmt: skip
    low, high = bounds_of(runs.sources)
    law = fit_mix(runs, tuple(dict.fromkeys(FLAGS.laws)), FLAGS.seed)
    params = FLAGS.target_params or float(runs.params.max())
    warnings = []
    if params > runs.params.max() * 1.001:
        if np.ptp(runs.params) == 0:
            raise UserError("--target_params needs runs of several sizes (a column params)")
        warnings.append(f"extrapolation: {params / runs.params.max():.3g} times the largest model")

    def predicted(mixes: np.ndarray) -> np.ndarray:
        found = law.losses(mixes, params)
        if FLAGS.target == MEAN:
            return found.mean(axis=1)
        return found[:, runs.targets.index(FLAGS.target)]

    best, value = optimum(predicted, low, high, law.name != "trees", FLAGS.seed)
    result = {
        "law": law.name,
        "cross_validation": law.cross_validation,
        "target": FLAGS.target,
        "optimum": dict(zip(runs.sources, map(float, best), strict=True)),
        "caps": dict(zip(runs.sources, map(float, high), strict=True)),
        "predicted": value,
        "best_run": float(_targets(runs, FLAGS.target).min()),
        "test": _test(runs, law),
        "warnings": warnings,
    }
    print_result(result)
    write_result(result)


def bounds_of(sources: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest weights by --bounds, --available and --max_epochs.

    Raises:
      UserError: an unknown source or a value that is no number.
    """
    low, high = np.zeros(len(sources)), np.ones(len(sources))
    for name, (least, most) in _named("bounds", sources, 2).items():
        low[sources.index(name)], high[sources.index(name)] = least, most
    if FLAGS.available:
        if not FLAGS.total_tokens:
            raise UserError("--available needs --total_tokens: the tokens of the run")
        given = _named("available", sources, 1)
        tokens = np.array([given.get(name, (np.inf,))[0] for name in sources])
        high = np.minimum(high, epoch_caps(tokens, FLAGS.total_tokens, FLAGS.max_epochs))
    return low, high


def _named(flag: str, sources: tuple[str, ...], count: int) -> dict[str, tuple[float, ...]]:
    found = {}
    for part in FLAGS[flag].value or []:
        name, _, text = part.partition("=")
        if name not in sources:
            raise UserError(f"--{flag}: source {name!r} is unknown; known: {', '.join(sources)}")
        try:
            numbers = tuple(float(v) for v in text.split(":"))
        except ValueError:
            numbers = ()
        if len(numbers) != count or not all(v >= 0 for v in numbers):
            form = "source=number" if count == 1 else "source=least:most"
            raise UserError(f"--{flag}: {part!r} is not {form}")
        found[name] = numbers
    return found


def _targets(runs: MixRuns, target: str) -> np.ndarray:
    if target == MEAN:
        return runs.losses.mean(axis=1)
    return runs.losses[:, runs.targets.index(target)]


def _test(runs: MixRuns, law: MixLaw) -> dict | None:
    """Rank transfer to the test runs; the law is fitted before they are read."""
    if not FLAGS.test_weights:
        return None
    test = read_mix(Path(FLAGS.test_weights), Path(FLAGS.test_losses))
    if test.sources != runs.sources or test.targets != runs.targets:
        raise UserError("the test runs have other sources or targets than the runs")
    found = rank_transfer(law.losses(test.weights, float(test.params.max())), test.losses)
    return {**found, "by_target": dict(zip(runs.targets, found["by_target"], strict=True))}


def print_result(result: dict) -> None:
    shown = table("laws by cross-validation", "law", "unexplained variance", "rank correlation")
    for name, score in result["cross_validation"].items():
        chosen = " (chosen)" if name == result["law"] else ""
        shown.add_row(name + chosen, f"{score['error']:.4f}", f"{score['spearman']:.4f}")
    console.print(shown)
    shown = table(f"best mix for {result['target']}", "source", "weight", "cap")
    for source, weight in result["optimum"].items():
        shown.add_row(source, f"{weight:.4f}", f"{result['caps'][source]:.3f}")
    console.print(shown)
    console.print(f"predicted loss {result['predicted']:.4f}; best of the runs "
                  f"{result['best_run']:.4f}")  # fmt: skip
    if test := result["test"]:
        console.print(f"rank transfer to {test['mixes']} test mixes: mean loss "
                      f"{test['spearman']:.4f} ({between(test['ci'])})")  # fmt: skip
        for name, value in test["by_target"].items():
            console.print(f"  {name}: {value:.4f}", markup=False)
    say_warnings(result["warnings"])
