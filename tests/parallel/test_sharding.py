"""The sharding table, what it refuses, and which part of a batch goes where."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from llama3_jax.errors import UserError
from llama3_jax.model.definition import define
from llama3_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from llama3_jax.parallel.sharding import check_batch, check_divisible, put_batch, spec
from tests.parallel.equivalence import FACTORISATIONS, MODEL, mesh_config, packed_batch


@pytest.mark.parametrize(
    "axes, shape, expected",
    [
        (("vocab", "embed"), (2, 1, 2, 2), Spec("tensor", ("data", "context"))),
        (("vocab", "embed"), (8, 1, 1, 1), Spec(None, "data")),
        (("layers", "embed", "heads", "head_dim"), (2, 2, 1, 2), Spec("pipe", "data", "tensor", None)),
        (("layers", "embed", "kv_heads", "head_dim"), (1, 1, 1, 8), Spec(None, None, None, None)),
        (("layers", "embed", "kv_heads", "head_dim"), (1, 2, 1, 4), Spec("pipe", None, "tensor", None)),
        (("layers", "norm"), (1, 4, 2, 1), Spec("pipe", None)),
        (("rows", "length"), (2, 2, 2, 1), Spec("data", "context")),
    ],
)  # fmt: skip
def test_the_table(axes, shape, expected):
    # With eight tensor ranks the four KV heads are replicated (see mesh_config).
    assert spec(axes, make_mesh(mesh_config(shape))) == expected


def refusal(model, **mesh) -> str:
    with pytest.raises(UserError) as error:
        check_divisible(
            define(model).axes(), define(model).abstract_params(), make_mesh(MeshConfig(**mesh))
        )
    return str(error.value)


def test_a_mesh_that_does_not_divide_the_model_is_refused_with_what_would_work():
    assert refusal(MODEL, tensor=8) == (
        "mesh.tensor=8 does not divide the model's kv_heads (4); mesh.kv_heads='replicated' lets "
        "tensor ranks share KV heads"
    )
    # Copies would not help: three KV heads over eight ranks.
    model = MODEL.model_copy(update=dict(heads=24, kv_heads=3))
    assert refusal(model, tensor=8) == "mesh.tensor=8 does not divide the model's kv_heads (3)"
    replicated = refusal(model, tensor=8, kv_heads="replicated")
    assert "mesh.tensor (8) to be a multiple of the model's kv_heads (3)" in replicated
    model = MODEL.model_copy(update=dict(dim=36))
    line = "mesh.data=4 x mesh.context=2 does not divide the model's embed (36)"
    assert refusal(model, data=4, context=2) == line
    model = MODEL.model_copy(update=dict(vocab_size=65))
    assert (
        refusal(model, data=4, tensor=2) == "mesh.tensor=2 does not divide the model's vocab (65)"
    )
    # Layers need not divide.
    layout = make_mesh(MeshConfig(pipe=8))
    check_divisible(define(MODEL).axes(), define(MODEL).abstract_params(), layout)


@pytest.mark.parametrize(
    "rows, length, micro_batches, message",
    [
        (12, 32, 4, "a batch of 12 rows is not divisible by mesh.data=2 x 4 micro-batches"),
        (8, 36, 4, "length 36 is not divisible by 8: mesh.context=2 cuts a row in 2 x context"),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide_is_refused(rows, length, micro_batches, message):
    layout = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    check_batch(8, 32, 4, layout)
    with pytest.raises(UserError, match=message):
        check_batch(rows, length, micro_batches, layout)


@pytest.mark.parametrize("shape", FACTORISATIONS, ids=str)
def test_each_device_gets_its_rows_and_its_two_chunks(shape):
    data, _, context, _ = shape
    layout, batch = make_mesh(mesh_config(shape)), packed_batch()
    tokens = put_batch(batch, layout)["tokens"]
    places = {device: place for place, device in np.ndenumerate(layout.mesh.devices)}
    chunks = np.split(batch["tokens"], 2 * context, axis=1)
    for shard in tokens.addressable_shards:
        at = dict(zip(AXES, places[shard.device], strict=True))
        first, second = at["context"], 2 * context - 1 - at["context"]
        whole = np.concatenate([chunks[first], chunks[second]], axis=1)
        np.testing.assert_array_equal(shard.data, np.split(whole, data)[at["data"]])
    assert put_batch(batch, layout)["source"].sharding.spec == Spec("data" if data > 1 else None)
    assert jax.process_count() == 1
