"""One small run on a random mix of our sources, and the mixes of a whole sweep.

    python -m llama3_jax.train --config=experiments/data_mix/proxy.py:17,corpora --workdir=runs/mix/17
    python -m llama3_jax.launch --config=experiments/data_mix/proxy.py:corpora          # all of them
    python -m experiments.data_mix.tables --workdir=runs/mix       # weights.csv, losses.csv
    python -m llama3_jax.fit mix --weights=runs/mix/weights.csv --losses=runs/mix/losses.csv \\
        --available=general=5e12,math=5e11,code=1e12,multilingual=3e12 --total_tokens=1.5e13

Mixes are drawn around the default, Llama 3's 50/25/17/8 (paper, section 3.1.2), spread wide enough
that a law sees each source rare and frequent. A corpus whose name has a class after it, such as
general_arts, is a knowledge class of its source: classes that the web over-represents (arts and
entertainment) start down-sampled by CLASS_FACTORS within their source's weight, and the law may
move them further.
"""

from pathlib import Path

import numpy as np

from llama3_jax.curation.mix import DEFAULT_MIX
from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.recipe.config import run_config

# Weight of a class against its share of the source's corpus.
CLASS_FACTORS = {"arts": 0.5, "entertainment": 0.5}
# Dirichlet draws around the default: the larger, the nearer to it.
CONCENTRATION = 4.0
TOKENS, LENGTH, BATCH = 25_000_000, 1024, 65_536


def sources(corpora: Path) -> dict[str, float]:
    """Default weight of each corpus in a directory, classes down-sampled.

    Raises:
      UserError: a corpus whose source has no default weight.
    """
    names = sorted(p.name for p in corpora.iterdir() if (p / "train").is_dir())
    if not names:
        raise UserError(f"{corpora}: no corpora (directories with train/)")
    weights: dict[str, float] = {}
    for name in names:
        source, _, kind = name.partition("_")
        if source not in DEFAULT_MIX:
            raise UserError(f"{corpora / name}: source {source!r} is none of "
                            f"{', '.join(DEFAULT_MIX)}")  # fmt: skip
        tokens = _tokens(corpora / name) if kind else 1.0
        weights[name] = tokens * CLASS_FACTORS.get(kind, 1.0)
    for source, share in DEFAULT_MIX.items():
        own = [name for name in names if name.partition("_")[0] == source]
        total = sum(weights[name] for name in own)
        for name in own:
            weights[name] *= share / total
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _tokens(corpus: Path) -> float:
    return float(Corpus(corpus / "train").info.tokens)


def mixes(default: dict[str, float], count: int, seed: int = 0) -> list[dict[str, float]]:
    """The default and `count` - 1 mixes drawn around it."""
    rng = np.random.default_rng(seed)
    centre = np.array(list(default.values()))
    drawn = rng.dirichlet(np.maximum(CONCENTRATION * centre, 0.2), count - 1)
    rows = [centre, *drawn]
    return [
        {name: float(w) for name, w in zip(default, row, strict=True)} for row in rows
    ]  # fmt: skip


def sweep(corpora: str = "corpora", count: int = 64) -> list[str]:
    """The arguments that `get_config` takes, one a run."""
    return [f"{index},{corpora}" for index in range(count)]


def get_config(argument: str = "0,corpora"):
    """`argument`: number of the mix, directory of corpora."""
    number, _, directory = argument.partition(",")
    if not number.isdigit():
        raise UserError(f"argument {argument!r}: NUMBER,CORPORA, such as 17,corpora")
    corpora = Path(directory or "corpora")
    if not corpora.is_dir():
        raise UserError(f"argument {argument!r}: there is no directory {corpora}")
    mix = mixes(sources(corpora), int(number) + 1)[-1]
    return run_config(
        seed=0,
        model=dict(
            vocab_size=128_256, dim=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn_dim=896,
        ),
        data=dict(
            sources={
                name: dict(train=f"{corpora}/{name}/train",
                           validation=f"{corpora}/{name}/validation")
                for name in mix
            }
        ),
        stages=[
            dict(name="proxy", tokens=TOKENS, length=LENGTH, batch_tokens=BATCH,
                 mix={name: weight for name, weight in mix.items() if weight > 0},
                 lr=dict(shape="cosine", peak=1e-3, end=1e-4, warmup_tokens=TOKENS // 50)),
        ],
        checkpoint=dict(every_steps=1_000, keep_last=1),
        validation=dict(every_tokens=TOKENS, tokens=1_000_000),
    )  # fmt: skip
