"""Every kernel compiles for sm_90 without a GPU, and takes no more than the chip has."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

import triton
import triton.language as tl

from llama3_jax.errors import UserError
from llama3_jax.kernels.gpu.call import triton_call
from llama3_jax.kernels.gpu.catalogue import entries, entry
from llama3_jax.kernels.gpu.compile import compile_for_hopper, launches_of
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


def test_jax_triton_lowers_for_cuda():
    pytest.importorskip("jax_triton", reason="needs the extra 'gpu'", exc_type=ImportError)
    lowered = jax.jit(double).trace(jnp.ones(64)).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()
