"""What the GPU benchmarks share: the chip's ceilings, timing in interleaved rounds, results on disk.

A GPU is lent by the minute, so each benchmark can be rehearsed without one (`--rehearse`): every line
runs at toy sizes, kernels in Triton's interpreter and torch on the CPU, values are compared, and the
times mean nothing.

Set `XLA_PYTHON_CLIENT_PREALLOCATE=false` before jax is imported where torch runs in the same process.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.kernels.attention import Places

RESULTS = Path(__file__).with_name("results")
_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "torch", "nvidia-cudnn-cu13", "flax")

FORWARD, BOTH = "forward", "forward + backward"
# Results are compared at about this many places along their second axis.
_COMPARED = 4096

# Set by `machine` alone.
_rehearsing = False


def define_flags(results: bool = True) -> None:
    """`results`: the program has some to write."""
    flags.DEFINE_bool(
        "rehearse", False,
        "Without a GPU: run every line at toy sizes, kernels interpreted, torch on the CPU. Times "
        "mean nothing.",
    )  # fmt: skip
    if results:
        flags.DEFINE_string(
            "results", None, "Folder of the results; by default beside the benchmarks, and of a "
            "rehearsal none.",
        )  # fmt: skip


def rehearsing() -> bool:
    return _rehearsing


@contextlib.contextmanager
def machine(instead: str) -> Iterator[None]:
    """What is measured runs inside: on a GPU, or, with --rehearse, on the CPU.

    Raises:
      UserError: jax finds no GPU; `instead` says what else works without one.
    """
    global _rehearsing
    if not flags.FLAGS.rehearse:
        if jax.default_backend() != "gpu":
            raise UserError(
                f"this measures an NVIDIA GPU, and jax finds none (it runs on "
                f"{jax.default_backend()}); without one: --rehearse, or {instead}"
            )
        yield
        return
    if jax.default_backend() == "gpu":
        raise UserError("--rehearse is for machines without a GPU; here is one: leave it out")
    from llama3_jax.kernels.gpu.call import interpreted

    _rehearsing = True
    try:
        with interpreted():
            yield
    finally:
        _rehearsing = False


def results_folder() -> Path | None:
    """Where results are written; None: nowhere, of a rehearsal without a folder of its own."""
    if flags.FLAGS.results:
        return Path(flags.FLAGS.results)
    return None if _rehearsing else RESULTS


class Contender(NamedTuple):
    """`start` puts one run on the device's queue, `wait` blocks until it is through; `results` makes
    of it arrays that equal the other contenders' (None: it computes something else)."""

    name: str
    start: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    results: Callable[[Any], list[Any]] | None = jax.tree.leaves


def has_torch() -> bool:
    """Whether torch is here and sees a GPU (in a rehearsal it needs none)."""
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    return _rehearsing or torch.cuda.is_available()


def say_without_torch() -> None:
    if not has_torch():
        print("torch is not here, or sees no GPU: there will be no figures of it", flush=True)


def torch_device() -> str:
    return "cpu" if _rehearsing else "cuda"


def torch_compile(function: Callable) -> Callable:
    """Compiled; in a rehearsal as it is, for the CPU's compiler lacks FlexAttention's gradient."""
    import torch

    return function if _rehearsing else torch.compile(function)


def torch_contender(name: str, start: Callable[[], Any], results=None) -> Contender:
    import torch

    wait = (lambda _: None) if _rehearsing else (lambda _: torch.cuda.synchronize())
    return Contender(name, start, wait, results)


def running(contenders: list[Contender]) -> tuple[list[Contender], dict[str, str]]:
    """Those that run, and why the others do not: a peer that fails is told, and loses nobody's time.

    The first, ours, must run: what it raises is raised.
    """
    able, failed = [], {}
    for contender in contenders:
        try:
            contender.wait(contender.start())
            able.append(contender)
        except Exception as error:  # each library has its own
            if contender is contenders[0]:
                raise
            failed[contender.name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    return able, failed


def sampled(x: Any) -> Any:
    """What of a large result is brought to the host to be compared."""
    return x[:, :: max(1, x.shape[1] // _COMPARED)] if x.ndim > 1 else x


def compare(contenders: list[Contender], tolerance: float, least: int = 2) -> None:
    """The results of all contenders that have some, against those of the first.

    The largest difference counts, as a share of the first's largest value.

    Raises:
      UserError: they differ by more than the tolerance; or fewer than `least` can be compared.
    """
    able = [contender for contender in contenders if contender.results]
    if len(able) < least:
        raise UserError(f"{contenders[0].name}: nothing to compare its results with")
    kept: list[np.ndarray] = []
    for contender in able:
        result = contender.start()
        contender.wait(result)
        arrays = [np.asarray(x, np.float32) for x in contender.results(result)]
        kept = kept or arrays
        for ours, other in zip(kept, arrays, strict=True):
            error = np.abs(ours - other).max() / max(np.abs(ours).max(), 1e-9)
            if not error <= tolerance:
                raise UserError(
                    f"{able[0].name} and {contender.name} differ by {error:.3g} of the largest value"
                )


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

    if _rehearsing:
        rounds, least_seconds = 2, 0.0
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
    size, length = (64, 2**10) if _rehearsing else (8192, 2**29)
    x = jnp.ones((size, size), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    big = jnp.ones(length, jnp.bfloat16)
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


def places_of(lengths: Sequence[int]) -> Places:
    """One row of documents of these lengths."""
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return Places(jnp.asarray(positions[None], jnp.int32), jnp.asarray(segments[None], jnp.int32))


def pairs_of(lengths: Sequence[int]) -> int:
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


def _path(name: str, header: dict[str, Any]) -> Path | None:
    folder = results_folder()
    chip = "".join(c if c.isalnum() else "-" for c in header["chip"]).strip("-")
    return folder / f"{name}_{chip}_{header['date'][:10]}.json" if folder else None


def save(name: str, results: dict[str, Any]) -> str:
    """Writes NAME_CHIP_DATE.json into the results' folder; returns where, to be printed."""
    header = about()
    path = _path(name, header)
    if path is None:
        return "nowhere: this is a rehearsal"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, header | dict(rehearsal=_rehearsing) | results)
    return str(path)


def saved(name: str) -> dict[str, Any]:
    """What `save` wrote today on this chip with these versions; empty if nothing."""
    header = about()
    path = _path(name, header)
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = found["versions"] == header["versions"] and found["rehearsal"] == _rehearsing
    return found if same else {}
