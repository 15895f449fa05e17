"""A trace of steps, and where their time went."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from llama3_jax.errors import UserError
from llama3_jax.training.trace import Trace, parse_steps, summarize


@pytest.mark.parametrize("text", ["5", "5:0", "a:1", "1:2:3", "-1:2"])
def test_what_is_no_step_and_count_is_refused(text):
    with pytest.raises(UserError, match=f"--profile={text}: should be STEP:COUNT"):
        parse_steps(text)


def written(folder, *events):
    place = folder / "plugins/profile/now"
    place.mkdir(parents=True)
    text = json.dumps({"traceEvents": list(events)})
    (place / "host.trace.json.gz").write_bytes(gzip.compress(text.encode()))


def operation(name, start, duration, pid=1, **args):
    return dict(ph="X", pid=pid, ts=start, dur=duration, name=name, args=dict(hlo_op=name) | args)


def test_each_moment_counts_once_and_collectives_where_nothing_computes(tmp_path):
    written(
        tmp_path,
        operation("gemm_fusion.1", 0, 100), operation("nccl_AllGather", 50, 100),
        operation("flash_forward", 90, 30), operation("loop_add_fusion", 200, 50),
        operation("gemm_other_device", 0, 500, pid=2),
        dict(ph="X", pid=1, ts=0, dur=9_999, name="python", args={}),
    )  # fmt: skip
    summary = summarize(tmp_path, 2)
    parts = {name: round(seconds * 1e6) for name, seconds in summary["parts"].items()}
    assert parts == {
        "product": 100, "attention": 20, "other": 50, "exposed collective": 30, "idle": 50
    }  # fmt: skip
    assert sum(parts.values()) == round(summary["seconds"] * 1e6) == 250
    assert round(summary["collective"] * 1e6) == 100


def test_a_trace_without_operations_is_named(tmp_path):
    written(tmp_path)
    with pytest.raises(UserError, match="holds no operation"):
        summarize(tmp_path, 1)


def test_the_steps_that_were_asked_for_are_recorded(tmp_path):
    function, x, said = jax.jit(lambda x: x @ x), jnp.ones((256, 256)), []
    trace = Trace((1, 2), tmp_path, said.append)
    for step in range(4):
        trace.before(step)
        x = function(x)
        trace.after(step, x)
    assert len(said) == 1 and said[0].startswith("profile of 2 steps in ")
    summary = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert summary["steps"] == 2 and summary["parts"]["product"] > 0
