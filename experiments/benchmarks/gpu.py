"""What the GPU benchmarks share: the chip's ceilings, timing in interleaved rounds, results on disk.

Set `XLA_PYTHON_CLIENT_PREALLOCATE=false` before jax is imported where torch runs in the same process.
"""

import datetime
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama3_jax.errors import UserError
from llama3_jax.files import write_json

RESULTS = Path(__file__).with_name("results")
_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "torch", "nvidia-cudnn-cu13", "flax")


def require_gpu(instead: str) -> None:
    """
    Raises:
      UserError: jax finds no GPU; `instead` says what works without one.
    """
    if jax.default_backend() != "gpu":
        raise UserError(
            f"this measures an NVIDIA GPU, and jax finds none (it runs on "
            f"{jax.default_backend()}); {instead}"
        )


class Contender(NamedTuple):
    """`start` puts one run on the device's queue, `wait` blocks until it is through."""

    name: str
    start: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready


def has_torch() -> bool:
    """Whether torch is here and sees a GPU."""
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def torch_contender(name: str, start: Callable[[], Any]) -> Contender:
    import torch

    return Contender(name, start, lambda _: torch.cuda.synchronize())


def seconds(
    contenders: list[Contender], rounds: int = 7, least_seconds: float = 0.05
) -> dict[str, list[float]]:
    """Seconds of one run of each contender, once a round, in an order that alternates.

    Each figure is of as many runs in a row as fill `least_seconds`.
    """

    def run(contender: Contender, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            result = contender.start()
        contender.wait(result)
        return (time.perf_counter() - start) / times

    times = {}
    for contender in contenders:
        run(contender, 2)  # compiles
        times[contender.name] = max(1, int(least_seconds / run(contender, 2)))
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders if number % 2 else reversed(contenders):
            taken[contender.name].append(run(contender, times[contender.name]))
    return taken


def ceilings() -> dict[str, float]:
    """What this chip does at most: TFLOP/s of an 8192^3 bfloat16 product, GB/s of a copy."""
    size = 8192
    x = jnp.ones((size, size), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    big = jnp.ones(2**29, jnp.bfloat16)
    taken = seconds(
        [Contender("product", lambda: product(x, x)), Contender("copy", lambda: copy(big))]
    )
    return dict(
        tflops=2 * size**3 / min(taken["product"]) / 1e12,
        gb_per_s=2 * big.nbytes / min(taken["copy"]) / 1e9,
    )


def document_lengths(length: int, mean: int, random: np.random.Generator) -> list[int]:
    """Log-normal document lengths that fill a row exactly."""
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        drawn = max(1, int(random.lognormal(np.log(mean) - 0.5, 1.0)))
        lengths.append(min(drawn, left))
    return lengths


def pairs_of(lengths: list[int]) -> int:
    """(query, key) pairs that a causal document mask lets through."""
    return sum(n * (n + 1) // 2 for n in lengths)


def about() -> dict[str, Any]:
    """Date, chip and versions."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        chip=jax.devices()[0].device_kind,
        python=sys.version.split()[0],
        versions=versions,
    )


def save(name: str, results: dict[str, Any]) -> Path:
    """Writes results/NAME_CHIP_DATE.json."""
    header = about()
    chip = "".join(c if c.isalnum() else "-" for c in header["chip"]).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{chip}_{header['date'][:10]}.json"
    write_json(path, header | results)
    return path
