"""Mix plans: tokens that add up, epochs that stay below the cap, and clear refusals."""

import json
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3_jax.curation.mix import (
    DEFAULT_MIX,
    AnnealingConfig,
    MixConfig,
    load_plan,
    plan_mix,
    save_plan,
)
from llama3_jax.data.mixing import Mix
from llama3_jax.errors import UserError

PLENTY = {source: 10**13 for source in DEFAULT_MIX}


def test_the_papers_mix():
    plan = plan_mix(MixConfig(total_tokens=15_600_000_000_000), PLENTY)
    assert plan.mix() == pytest.approx(DEFAULT_MIX)
    tokens = {part.source: part.tokens for part in plan.parts}
    assert tokens["general"] == 7_800_000_000_000
    assert sum(tokens.values()) == 15_600_000_000_000
    assert [part.epochs for part in plan.parts] == pytest.approx([0.78, 0.39, 0.2652, 0.1248])
    Mix(plan.mix())  # what the loader takes
    assert "general" in str(plan)


WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50), min_size=1)


@given(WEIGHTS, st.integers(1, 10**9), st.integers(1, 10**9), st.sampled_from([0.5, 1.0, 4.0]))
def test_against_exact_fractions(weights, total, size, cap):
    if not sum(weights.values()):
        return
    shares = {s: Fraction(w, sum(weights.values())) for s, w in weights.items() if w}
    available = {source: size * (i + 1) for i, source in enumerate(sorted(weights))}
    config = MixConfig(total_tokens=total, weights=weights, max_epochs=cap)
    needed = {s: share * total / available[s] for s, share in shares.items()}
    try:
        plan = plan_mix(config, available)
    except UserError:
        # Rounding to whole tokens moves a source by less than one.
        assert any(e + Fraction(1, available[s]) > cap for s, e in needed.items())
        return
    assert all(e - Fraction(1, available[s]) <= cap for s, e in needed.items())
    assert sum(part.tokens for part in plan.parts) == total
    assert {part.source for part in plan.parts} == set(shares)
    for part in plan.parts:
        assert abs(part.tokens - shares[part.source] * total) < 1
        assert part.epochs == part.tokens / available[part.source]


def test_annealing_sources_are_set_apart_and_epochs_add_up():
    annealing = AnnealingConfig(weights={"gold": 2, "silver": 1}, tokens=100, share=0.3)
    config = MixConfig(total_tokens=1100, weights={"web": 1, "code": 1}, annealing=annealing)
    plan = plan_mix(config, {"web": 1000, "code": 500, "gold": 10, "silver": 10})
    assert plan.mix() == {"web": 0.5, "code": 0.5}
    assert plan.mix("annealing") == pytest.approx(
        {"web": 0.35, "code": 0.35, "gold": 0.2, "silver": 0.1}
    )
    found = {(part.phase, part.source): part for part in plan.parts}
    assert found["annealing", "gold"].tokens == 20 and found["annealing", "gold"].epochs == 2
    assert found["main", "code"].epochs == 1
    assert found["annealing", "code"].epochs == pytest.approx((500 + 35) / 500)
    with pytest.raises(UserError, match="'web' is in the main mix as well"):
        plan_mix(
            config.model_copy(update={"annealing": AnnealingConfig(weights={"web": 1}, tokens=9)}),
            {"web": 1000, "code": 500},
        )


def test_an_impossible_mix_is_refused_with_what_would_work():
    available = PLENTY | {"math": 10**6}
    config = MixConfig(total_tokens=10**9, max_epochs=4)
    with pytest.raises(UserError, match="source 'math' would be read 250 times") as refused:
        plan_mix(config, available)
    allowed = re.search(r"works up to ([\d,]+) tokens", str(refused.value)).group(1)
    works = int(allowed.replace(",", ""))
    plan_mix(config.model_copy(update={"total_tokens": works}), available)
    with pytest.raises(UserError):
        plan_mix(config.model_copy(update={"total_tokens": works + 16}), available)


def test_files(tmp_path):
    fitted = tmp_path / "mix.json"
    fitted.write_text(json.dumps({"optimum": {"a": 0.25, "b": 0.75, "c": 0.0}}))
    config = MixConfig(total_tokens=100, weights_file=str(fitted))
    plan = plan_mix(config, {"a": 100, "b": 100})
    assert plan.mix() == {"a": 0.25, "b": 0.75}
    save_plan(tmp_path / "plan.json", plan)
    assert load_plan(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["main"] == plan.mix()
    fitted.write_text("{}")
    for broken in (fitted, tmp_path / "absent.json"):
        with pytest.raises(UserError, match="not a result of `fit mix`"):
            plan_mix(MixConfig(total_tokens=1, weights_file=str(broken)), {"a": 1})
        with pytest.raises(UserError, match="not a mix plan"):
            load_plan(broken)


@pytest.mark.parametrize(
    "config, message",
    [
        (MixConfig(total_tokens=9, weights={"a": 1, "x": 1}), "'x' has weight 0.5 .* no tokens"),
        (MixConfig(total_tokens=9, weights={"a": 0}), "one of them is positive"),
        (MixConfig(total_tokens=9, weights={}), "one of them is positive"),
        (
            MixConfig(
                total_tokens=9, weights={"a": 1},
                annealing=AnnealingConfig(weights={"b": 1}, tokens=9),
            ),
            "annealing.tokens=9: the run has 9",
        ),
    ],
)  # fmt: skip
def test_bad_input(config, message):
    with pytest.raises(UserError, match=message):
        plan_mix(config, {"a": 100, "b": 100})
