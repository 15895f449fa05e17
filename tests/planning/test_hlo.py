"""Reading collectives out of a program's text."""

import pytest

from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.planning.case import Case
from llama3_jax.planning.hlo import collectives, overlap, totals
from llama3_jax.training.optimizer import OptimizerConfig

MODEL = ModelConfig(dim=64, layers=6, heads=4, kv_heads=4, head_dim=16, ffn_dim=128)
# 32 GPUs: tensor innermost, hosts of 8.
MESH = MeshConfig(data=4, pipe=2, context=1, tensor=4, virtual_stages=3)
CASE = Case("x", MODEL, OptimizerConfig(), MESH, 32, 128, 4, 1)


def entry(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def gather(groups: str) -> str:
    return entry(
        f"%g = bf16[16,64]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}, "
        'metadata={op_name="jit(step)/all_gather"}'
    )


@pytest.mark.parametrize(
    ("groups", "axes", "link"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("tensor",), "NVLink"),
        ("replica_groups={{0,8,16,24},{1,9,17,25}}", ("data",), "network"),
        ("replica_groups=[8,4]<=[32]", ("tensor",), "NVLink"),
        ("replica_groups=[8,4]<=[4,8]T(1,0)", ("data",), "network"),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=4] {'c'}", ("tensor",), "NVLink"),
        ("replica_groups=mesh['a'=4,'b'=8], device_ids=([8,4]T(1,0)) {'b'}", ("pipe", "tensor"),
         "NVLink"),
        ("replica_groups=mesh['a'=4,'b'=8] {'a'}", ("data",), "network"),
    ],
)  # fmt: skip
def test_groups_of_every_form_become_axes_and_a_link(groups, axes, link):
    if "device_ids" in groups:  # the order of devices is transposed: a stride of four
        axes, link = ("data", "pipe"), "network"
    (found,) = collectives(gather(groups), CASE)
    assert (found.axes, found.link) == (axes, link)


def test_a_form_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="replica groups of an unknown form"):
        collectives(gather("replica_groups=<something new>"), CASE)


GROUP = "replica_groups={{0,1,2,3},{4,5,6,7}}"


@pytest.mark.parametrize(
    ("line", "received"),
    [
        # 16 x 64 bfloat16 in all, three quarters of it from others.
        (f"%a = bf16[16,64] all-gather(%p), {GROUP}", 1536),
        (f"%a = (bf16[4,64], bf16[16,64]) all-gather-start(%p), {GROUP}", 1536),
        (f"%a = f32[4,64] reduce-scatter(%p), {GROUP}", 3072),
        (f"%a = ((f32[16,64]), f32[4,64]) reduce-scatter-start(%p), {GROUP}", 3072),
        (f"%a = f32[16,64] all-reduce(%p), {GROUP}", 2 * 3072),
        (f"%a = (f32[8,64], f32[8,64]) all-reduce(%p), {GROUP}", 2 * 3072),
        (f"%a = f32[16,64] all-reduce-start(%p), {GROUP}", 2 * 3072),
        (f"%a = ((f32[16,64]), f32[16,64]) all-reduce-start(%p), {GROUP}", 2 * 3072),
        ("%a = bf16[16,64] collective-permute(%p), source_target_pairs={{0,4},{4,0}}", 2048),
        ("%a = (bf16[16,64], bf16[16,64]) collective-permute-start(%p), "
         "source_target_pairs={{0,4},{4,0}}", 2048),
    ],
)  # fmt: skip
def test_bytes_that_a_gpu_receives(line, received):
    (found,) = collectives(entry(line), CASE)
    assert found.bytes == received


NESTED = """HloModule m

%layer (a: f32[8]) -> f32[8] {
  %g = bf16[16,64] all-gather(%a), replica_groups={{0,1,2,3}}
}

%head (a: f32[8]) -> f32[8] {
  %r = f32[4,64] reduce-scatter(%a), replica_groups={{0,1,2,3}}
}

%forward (a: f32[8]) -> f32[8] {
  %w = f32[8] while(%a), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"2"}}
  %h = f32[8] while(%a), condition=%c, body=%head, metadata={op_name="jit(f)/pipeline.forward/while/body/pipeline.head/while"}
}

%tick (a: f32[8]) -> f32[8] {
  %w = f32[8] while(%a), condition=%c, body=%forward, metadata={op_name="jit(f)/while/body/pipeline.forward/while"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=%c, body=%tick, backend_config={"known_trip_count":{"n":"TICKS"}}
}
"""


def test_loops_count_as_often_as_they_turn():
    ticks = CASE.schedule.exchanges("forward")  # ticks of which some rank runs a forward
    by_kind = {c.kind: c for c in collectives(NESTED.replace("TICKS", str(ticks)), CASE)}
    # Each rank runs 4 micro-batches through 3 chunks; one of 6 chunks has the head.
    assert by_kind["all-gather"].turns == pytest.approx(4 * 3 * 2)
    assert by_kind["reduce-scatter"].turns == pytest.approx(4 * 3 / 6)
    assert totals([*by_kind.values()])["all-gather", ("tensor",), "NVLink"] == 24 * 1536


def test_a_loop_of_unknown_turns_is_refused():
    text = NESTED.replace("TICKS", "9").replace("pipeline.forward", "elsewhere")
    with pytest.raises(UserError, match="a loop of unknown turns"):
        collectives(text.replace("pipeline.head", "elsewhere"), CASE)


@pytest.mark.parametrize("between, hidden", [("gemm_fusion_dot.1", True), ("loop_add", False)])
def test_what_is_scheduled_under_a_collective(between, hidden):
    kind = "__triton_nested_gemm_fusion" if hidden else "__triton"
    text = entry(
        f"%s = (bf16[4,64], bf16[16,64]) all-gather-start(%p), {GROUP}",
        f'%{between} = f32[8] fusion(%p), kind=kCustom, calls=%{between}, backend_config={{"kind":"{kind}"}}',
        "%d = bf16[16,64] all-gather-done(%s)",
        "%after_gemm_fusion = f32[8] fusion(%p), kind=kCustom, calls=%gemm_fusion_dot.2",
    )
    (found,) = collectives(text, CASE)
    assert found.hidden == hidden


def test_a_loop_with_products_hides_and_shares_are_by_axes():
    """A gather runs under a loop that multiplies; another waits at once; a third lies in a wrapper."""
    text = """HloModule m

%gather (a: f32[8]) -> f32[8] {
  ROOT %in = bf16[16,64] all-gather(%a), replica_groups={{0,1,2,3}}
}

%layer (a: f32[8]) -> f32[8] {
  %x = f32[8] dot(%a, %a)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %s = (bf16[4,64], bf16[16,64]) all-gather-start(%p), GROUP
  %w = f32[8] while(%p), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"2"}}
  %d = bf16[16,64] all-gather-done(%s)
  %t = (bf16[4,64], bf16[16,64]) all-gather-start(%p), GROUP
  %e = bf16[16,64] all-gather-done(%t)
  %u = ((f32[8]), f32[8]) async-start(%p), calls=%gather
  %f = f32[8] async-done(%u)
  %r = (bf16[4,64], u32[], token[]) recv(%k), frontend_attributes={_xla_send_recv_source_target_pairs="{{0,4},{4,0}}"}
  %y = f32[8] dot(%p, %p)
  %rd = (bf16[4,64], token[]) recv-done(%r)
}
""".replace("GROUP", GROUP)
    found = collectives(text, CASE)
    assert [(c.kind, c.hidden) for c in found] == [
        ("all-gather", True), ("all-gather", False), ("all-gather", False),
        ("collective-permute", True),
    ]  # fmt: skip
    shares = overlap(found)
    assert shares["all_gather"]["tensor"] == pytest.approx(1 / 3)
    assert shares["permute"]["pipe"] == 1 and found[-1].bytes == 512


def test_turns_of_a_loop_that_xla_peeled():
    text = """HloModule m

%body (a: f32[8]) -> f32[8] {
  %g = bf16[16,64] all-gather(%a), replica_groups={{0,1,2,3}}
}

%compare (a: s32[]) -> pred[] {
  %bound = s32[] constant(7)
  ROOT %lt = pred[] compare(%a, %bound), direction=LT
}

%condition (a: (s32[])) -> pred[] {
  ROOT %f = pred[] fusion(%a), kind=kLoop, calls=%compare
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %first = s32[] constant(4)
  %copy = s32[] copy(%first)
  %t = (s32[], f32[8]) tuple(%copy, %p)
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body, backend_config={"known_induction_variable":{"tuple_index":"0"}}
}
"""
    (found,) = collectives(text, CASE)
    assert found.turns == 3
