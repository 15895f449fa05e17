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

from llama3_jax.scaling.runs import Runs, make_runs

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
