"""Which function computes an operation: one table, and no fallback.

A config names an implementation for each operation (`attention="triton"`); `resolve` finds exactly
that, and a run's log repeats it. "reference" is the definition, in plain JAX; "triton" and "cudnn"
need an NVIDIA GPU.
"""

import importlib
from collections.abc import Callable, Mapping

from llama3_jax.errors import UserError

_HERE = "llama3_jax.kernels"
KERNELS: dict[str, dict[str, str]] = {
    "attention": {
        "reference": "attention:reference",
        "chunked": "attention:chunked",
        "triton": "gpu.flash_attention:attention",
        "cudnn": "attention:cudnn",
    },
    "loss": {
        "reference": "cross_entropy:reference",
        "chunked": "cross_entropy:chunked",
        "triton": "gpu.cross_entropy:linear_cross_entropy",
    },
    "norm": {
        "reference": "pointwise:reference_add_norm",
        "triton": "gpu.pointwise:add_norm",
    },
    "rotary": {
        "reference": "pointwise:reference_rotate",
        "triton": "gpu.pointwise:rotate",
    },
    "swiglu": {
        "reference": "pointwise:reference_swiglu",
        "triton": "gpu.pointwise:swiglu",
    },
}
_NEED_CUDA = ("triton", "cudnn")


def resolve(operation: str, implementation: str) -> Callable:
    """The function that computes `operation`.

    Raises:
      UserError: there is no such implementation, or triton is not installed.
    """
    known = KERNELS[operation]
    if implementation not in known:
        raise UserError(f"{operation}={implementation!r} is unknown; known: {', '.join(known)}")
    module, _, name = known[implementation].partition(":")
    try:
        return getattr(importlib.import_module(f"{_HERE}.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        others = ", ".join(repr(other) for other in known if other != "triton")
        raise UserError(
            f"{operation}='triton' needs the package triton (pip install -e '.[gpu]'); "
            f"without it: {others}"
        ) from None


def check(choices: Mapping[str, str], platform: str) -> None:
    """Refuses, before anything is compiled, what cannot run on `platform` or here.

    Raises:
      UserError: names the operation, its implementation, and those that would run.
    """
    for operation, implementation in choices.items():
        resolve(operation, implementation)
        if implementation in _NEED_CUDA and platform != "gpu":
            others = [repr(name) for name in KERNELS[operation] if name not in _NEED_CUDA]
            raise UserError(
                f"config.model.{operation}={implementation!r} needs an NVIDIA GPU, and jax runs on "
                f"{platform!r}; here: {', '.join(others)}"
            )


def describe(choices: Mapping[str, str]) -> str:
    """For the log: "attention=triton (gpu/flash_attention.py), ..."."""

    def file(operation: str, implementation: str) -> str:
        return KERNELS[operation][implementation].partition(":")[0].replace(".", "/") + ".py"

    return ", ".join(f"{op}={name} ({file(op, name)})" for op, name in choices.items())
