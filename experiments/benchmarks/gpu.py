"""What the GPU benchmarks share: the chip's ceilings, timing in interleaved rounds, results on disk.

A GPU is lent by the minute, so each benchmark can be rehearsed without one (`--rehearse`): every line
runs at toy sizes, kernels in Triton's interpreter and torch on the CPU, and values are compared. Times
mean nothing, but what would take time on a GPU is counted, and `expected_seconds` says how much.

Set `XLA_PYTHON_CLIENT_PREALLOCATE=false` before jax is imported where torch runs in the same process.
"""

import collections
import contextlib
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llama3_jax import xla
from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.kernels.attention import Places
from llama3_jax.xla import XlaConfig

RESULTS = Path(__file__).with_name("results")
CACHE = Path.home() / ".cache" / "llama3_jax" / "benchmarks"
EXPECTED = "expected.jsonl"
_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "torch", "nvidia-cudnn-cu13", "flax")

FORWARD, BOTH = "forward", "forward + backward"
# What a case's work is counted in: the ceiling, its unit, and the work that makes one of it a second.
FLOPS, BYTES = ("tflops", "TFLOP/s", 1e12), ("gb_per_s", "GB/s", 1e9)
# Results are compared at about this many places along their second axis.
_COMPARED = 4096

# Seconds on a machine with 16 cores and an H100 that a rehearsal assumes for what it counts: a
# process of Python, JAX and CUDA; torch beside it; XLA's compilation of a function for the GPU and for
# the CPU; cuDNN's of a graph; Triton's of a kernel of products (3.5 s of one core, without a GPU) and of
# a pointwise one; torch.compile's of a function with its gradient.
PROCESS, TORCH_IMPORT, XLA, XLA_CPU, CUDNN = 12.0, 6.0, 0.7, 0.3, 3.0
TRITON, TRITON_POINTWISE, TORCH_COMPILE = 3.5, 1.0, 12.0
# FLOP/s of what is timed, on average, and bytes/s.
RATES = {FLOPS: 250e12, BYTES: 2e12}

# Set by `machine` alone.
_rehearsing = False
_expected: collections.Counter[str] = collections.Counter()
_kernels: set[Any] = set()


def define_flags() -> None:
    flags.DEFINE_bool(
        "rehearse", False,
        "Without a GPU: run every line at toy sizes, kernels interpreted, torch on the CPU. Times "
        "mean nothing.",
    )  # fmt: skip
    flags.DEFINE_string(
        "results", None, "Folder of the results; by default beside the benchmarks, and of a "
        "rehearsal none.",
    )  # fmt: skip
    flags.DEFINE_string(
        "cache", None, "Folder where compilations are kept, for the next process to find."
    )


def rehearsing() -> bool:
    return _rehearsing


@contextlib.contextmanager
def machine(instead: str) -> Iterator[None]:
    """What is measured runs inside: on a GPU, or, with --rehearse, on the CPU.

    Raises:
      UserError: jax finds no GPU; `instead` says what else works without one.
    """
    if flags.FLAGS.cache:
        keep_compilations(Path(flags.FLAGS.cache).absolute())
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
    with _rehearsal():
        yield


def keep_compilations(folder: Path) -> None:
    """Compilations of this process by XLA, Triton and torch are kept in `folder` and found there."""
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch")
    xla.start(XlaConfig(cache="on", cache_dir=str(folder / "xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# -------------------------------------------------------------------------------------- a rehearsal


@contextlib.contextmanager
def _rehearsal() -> Iterator[None]:
    global _rehearsing
    from llama3_jax.kernels.gpu import call

    def counted(kernel, inputs, outputs, grid, in_place, constants):
        key = kernel, *(x.dtype for x in inputs), *constants.items()
        if key not in _kernels:
            _kernels.add(key)
            small = kernel.fn.__module__.endswith("pointwise")
            expect("Triton kernels", TRITON_POINTWISE if small else TRITON)
        return interpret(kernel, inputs, outputs, grid, in_place, constants)

    def compiled(event: str, *_, **__) -> None:
        if event.endswith("backend_compile_duration"):
            expect("XLA compilations", XLA_CPU if jax.config.jax_enable_x64 else XLA)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    interpret, call._interpret, _rehearsing = call._interpret, counted, True
    try:
        expect("processes", PROCESS)
        with call.interpreted():
            yield
    finally:
        call._interpret, _rehearsing = interpret, False
        if flags.FLAGS.results:
            with Path(flags.FLAGS.results, EXPECTED).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_expected) + "\n")


def expect(what: str, seconds: float) -> None:
    """Counts, in a rehearsal, what this would take on a GPU."""
    if _rehearsing:
        _expected[what] += seconds


def expected_seconds(counts: Path) -> collections.Counter[str]:
    """What the processes of a rehearsal that wrote into this file would take on a GPU, by kind."""
    lines = counts.read_text(encoding="utf-8").splitlines()
    return sum((collections.Counter(json.loads(line)) for line in lines), collections.Counter())


def results_folder() -> Path | None:
    """Where results are written; None: nowhere, of a rehearsal without a folder of its own."""
    if flags.FLAGS.results:
        return Path(flags.FLAGS.results)
    return None if _rehearsing else RESULTS


# ------------------------------------------------------------------------------------------- timing


class Implementation(NamedTuple):
    """`start` puts one run on the device's queue, `wait` blocks until it is through; `results` makes
    of it arrays that equal the other implementations' (None: it computes something else); `memory`
    tells the bytes that it needs beside inputs and results."""

    name: str
    start: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    results: Callable[[Any], list[Any]] | None = jax.tree.leaves
    memory: Callable[[], int] | None = None


@functools.cache
def has_torch() -> bool:
    """Whether torch is here and sees a GPU (in a rehearsal it needs none)."""
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    expect("torch's import", TORCH_IMPORT)
    return _rehearsing or torch.cuda.is_available()


def say_without_torch() -> None:
    if not has_torch():
        print("torch is not here, or sees no GPU: there will be no figures of it", flush=True)


def torch_device() -> str:
    return "cpu" if _rehearsing else "cuda"


@functools.cache
def torch_compile(function: Callable, *kind: Any) -> Callable:
    """Compiled, once for each `kind` of arguments; in a rehearsal as it is, for the CPU's compiler
    lacks FlexAttention's gradient."""
    import torch

    expect("torch's compilations", TORCH_COMPILE)
    return function if _rehearsing else torch.compile(function, dynamic=False)


def release_torch_memory() -> None:
    """Gives the device what torch keeps of it for later."""
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_torch(name: str, start: Callable[[], Any], results=None) -> Implementation:
    import torch

    wait = (lambda _: None) if _rehearsing else (lambda _: torch.cuda.synchronize())
    return Implementation(name, start, wait, results)


def running(
    implementations: list[Implementation],
) -> tuple[list[Implementation], dict[str, str]]:
    """Those that run, and why the others do not: one that fails does not stop the others.

    The first, ours, must run: what it raises is raised.
    """
    able, failed = [], {}
    for implementation in implementations:
        try:
            implementation.wait(implementation.start())
            able.append(implementation)
        except Exception as error:  # each library has its own
            if implementation is implementations[0]:
                raise
            failed[implementation.name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    return able, failed


def sampled(x: Any) -> Any:
    """What of a large result is brought to the host to be compared."""
    return x[:, :: max(1, x.shape[1] // _COMPARED)] if x.ndim > 1 else x


def agreeing(
    implementations: list[Implementation], tolerance: float, least: int = 2
) -> tuple[list[Implementation], dict[str, str]]:
    """Those whose results are the first's, or that compute something else; and why the others differ.

    The largest difference counts, as a share of the first's largest value.

    Raises:
      UserError: fewer than `least`, the first among them, have the same results.
    """
    able, failed, kept = [], {}, None
    for implementation in implementations:
        if not implementation.results:
            able.append(implementation)
            continue
        result = implementation.start()
        implementation.wait(result)
        arrays = [np.asarray(x, np.float32) for x in implementation.results(result)]
        kept = kept or arrays
        # A not-a-number, on either side, is the largest difference too.
        error = max(
            (float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-9)) for x, y in zip(kept, arrays, strict=True)),
            key=lambda x: np.inf if np.isnan(x) else x,
        )  # fmt: skip
        if error <= tolerance:
            able.append(implementation)
        else:
            failed[implementation.name] = f"differs by {error:.3g} of the largest value"
    if sum(x.results is not None for x in able) < least:
        raise UserError(
            f"{implementations[0].name}: nothing agrees with it; "
            + ("; ".join(f"{name} {why}" for name, why in failed.items()) or "nothing to compare")
        )
    return able, failed


def seconds(
    implementations: list[Implementation],
    rounds: int = 7,
    least_seconds: float = 0.05,
    on_gpu: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of one run of each implementation, once a round, in an order that alternates.

    Each figure is of as many runs in a row as fill `least_seconds`. `on_gpu` is what one run takes
    there, for a rehearsal to say what all would.
    """

    def run(implementation: Implementation, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            result = implementation.start()
        implementation.wait(result)
        return (time.perf_counter() - start) / times

    # Beside the rounds: it ran once, was compared, and runs twice to be warm.
    expect("timed runs", len(implementations) * (rounds + 4) * max(least_seconds, on_gpu))
    if _rehearsing:
        rounds, least_seconds = 1, 0.0
    times = {}
    for implementation in implementations:
        run(implementation, 1)
        times[implementation.name] = max(1, int(np.ceil(least_seconds / run(implementation, 1))))
    taken: dict[str, list[float]] = {implementation.name: [] for implementation in implementations}
    for number in range(rounds):
        for implementation in implementations if number % 2 else reversed(implementations):
            taken[implementation.name].append(run(implementation, times[implementation.name]))
    return taken


def ceilings() -> dict[str, float]:
    """What this chip does at most: TFLOP/s of an 8192^3 bfloat16 product, GB/s of a copy.

    On random numbers: of constant ones a product draws less power and runs faster.
    """
    size, length = (64, 2**10) if _rehearsing else (8192, 2**29)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    x, big = (
        draw(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate([(size,) * 2, (length,)])
    )
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    taken = seconds(
        [
            Implementation("product", lambda: product(x, x.T)),
            Implementation("copy", lambda: copy(big)),
        ]
    )
    return dict(
        tflops=2 * size**3 / min(taken["product"]) / 1e12,
        gb_per_s=2 * big.nbytes / min(taken["copy"]) / 1e9,
    )


# ---------------------------------------------------------------------------------------- documents


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


# ------------------------------------------------------------------------------------------ results


def about() -> dict[str, Any]:
    """Date, chip and versions."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
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
    """Writes NAME_CHIP_DATE.json into the results' folder; returns where, to be printed.

    Call it after each measurement: a program that is stopped then loses nothing.
    """
    header = about()
    path = _path(name, header)
    if path is None:
        return "nowhere: this is a rehearsal"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results | header | dict(rehearsal=_rehearsing))
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
