"""What goes over the wire: which dtype, and how often."""

import jax
import pytest

from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.training.gradients import make_gradients
from llama3_jax.training.state import abstract_params
from tests.parallel.equivalence import MICRO_BATCHES, MODEL, SOURCES, packed_batch

BFLOAT16 = MODEL.model_copy(update=dict(dtype="bfloat16"))
# The embedding, the head, and seven matrices of a block; norms are not sharded.
SHARDED = 9


def collectives(config: MeshConfig, name: str) -> list[tuple[int, str]]:
    """(how deep in loops, element type) of each use of a collective in the traced gradients."""
    layout = make_mesh(config)
    function = make_gradients(BFLOAT16, layout, MICRO_BATCHES, SOURCES)
    jaxpr = jax.make_jaxpr(function)(
        abstract_params(BFLOAT16, layout), put_batch(packed_batch(), layout)
    )
    return list(_find(jaxpr.jaxpr, name, 0))


def _find(jaxpr, name: str, depth: int):
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield depth, str(equation.invars[0].aval.dtype)
        deeper = depth + (equation.primitive.name == "scan")
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _find(inner, name, deeper)


def test_zero3_gathers_in_bfloat16_where_a_weight_is_used_and_reduces_in_float32():
    gathers = collectives(MeshConfig(data=8), "all_gather")
    assert {dtype for _, dtype in gathers} == {"bfloat16"}
    # In the loop over micro-batches, those of blocks in the one over layers.
    assert sum(depth == 1 for depth, _ in gathers) == 2
    assert min(depth for depth, _ in gathers) == 1
    scatters = collectives(MeshConfig(data=8), "reduce_scatter")
    assert {dtype for _, dtype in scatters} == {"float32"}
    assert len(scatters) == SHARDED and min(depth for depth, _ in scatters) == 1


def test_kept_gathers_each_weight_and_reduces_each_gradient_once_a_step():
    config = MeshConfig(data=8, reshard_after_forward=False)
    assert collectives(config, "all_gather") == [(0, "bfloat16")] * SHARDED
    assert collectives(config, "reduce_scatter") == [(0, "float32")] * SHARDED


@pytest.mark.parametrize("reshard", [True, False])
def test_no_gathered_weight_is_kept_for_the_backward_pass(reshard):
    """remat="none" keeps activations; weights are gathered, or widened, once more."""
    layout = make_mesh(MeshConfig(data=8, reshard_after_forward=reshard))
    batch = put_batch(packed_batch(), layout)
    function = make_gradients(BFLOAT16, layout, 1, SOURCES)
    jaxpr = jax.make_jaxpr(function)(abstract_params(BFLOAT16, layout), batch)
    scans = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name == "scan"]
    kept = {v.aval.shape for v in scans[0].outvars}  # of the layers' forward pass
    weights = {x.shape for x in jax.tree.leaves(abstract_params(BFLOAT16, layout)["blocks"])}
    matrices = {shape for shape in weights if len(shape) > 2}
    heads_joined = {(s[0], s[1], s[2] * s[3]) for s in matrices if len(s) == 4}
    assert len(kept) > 5 and not kept & (matrices | heads_joined)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
