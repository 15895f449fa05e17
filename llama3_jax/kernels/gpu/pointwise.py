"""RMSNorm after a residual sum, RoPE and SwiGLU in Triton, each read and written once.

Their sizes follow from the shapes and were not tuned: memory bounds them.

Shapes: N rows (tokens), M model dim, H query heads, K KV heads, D head dim; P programs.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from llama3_jax.kernels.gpu.call import triton_call

# Programs that share the rows of the norm's backward pass: several for each of an H100's 132 units.
_PROGRAMS = 528
_ELEMENTS = 2048


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# -------------------------------------------------------------------------------------------- norm


def add_norm(x, update, scale, eps: float):
    """Arguments and result as for `kernels.pointwise.add_norm`."""
    add = update is not None
    flat = x.reshape(-1, x.shape[-1])
    total, normed = _add_norm(flat, update.reshape(flat.shape) if add else flat, scale, eps, add)
    return total.reshape(x.shape), normed.reshape(x.shape)


@triton.jit
def _norm_kernel(
    x_ptr, update_ptr, scale_ptr, total_ptr, normed_ptr, inverse_ptr,
    M: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0), tl.arange(0, WIDTH)
    inside = columns < M
    at = row.to(tl.int64) * M + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        # As the reference, the norm is that of the rounded sum.
        x += tl.load(update_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, x, mask=inside)
        x = x.to(tl.float32)
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / M + EPS)
    normed = x * inverse * scale
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + row, inverse)


@triton.jit
def _norm_gradient_kernel(
    x_ptr, scale_ptr, inverse_ptr, dtotal_ptr, dnormed_ptr, dx_ptr, dscale_ptr,
    N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    program, columns = tl.program_id(0), tl.arange(0, WIDTH)
    inside = columns < M
    dscale = tl.zeros([WIDTH], tl.float32)
    for step in tl.range(0, tl.cdiv(N - program, P)):
        row = program + step * P
        at = row.to(tl.int64) * M + columns
        unit = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row)
        unit *= inverse
        g = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dscale += g * unit
        # Read anew for each row: of 16,384 columns there are no registers to keep it in.
        g *= tl.load(scale_ptr + columns, mask=inside, other=0.0)
        dx = inverse * (g - unit * (tl.sum(g * unit, 0) / M))
        dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dscale_ptr + program * M + columns, dscale, mask=inside)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _add_norm(x_NM, update_NM, scale_M, eps: float, add: bool):
    """Without `add` the update is not read, and may be anything."""
    return _norm_forward(x_NM, update_NM, scale_M, eps, add)[0]


def _sizes(M: int) -> dict:
    width = triton.next_power_of_2(M)
    return dict(M=M, WIDTH=width, num_warps=min(32, max(4, width // 512)), num_stages=1)


def _norm_forward(x_NM, update_NM, scale_M, eps, add):
    N, M = x_NM.shape
    total_NM, normed_NM, inverse_N = triton_call(
        _norm_kernel,
        [x_NM, update_NM, scale_M],
        [
            _like(x_NM) if add else jax.ShapeDtypeStruct((1,), x_NM.dtype),
            _like(x_NM),
            jax.ShapeDtypeStruct((N,), jnp.float32),
        ],
        grid=(N,), EPS=eps, ADD=add, **_sizes(M),
    )  # fmt: skip
    total_NM = total_NM if add else x_NM
    return (total_NM, normed_NM), (total_NM, scale_M, inverse_N)


def _norm_backward(eps, add, saved, cotangents):
    del eps
    total_NM, scale_M, inverse_N = saved
    N, M = total_NM.shape
    programs = min(N, _PROGRAMS)
    dx_NM, dscale_PM = triton_call(
        _norm_gradient_kernel,
        [total_NM, scale_M, inverse_N, *cotangents],
        [_like(total_NM), jax.ShapeDtypeStruct((programs, M), jnp.float32)],
        grid=(programs,), N=N, P=programs, **_sizes(M),
    )  # fmt: skip
    return dx_NM, dx_NM if add else None, dscale_PM.sum(0)


_add_norm.defvjp(_norm_forward, _norm_backward)


# -------------------------------------------------------------------------------------------- rope


def rotate(q, k, tables):
    """Arguments and result as for `kernels.pointwise.rotate`."""
    return _rotate(q, k, *tables)


@triton.jit
def _turn(
    x_ptr, out_ptr, cos, sin, half, HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):
    heads = tl.arange(0, BLOCK)
    at = heads[:, None] * D + half[None, :]
    inside = (heads[:, None] < HEADS) & (half[None, :] < D // 2)
    first = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(out_ptr + at + D // 2, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    H_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF)
    at = token * (D // 2) + half
    cos = tl.load(cos_ptr + at, mask=half < D // 2, other=0.0)[None, :]
    sin = SIGN * tl.load(sin_ptr + at, mask=half < D // 2, other=0.0)[None, :]
    _turn(q_ptr + token * H * D, q_out_ptr + token * H * D, cos, sin, half, H, H_BLOCK, D)
    _turn(k_ptr + token * K * D, k_out_ptr + token * K * D, cos, sin, half, K, K_BLOCK, D)


def _turned(q, k, cos, sin, sign: float):
    (B, S, H, D), K = q.shape, k.shape[2]
    # Blocks are powers of two.
    blocks = {f"{name}_BLOCK": triton.next_power_of_2(n) for name, n in (("H", H), ("K", K))}
    return tuple(
        triton_call(
            _rotate_kernel, [q, k, cos, sin], [_like(q), _like(k)], grid=(B * S,),
            num_warps=4, num_stages=1, H=H, K=K, D=D, SIGN=sign, HALF=triton.next_power_of_2(D // 2), **blocks,
        )
    )  # fmt: skip


@jax.custom_vjp
def _rotate(q, k, cos, sin):
    return _turned(q, k, cos, sin, 1.0)


def _rotate_backward(tables, cotangents):
    # A rotation's transpose turns back.
    return (*_turned(*cotangents, *tables, -1.0), None, None)


_rotate.defvjp(lambda q, k, cos, sin: (_rotate(q, k, cos, sin), (cos, sin)), _rotate_backward)


# ------------------------------------------------------------------------------------------ swiglu


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < COUNT
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient_kernel(
    gate_ptr, up_ptr, g_ptr, dgate_ptr, dup_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < COUNT
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + at, dgate.to(dtype), mask=inside)
    tl.store(dup_ptr + at, (g * gate * sigmoid).to(dtype), mask=inside)


def _over_elements(kernel, inputs, outputs):
    count = inputs[0].size
    return triton_call(
        kernel, inputs, outputs, grid=(triton.cdiv(count, _ELEMENTS),),
        num_warps=8, num_stages=1, COUNT=count, BLOCK=_ELEMENTS,
    )  # fmt: skip


@jax.custom_vjp
def swiglu(gate, up):
    """Arguments and result as for `kernels.pointwise.swiglu`."""
    return _over_elements(_swiglu_kernel, [gate, up], [_like(gate)])[0]


def _swiglu_backward(saved, g):
    gate, up = saved
    return tuple(_over_elements(_swiglu_gradient_kernel, [gate, up, g], [_like(gate), _like(up)]))


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)
