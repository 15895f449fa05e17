"""Calls a Triton kernel from JAX: on the GPU, or, where asked for, in Triton's interpreter.

On the GPU jax-triton compiles and launches; its versions 0.3 (Python 3.11) and 0.4 differ in names,
which this file alone knows. A call has no gradient, batching or sharding of its own: the functions
that use it have a `custom_vjp` and see the arrays of one device.
"""

import contextlib
import inspect
import threading
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import mlir, partial_eval
from triton import JITFunction
from triton import language as tl
from triton.runtime import interpreter

from llama3_jax.errors import UserError

# Compute capability compiled for where no GPU is present (ahead of time): Hopper.
HOPPER = 90

_INTERPRET: ContextVar[bool] = ContextVar("interpret", default=False)
_RECORD: ContextVar[list["Launch"] | None] = ContextVar("record", default=None)
# The interpreter patches triton.language while it runs; callbacks of several devices run at once.
_interpreter_lock = threading.Lock()


class Launch(NamedTuple):
    """One launch of a kernel: all that compiling it depends on."""

    kernel: JITFunction
    dtypes: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Functions traced inside run their kernels on the host, by Triton's interpreter. Very slow."""
    token = _INTERPRET.set(True)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Functions traced inside launch nothing; yields the list of what they would launch."""
    token = _RECORD.set([])
    try:
        yield _RECORD.get()
    finally:
        _RECORD.reset(token)


def triton_call(
    kernel: JITFunction,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    in_place: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Launches `kernel(*inputs, *outputs, **constants)` once for each point of `grid`.

    Outputs start uninitialised; but those of `in_place` {input: output} are where the input is:
    the kernel reads and writes them by the input's parameter, and the output's own it ignores.

    Raises:
      UserError: jax-triton is missing, or (when compiled) the platform is not CUDA.
    """
    if (launches := _RECORD.get()) is not None:
        dtypes = tuple(str(np.dtype(x.dtype)) for x in [*inputs, *outputs])
        launches.append(Launch(kernel, dtypes, tuple(constants.items()), num_warps, num_stages))
        return [jax.numpy.zeros(x.shape, x.dtype) for x in outputs]
    if _INTERPRET.get():

        def on_host(*arrays):
            arrays = [np.asarray(x) for x in arrays]
            return _interpret(kernel, arrays, outputs, grid, in_place or {}, constants)

        return jax.pure_callback(on_host, list(outputs), *inputs)
    jax_triton = _jax_triton()
    names = inspect.signature(jax_triton.triton_call).parameters
    if "out_type" in names:  # 0.4: outputs in place have no pointer of their own
        unused = {kernel.arg_names[len(inputs) + i]: 0 for i in (in_place or {}).values()}
        shapes = dict(out_type=list(outputs), **unused)
    else:
        shapes = dict(out_shape=list(outputs))
    # Ahead of time, in a process without a GPU, there is no device to ask.
    capability = None if jax.default_backend() == "gpu" else HOPPER
    with warnings.catch_warnings():
        # 0.4 would rather have a Ref, which has no gradient rule of ours to go with.
        warnings.filterwarnings("ignore", "input_output_aliases", DeprecationWarning)
        return jax_triton.triton_call(
            *inputs, kernel=kernel, grid=grid, num_warps=num_warps, num_stages=num_stages,
            compute_capability=capability, input_output_aliases=dict(in_place or {}), **shapes,
            **constants,
        )  # fmt: skip


def _jax_triton():
    try:
        import jax_triton
    except ImportError as error:
        raise UserError(
            f"Triton kernels need jax-triton and JAX's CUDA plugin ({error}); "
            "pip install -e '.[gpu]', or choose another implementation"
        ) from None
    primitive = jax_triton.triton_lib.triton_kernel_call_p
    mlir.register_lowering(primitive, _refuse_cpu, platform="cpu")
    # jax-triton 0.4.1's own rule keeps calls whose results nobody uses, and does not take all that
    # JAX 0.12 passes it; JAX's default drops them.
    partial_eval.dce_rules.pop(primitive, None)
    return jax_triton


def _refuse_cpu(*_, **__):
    raise UserError(
        "a Triton kernel was asked for on the CPU; choose another implementation, or run where "
        "jax finds an NVIDIA GPU"
    )


# ------------------------------------------------------------------------------------- interpreter


class _Memory:
    """The few methods of a torch tensor that the interpreter asks its arguments for."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Memory":
        return self

    def cpu(self) -> "_Memory":
        return self

    def new_empty(self, *_, **__) -> "_Memory":
        return _Memory(self.array)

    def set_(self, storage: "_Memory", *_) -> None:
        self.array = storage.array

    def copy_(self, _) -> None:
        """Host and device memory are the same."""

    def storage_offset(self) -> int:
        return 0

    size = stride = storage_offset


def _interpret(kernel, inputs, outputs, grid, in_place, constants) -> list[np.ndarray]:
    results = [np.empty(x.shape, x.dtype) for x in outputs]
    for result in results:
        # What a kernel forgets to write is then seen.
        result.fill(np.nan if result.dtype.kind not in "biu" else 85)
    inputs = list(inputs)
    for source, result in in_place.items():
        results[result][...] = inputs[source]
        inputs[source] = results[result]
    arguments = [_Memory(np.ascontiguousarray(x)) for x in [*inputs, *results]]
    with _interpreter_lock, _interpreted_calls(), np.errstate(all="ignore"):
        interpreter.InterpretedFunction(kernel.fn)[grid](*arguments, **constants)
    return results


@contextlib.contextmanager
def _interpreted_calls() -> Iterator[None]:
    """What the interpreter lacks: calls of compiled functions such as `tl.zeros` from interpreted
    ones, and bfloat16, which it keeps as integers, rounds towards zero and cannot multiply."""
    builder = interpreter.InterpreterBuilder
    call, product, cast = JITFunction.__call__, builder.create_dot, builder.cast_impl
    scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    def interpreted_call(self, *args, **kwargs):
        return interpreter.InterpretedFunction(self.fn).rewrite()(*args, **kwargs)

    def float32_product(self, a, b, *rest):
        return product(self, _widened(a), _widened(b), *rest)

    def rounding_cast(self, x, target):
        if x.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = x.data.astype(jax.numpy.bfloat16).view(np.uint16)
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, x, target)

    JITFunction.__call__ = interpreted_call
    builder.create_dot, builder.cast_impl = float32_product, rounding_cast
    try:
        yield
    finally:
        JITFunction.__call__ = call
        builder.create_dot, builder.cast_impl = product, cast
        scope.restore()


def _widened(x):
    if x.dtype != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
