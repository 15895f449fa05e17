"""Predicted times, by hand and against what was published."""

import json

import pytest

from experiments.production import llama3_405b
from llama3_jax.errors import UserError
from llama3_jax.model.config import preset
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.planning.case import Case, cases_of
from llama3_jax.planning.constants import TABLE, load_constants
from llama3_jax.planning.cost import predict
from llama3_jax.planning.traffic import bandwidth
from llama3_jax.recipe.config import RunConfig
from llama3_jax.schema import parse
from llama3_jax.training.optimizer import OptimizerConfig


def case(mesh: dict, rows=8, length=8192, micro=1, model="8B", **changes) -> Case:
    model = preset(model, **changes)
    return Case("x", model, OptimizerConfig(), MeshConfig(**mesh), rows, length, micro, 100)


@pytest.fixture
def constants():
    return load_constants()


def test_products_and_attention_by_hand(constants):
    cost = predict(case({}, rows=1), constants)
    tokens, pairs = 8192, 8192 * 8193 / 2
    products = 32 * 6 * tokens * (4096 * 128 * (64 + 16) + 3 * 4096 * 14336)
    assert cost.parts["products"] == pytest.approx(products / (989.4e12 * 0.72))
    # Forward 4 flops a pair and dimension at 0.40 of the peak, backward 10 at 0.30; cuDNN's.
    seconds = 32 * 4096 * pairs * (4 / 0.40 + 10 / 0.30) / 989.4e12
    assert cost.parts["attention"] == pytest.approx(seconds)
    cudnn = predict(case({}, rows=1), constants, attention="cudnn")
    seconds = 32 * 4096 * pairs * (4 / 0.53 + 10 / 0.48) / 989.4e12
    assert cudnn.parts["attention"] == pytest.approx(seconds)
    assert cost.seconds == pytest.approx(sum(cost.parts.values()))
    assert cost.mfu() == pytest.approx(cost.flops["causal"] / cost.seconds / 989.4e12)


def test_remat_computes_again_and_documents_make_attention_cheaper(constants):
    none, full = (predict(case({}, remat=r), constants) for r in ("none", "full"))
    assert full.parts["products"] == pytest.approx(none.parts["products"] * 4 / 3)
    assert full.flops == none.flops
    short = predict(case({}), constants, document_length=1024)
    assert short.parts["attention"] == pytest.approx(none.parts["attention"] * 1025 / 8193)
    assert short.flops["document"] < short.flops["causal"] < short.flops["full"]


def test_the_bubble_is_the_schedules(constants):
    # A small vocabulary, or the head's time on the last rank would add to it.
    planned = case(
        dict(pipe=4, tensor=8, virtual_stages=4), rows=8, micro=8, model="70B", layers=64,
        vocab_size=1024,
    )  # fmt: skip
    cost, quick = predict(planned, constants), predict(planned, constants, simulated=False)
    assert cost.bubble == pytest.approx(3 / (8 * 4), rel=0.05)
    assert quick.bubble == pytest.approx(3 / (8 * 4))
    assert quick.seconds == pytest.approx(cost.seconds, rel=0.05)


@pytest.mark.parametrize(
    ("mesh", "axes", "share"),
    [
        (dict(tensor=8, data=4), ("tensor",), "nvlink"),
        (dict(tensor=8, data=4), ("data",), 1),
        (dict(tensor=2, data=16), ("data",), 4),  # four of a host's members share the work
        (dict(tensor=1, data=8), ("data",), "nvlink"),
        (dict(tensor=4, context=2, data=4), ("context",), "nvlink"),
        (dict(tensor=4, context=4, data=4), ("context",), 2),
        (dict(tensor=2, pipe=2, context=2, data=4), ("pipe",), "nvlink"),
        (dict(tensor=8, pipe=2, data=4), ("pipe",), 1),
    ],
)
def test_the_link_of_a_group(constants, mesh, axes, share):
    expected = constants.nvlink if share == "nvlink" else share * constants.network
    assert bandwidth(axes, MeshConfig(**mesh), constants) == expected


# Llama 3 paper, table 4. What separates us from it: FSDP's gathers and reductions, the pipeline's
# exchanges and tensor collectives are not overlapped in our compiled step; and at 131,072 tokens
# the paper does not say how it counts attention, where causal and full counts lie 40% apart.
PUBLISHED = {"8k_8192": 430e12, "8k_16384": 400e12, "128k_16384": 380e12}


def test_table_4_comes_out_in_its_order(constants):
    cases = {row: cases_of(parse(RunConfig, llama3_405b.get_config(row)))[0] for row in PUBLISHED}
    predicted = {row: predict(planned, constants) for row, planned in cases.items()}
    causal = [cost.flops_per_gpu() for cost in predicted.values()]
    assert causal == sorted(causal, reverse=True)
    for row, published in PUBLISHED.items():
        slow = predict(planned := cases[row], constants.end(0)).flops_per_gpu("causal")
        fast = predict(planned, constants.end(1), attention="cudnn").flops_per_gpu("full")
        assert slow < predicted[row].flops_per_gpu() < fast
        assert 0.95 * slow < published < fast


def test_measured_constants_take_the_place_of_the_tables(tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"gemm_efficiency": {"value": 0.5, "source": "ours"}}))
    constants = load_constants(str(file))
    assert constants.gemm_efficiency == 0.5
    assert constants.sources["gemm_efficiency"] == "ours"
    assert constants.nvlink == TABLE["nvlink"].value


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"warp": {"value": 9, "source": ""}}', "warp is unknown; known: peak"),
     ('{"peak": 3}', "should be JSON"), ("{", "should be JSON"), (None, "should be JSON")],
)  # fmt: skip
def test_bad_constants_are_refused(tmp_path, text, message):
    file = tmp_path / "measured.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_constants(str(file))
