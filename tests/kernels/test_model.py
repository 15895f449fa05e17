"""The training gradients of a whole model with Triton kernels, interpreted, on meshes."""

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from llama3_jax.kernels.gpu.call import interpreted
from tests.parallel.equivalence import (
    MODEL,
    mesh_config,
    on_mesh,
    packed_batch,
    random_params,
    relative_errors,
    serial,
)

SMALL = MODEL.model_copy(update=dict(layers=2, heads=4, kv_heads=2, head_dim=16))
KERNELS = dict.fromkeys(("attention", "loss", "norm", "rotary", "swiglu"), "triton")
# data, pipe, context, tensor
MESHES = [
    pytest.param((1, 2, 2, 2), dict(remat="full"), id="pipe, context, tensor"),
    pytest.param((2, 1, 2, 2), {}, id="data, context, tensor", marks=pytest.mark.slow),
    pytest.param((2, 2, 2, 1), {}, id="data, pipe, context", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape, changes", MESHES)
def test_gradients_equal_those_of_the_definitions(shape, changes):
    params, batch = random_params(SMALL), packed_batch(seed=3, rows=4)
    loss, gradients = serial(SMALL, params, batch)
    model = SMALL.model_copy(update=KERNELS | changes)
    with interpreted():
        sums, ours = on_mesh(model, params, batch, mesh_config(shape), micro_batches=2)
    assert float(sums.total) == pytest.approx(float(loss), rel=1e-5)
    assert max(relative_errors(ours, gradients).values()) <= 2e-5
    assert float(np.sum(sums.tokens_by_source)) == batch["loss_mask"].sum()
