"""A data-mix sweep on the demo's text: small runs on random mixes, for `fit mix`.

    make demo
    python -m experiments.demo.mix                     # runs/demo/mix: weights.csv, losses.csv
    python -m llama3_jax.fit mix --weights=runs/demo/mix/weights.csv \\
        --losses=runs/demo/mix/losses.csv

What experiments/data_mix does at full size, with runs of seconds: each mix trains a 3-layer model of
48 on 300,000 tokens, and a quarter of the mixes is set apart in test_weights.csv and
test_losses.csv, which `fit mix` takes with --test_weights and --test_losses. The same command goes
on where it stopped.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # meant for any machine's CPU; before jax is imported

import json
from pathlib import Path

from absl import flags
from rich.console import Console

from experiments.data_mix.proxy import mixes
from experiments.data_mix.tables import write_table
from experiments.demo.ladder import BATCH_TOKENS, small_run, train_small
from experiments.demo.train import MIX
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.prepare import prepare
from llama3_jax.schema import parse

LAYERS, DIM, TOKENS = 3, 48, 300_000
TEST_SHARE = 0.25

FLAGS = flags.FLAGS


def run_mix(demo: Path, mix: dict[str, float], tokens: int = TOKENS) -> dict[str, float]:
    """Held-out losses of a small run on one mix."""
    mix = {name: weight for name, weight in mix.items() if weight > 1e-4}
    config = small_run(str(demo), LAYERS, DIM, tokens // BATCH_TOKENS, mix)
    return train_small(prepare(parse(RunConfig, config)))


def write_tables(result: Path, rows: list[dict]) -> None:
    """The runs' weights and losses; the last TEST_SHARE of them apart, never to be fitted."""
    cut = len(rows) - int(len(rows) * TEST_SHARE)
    for prefix, part in (("", rows[:cut]), ("test_", rows[cut:])):
        for column in ("weights", "losses"):
            table = [{"run": row["run"]} | row[column] for row in part]
            write_table(result / f"{prefix}{column}.csv", table)


def main(_) -> int:
    demo = Path(FLAGS.workdir)
    if not (demo / "tokens").is_dir():
        raise UserError(f"{demo / 'tokens'}: no tokenised corpora; run `make demo` first")
    result, console = demo / "mix", Console(soft_wrap=True, highlight=False)
    result.mkdir(exist_ok=True)
    rows = []
    for number, mix in enumerate(mixes(MIX, FLAGS.mixes)):
        path = result / f"{number:03}.json"
        if not path.exists():
            write_json(path, dict(run=number, weights=mix, losses=run_mix(demo, mix)))
        rows.append(json.loads(path.read_text()))
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in rows[-1]["losses"].items())
        console.print(f"mix {number}: {losses}")
    write_tables(result, rows)
    console.print(f"{result}: {len(rows)} runs in weights.csv, losses.csv and test_*.csv")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/demo", "Where `make demo` left its corpora.")
    flags.DEFINE_integer("mixes", 32, "Mixes, the first being the demo's own.", lower_bound=8)
    cli.run(main)
