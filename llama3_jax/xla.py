"""How JAX and XLA are run: compiler options, memory, compilation cache. Nothing else sets them.

Trainer, evaluation, planner and benchmarks compile with `XlaConfig.compiler_options` of a device's
platform, and call `start` before JAX looks for devices.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import pydantic

from llama3_jax.errors import UserError
from llama3_jax.schema import Config

# What showed a gain in the compiled steps of experiments/production/ (GUIDE, "What overlaps").
GPU_OPTIONS: dict[str, Any] = {
    # XLA's scheduler gives up all overlap where it foresees more than 80% of the memory that is
    # left beside the arguments; a layout that fills the card always is above. In percent of that.
    "xla_gpu_memory_limit_slop_factor": 160,
}
# Put together, the sums of a layer's pieces of tokens would be one exchange with nothing to run under.
PIECES_OPTIONS: dict[str, Any] = {"xla_gpu_reduce_scatter_combine_threshold_bytes": 2**20}
DETERMINISTIC_GPU_OPTIONS: dict[str, Any] = {
    # No atomic additions, and no choice of algorithms by timing.
    "xla_gpu_deterministic_ops": True,
}
# JAX takes 75% unless told; production layouts are planned for 65 to 72 of 79 GiB.
MEMORY_FRACTION = 0.92
_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class XlaConfig(Config):
    """How a run's programs are compiled and executed.

    memory_fraction: the part of each GPU's memory that JAX takes at the start; by default that of
      the environment variable XLA_CLIENT_MEM_FRACTION, or else 0.92.
    memory_check: refuse a run whose forecast is above what JAX may take.
    deterministic: the same input gives the same bits in each run on GPUs of one kind: XLA avoids
      atomics and measures no algorithms, which costs speed.
    options: XLA's compiler options as in XLA_FLAGS, "xla_gpu_one=1 xla_gpu_other=true", in place of
      or in addition to ours (`GPU_OPTIONS`). One whose name is of another platform is left out.
    compile_ahead: compile the next stage's step while one trains. A GPU's memory may be too full for
      the algorithms that XLA tries meanwhile.
    cache: `auto` keeps compiled programs, and with them what XLA measured of its algorithms, where
      that is known to be safe (`cache_is_safe`); `on` and `off` are what they say.
    cache_dir: where; by default JAX_COMPILATION_CACHE_DIR, or else ~/.cache/llama3_jax/xla.
    """

    memory_fraction: pydantic.PositiveFloat | None = pydantic.Field(None, le=1)
    memory_check: bool = True
    deterministic: bool = False
    options: str = ""
    compile_ahead: bool = True
    cache: Literal["auto", "on", "off"] = "auto"
    cache_dir: str | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "XlaConfig":
        for option in self.options.split():
            name, equals, value = option.partition("=")
            if not (name.startswith("xla_") and equals and value):
                raise ValueError(f"options: {option!r} is not xla_name=value")
        return self

    def compiler_options(self, platform: str, pieces: int = 1) -> dict[str, Any]:
        """For `jax.jit(compiler_options=…)` on devices of this platform (`gpu`, `cuda`, `cpu`).

        `pieces` are the mesh's `tensor_pieces`.
        """
        gpu = platform in ("gpu", "cuda")
        ours = GPU_OPTIONS | (PIECES_OPTIONS if pieces > 1 else {}) if gpu else {}
        if self.deterministic and gpu:
            ours |= DETERMINISTIC_GPU_OPTIONS
        other = "xla_cpu_" if gpu else "xla_gpu_"
        given: dict[str, Any] = dict(option.split("=", 1) for option in self.options.split())
        truth = {"true": True, "false": False}
        given = {name: truth.get(value.lower(), value) for name, value in given.items()}
        return ours | {k: v for k, v in given.items() if not k.startswith(other)}

    def fraction(self) -> float:
        """The part of a GPU's memory that JAX takes.

        Raises:
          UserError: the environment and the config say different things, or what is no fraction.
        """
        given = {v: os.environ[v] for v in _FRACTION_VARIABLES if v in os.environ}
        for variable, text in given.items():
            try:
                fraction = float(text)
            except ValueError:
                fraction = 0.0
            if not 0 < fraction <= 1:
                raise UserError(f"{variable}={text}: should be above 0 and at most 1")
            if self.memory_fraction not in (None, fraction):
                raise UserError(
                    f"{variable}={text} and config.xla.memory_fraction={self.memory_fraction} "
                    "differ: set one of them"
                )
            return fraction
        return self.memory_fraction or MEMORY_FRACTION


DEFAULT = XlaConfig()


def start(config: XlaConfig = DEFAULT) -> None:
    """Memory and cache of this process; call it before anything asks JAX for its devices.

    Raises:
      UserError: see `XlaConfig.fraction`; the cache's folder cannot be written.
    """
    os.environ["XLA_CLIENT_MEM_FRACTION"] = str(config.fraction())
    if config.cache == "off" or (config.cache == "auto" and not cache_is_safe()):
        if jax.config.jax_compilation_cache_dir is None or config.cache == "off":
            jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = Path(
        config.cache_dir
        or jax.config.jax_compilation_cache_dir
        or Path.home() / ".cache/llama3_jax/xla"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"config.xla.cache_dir={folder}: {error.strerror}; another folder, or "
            "config.xla.cache='off'"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder))


def cache_is_safe() -> bool:
    """Whether compiled programs can be loaded again.

    JAX 0.10's CPU backend frees memory twice and aborts where it loads the program of a pipeline.
    """
    cpu = (jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")).startswith("cpu")
    return not cpu or jax.version.__version_info__ >= (0, 11)


def describe(config: XlaConfig, platform: str) -> str:
    """One line for the log: all that is set."""
    options = config.compiler_options(platform)
    enabled = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    parts = [f"{name.removeprefix('xla_gpu_')}={value}" for name, value in options.items()]
    if platform in ("gpu", "cuda"):
        parts.append(f"memory fraction {os.environ.get('XLA_CLIENT_MEM_FRACTION', '0.75')}")
    if config.deterministic:
        parts.append("deterministic")
    parts.append(f"compilation cache {enabled or 'off'}")
    return ", ".join(parts)


def check_memory(forecasts: Mapping[str, float], config: XlaConfig) -> None:
    """Refuses what does not fit in the memory that JAX may take of a device; nothing on a CPU.

    `forecasts` are bytes of one device by the stage's name.

    Raises:
      UserError: names the stage, both figures, and what to set.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    limit = statistics.get("bytes_limit")
    if not config.memory_check or not limit:
        return
    stage, need = max(forecasts.items(), key=lambda item: item[1])
    if need <= limit:
        return
    whole = limit / config.fraction()
    if need <= 0.98 * whole:
        advice = f"set config.xla.memory_fraction={min(need / whole + 0.02, 0.98):.2f}"
    else:
        advice = "more ranks, a smaller micro_batch_tokens, or model.remat='full'"
    raise UserError(
        f"stage {stage} needs {need / 2**30:.1f} GiB of a device by the planner's forecast, and JAX "
        f"may take {limit / 2**30:.1f} ({config.fraction():.0%}): {advice}; "
        "config.xla.memory_check=False starts it all the same"
    )
