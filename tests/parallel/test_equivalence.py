"""Every mesh computes what one device computes: the compiled training step against plain autodiff.

The step's gradients are read off AdamW's first moment, which after one step is (1 - b1) times the
gradient of the mean loss.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from llama3_jax.parallel.mesh import make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.parallel.stages import from_stages, make_stages
from llama3_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama3_jax.training.state import TrainState, relayout
from llama3_jax.training.step import compile_step
from tests.parallel.equivalence import (
    FACTORISATIONS,
    MICRO_BATCHES,
    MODEL,
    QUICK,
    SOURCES,
    mesh_config,
    on_mesh,
    packed_batch,
    random_params,
    relative_errors,
    serial,
)

OPTIMIZER = OptimizerConfig(clip=1e9)
SCHEDULES = {
    "gpipe": dict(schedule="gpipe", reshard_after_forward=False),
    "1f1b": dict(schedule="1f1b", reshard_after_forward=True),
    "interleaved": dict(schedule="interleaved", reshard_after_forward=False),
}


def cases():
    for number, shape in enumerate(FACTORISATIONS):
        name = "x".join(map(str, shape))
        # Every mesh of several tensor ranks runs its products in pieces of tokens.
        pieces = {"tensor_pieces": 2} if shape[3] > 1 else {}
        if shape[1] == 1:
            reshard = number % 2 == 0
            options = dict(reshard_after_forward=reshard) | pieces
            yield pytest.param(shape, options, id=f"{name}-reshard={reshard}")
            continue
        for place, (schedule, options) in enumerate(SCHEDULES.items()):
            options = options | pieces
            if schedule == "interleaved" and shape[1] < 8:
                # Three in a row of four micro-batches: N divides neither them nor the stages.
                options = options | {"virtual_stages": 2, "contiguous": 3}
            # Each mesh under one schedule at once, under the others where there is time.
            marks = () if place == number % len(SCHEDULES) else pytest.mark.slow
            yield pytest.param(shape, options, id=f"{name}-{schedule}", marks=marks)


@functools.cache
def expected():
    params, batch = random_params(MODEL), packed_batch()
    loss, gradients = serial(MODEL, params, batch)
    tokens = batch["loss_mask"].sum()
    return loss / tokens, jax.tree.map(lambda g: np.asarray(g) / tokens, gradients)


@pytest.mark.parametrize("shape, options", list(cases()))
def test_training_step_equals_the_serial_model(shape, options):
    layout = make_mesh(mesh_config(shape, **options))
    params = random_params()
    # On the host: the step is given its state to overwrite.
    fresh = jax.tree.map(np.asarray, TrainState(params, make_optimizer(OPTIMIZER).init(params)))
    batch, rate = put_batch(packed_batch(), layout), np.float32(1e-2)
    state = relayout(fresh, MODEL, None, layout, OPTIMIZER)
    lowered = compile_step(MODEL, OPTIMIZER, layout, MICRO_BATCHES, SOURCES).lower(
        state, batch, rate
    )
    step = lowered.compile(compiler_options=QUICK)

    def three_steps():
        state = relayout(fresh, MODEL, None, layout, OPTIMIZER)
        states, losses = [], []
        for _ in range(3):
            state, metrics = step(state, batch, rate)
            states.append(jax.tree.map(np.asarray, state))
            losses.append(float(metrics.loss))
        return states, losses

    states, losses = three_steps()
    loss, gradients = expected()
    assert losses[0] == pytest.approx(float(loss), rel=1e-5)
    assert losses[2] < losses[0]
    moments = jax.tree.map(lambda m: m / (1 - OPTIMIZER.b1), states[0].optimizer[1][0].mu)
    if layout.config.pipe > 1:
        stages = make_stages(MODEL.layers, layout.config)
        moments["blocks"] = from_stages(moments["blocks"], stages)
    assert max(relative_errors(moments, gradients).values()) <= 1e-5

    again, losses_again = three_steps()
    assert losses_again == losses
    for a, b in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(again[-1]), strict=True):
        np.testing.assert_array_equal(a, b)


VARIANTS = {
    "remat": ((2, 2, 2, 1), dict(virtual_stages=2), dict(remat="full")),
    "remat-kept": ((2, 2, 1, 2), dict(reshard_after_forward=False), dict(remat="save_dots")),
    "chunked-context": ((2, 1, 2, 2), dict(), dict(remat="full", attention="chunked")),
    "tied-head": ((1, 2, 1, 4), dict(), dict(tied_head=True)),
    "tied-head-kept": (
        (4, 1, 1, 2),
        dict(reshard_after_forward=False),
        dict(tied_head=True, layer_unroll=6, loss="chunked"),
    ),
}


@pytest.mark.parametrize(
    "shape, options, changes",
    [
        pytest.param(*case, marks=pytest.mark.slow if name in ("remat-kept", "tied-head") else ())
        for name, case in VARIANTS.items()
    ],
    ids=VARIANTS,
)
def test_remat_attention_and_tied_head_change_nothing(shape, options, changes):
    model = MODEL.model_copy(update=changes)
    params, batch = random_params(model, seed=1), packed_batch(seed=1)
    loss, gradients = serial(model, params, batch)
    sums, on = on_mesh(model, params, batch, mesh_config(shape, **options))
    assert float(sums.total) == pytest.approx(float(loss), rel=1e-5)
    assert max(relative_errors(on, gradients).values()) <= 1e-5
    assert float(sums.tokens_by_source.sum()) == batch["loss_mask"].sum()


REMAT = ("none", "full", "save_attention", "save_dots")


def full_matrix():
    for shape, remat, reshard in itertools.product(FACTORISATIONS, REMAT, (True, False)):
        # Without a pipeline one schedule is as good as another.
        for schedule in SCHEDULES if shape[1] > 1 else ("gpipe",):
            name = "-".join(("x".join(map(str, shape)), schedule, str(reshard), remat))
            yield pytest.param(
                shape, dict(schedule=schedule, reshard_after_forward=reshard), remat, id=name
            )


@functools.cache
def expected_of(**changes):
    model = MODEL.model_copy(update=changes)
    params, batch = random_params(model, seed=2), packed_batch(seed=2)
    return model, params, batch, jax.device_get(serial(model, params, batch)[1])


@pytest.mark.slow
@pytest.mark.parametrize("shape, options, remat", list(full_matrix()))
def test_full_matrix(shape, options, remat):
    model, params, batch, gradients = expected_of(remat=remat)
    _, on = on_mesh(model, params, batch, mesh_config(shape, **options))
    assert max(relative_errors(on, gradients).values()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("shape", FACTORISATIONS, ids=str)
def test_a_module_of_the_users_own_on_every_mesh(shape):
    model, params, batch, gradients = expected_of(
        attention_module="experiments.variants.qk_norm:QKNormAttention"
    )
    assert "query_norm" in gradients["blocks"]["attention"]
    _, on = on_mesh(model, params, batch, mesh_config(shape))
    assert max(relative_errors(on, gradients).values()) <= 1e-5
