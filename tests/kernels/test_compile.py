"""Every kernel compiles for sm_90 without a GPU, and takes no more than the chip has."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

import triton
import triton.language as tl
from jax.interpreters import partial_eval

from llama3_jax.errors import UserError
from llama3_jax.kernels.gpu.call import triton_call
from llama3_jax.kernels.gpu.catalogue import entries, entry
from llama3_jax.kernels.gpu.compile import compile_for_hopper, launches_of
from llama3_jax.kernels.gpu.cross_entropy import InTiles, linear_cross_entropy
from llama3_jax.kernels.gpu.tuning import Blocks, blocks_for

ENTRIES = list(entries())


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize(
    "kernel, row, blocks, launches", ENTRIES, ids=[" ".join(e[:2]) for e in ENTRIES]
)
def test_every_kernel_and_row_of_its_table_fits(kernel, row, blocks, launches):
    assert launches
    for launch in launches:
        resources = compile_for_hopper(launch)
        assert resources.registers > 0
        assert resources.fits, resources
        if blocks and row.endswith("bfloat16"):
            assert resources.wgmma > 0


def test_the_scale_costs_the_forward_loop_no_instruction_of_its_own():
    # Of 64 scores a thread: one FMA and one exponential each, the scale within the FMA.
    (launch,) = entry("flash_forward", "128 bfloat16", Blocks(128, 128, 8, 3)).launches
    full, cut = compile_for_hopper(launch).loops
    assert full < 540 and cut < 860


def test_a_configuration_that_spills_or_is_too_large_is_seen():
    (launch,) = entry("flash_keys", "64 bfloat16", Blocks(128, 128, 4, 2)).launches
    assert compile_for_hopper(launch).spilled_bytes > 0
    (launch,) = entry("flash_forward", "128 bfloat16", Blocks(128, 128, 8, 4)).launches
    assert not compile_for_hopper(launch).fits


def test_a_row_that_is_not_in_the_table_is_named():
    with pytest.raises(UserError, match="flash_forward on '96 bfloat16'"):
        blocks_for("flash_forward", "96 bfloat16")


@triton.jit
def _double(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * 2)


def double(x):
    return triton_call(_double, [x], [jax.ShapeDtypeStruct(x.shape, x.dtype)], (4,), 4, 1, N=16)[0]


def test_a_recorded_function_launches_nothing():
    (launch,) = launches_of(double, jax.ShapeDtypeStruct((64,), jnp.float32))
    assert launch.kernel is _double and launch.dtypes == ("float32", "float32")
    assert dict(launch.constants) == {"N": 16}


def test_on_cpu_without_the_interpreter_a_kernel_is_refused():
    # Without jax-triton that is what is missing; with it, the GPU.
    with pytest.raises(UserError, match="need jax-triton|asked for on the CPU"):
        jax.jit(double)(jnp.ones(64))


@pytest.fixture
def jax_triton():
    pytest.importorskip("jax_triton", reason="needs the extra 'gpu'", exc_type=ImportError)


def lowered(function, *shapes) -> str:
    traced = jax.jit(function).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_jax_triton_lowers_for_cuda(jax_triton):
    assert "triton_kernel_call" in lowered(double, jnp.ones(64))


def test_a_launch_whose_results_nobody_uses_is_dropped(jax_triton):
    jaxpr = jax.make_jaxpr(lambda x: (double(x), x + 1))(jnp.ones(64)).jaxpr
    kept, _ = partial_eval.dce_jaxpr(jaxpr, [False, True])
    assert [len(x.eqns) for x in (jaxpr, kept)] == [2, 1]


def test_a_result_in_place_lowers_for_cuda(jax_triton):
    def total(hidden, head):
        targets, mask = jnp.zeros(128, jnp.int32), jnp.ones(128, bool)
        return linear_cross_entropy(hidden, head, targets, mask, how=InTiles(Blocks(64, 64, 4, 1)))[
            0
        ]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((128, 64), (64, 256))]
    text = lowered(jax.grad(total, (0, 1)), *shapes)
    assert "output_operand_alias" in text
