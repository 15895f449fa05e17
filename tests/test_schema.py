import ml_collections
import pytest

from llama3_jax.errors import UserError
from llama3_jax.recipe.config import RunConfig, run_config
from llama3_jax.schema import Config, parse


class Inner(Config):
    width: int
    name: str | None = None


class Outer(Config):
    inner: Inner
    items: tuple[Inner, ...] = ()
    named: dict[str, Inner] = {}


def test_config_dicts_are_parsed_wherever_they_are():
    values = ml_collections.ConfigDict({"inner": {"width": 1}, "items": [{"width": 2}]})
    values.named = {"x": {"width": 3}}
    parsed = parse(Outer, values)
    assert (parsed.inner.width, parsed.items[0].width, parsed.named["x"].width) == (1, 2, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"width": 1, "nmae": "x"}}, "config.inner.nmae: unknown key; nearest valid "
         "key: name"),
        ({"inner": {"width": 1}, "items": [{"name": "x"}]}, "config.items.0.width: required"),
        ({"inner": {"width": 1}, "items": [{"width": 1, "widht": 1}]}, "config.items.0.widht: "
         "unknown key; nearest valid key: width"),
        ({"inner": {"width": 1}, "named": {"x": {"width": 1, "wdth": 2}}}, "config.named.x.wdth: "
         "unknown key; nearest valid key: width"),
        ({"inner": {"width": "wide"}}, "config.inner.width: Input should be a valid integer"),
        ({}, "config.inner: required key is missing"),
    ],
)  # fmt: skip
def test_the_first_bad_key_is_named_with_its_path(values, message):
    with pytest.raises(UserError) as error:
        parse(Outer, values)
    assert message in str(error.value)


def test_configs_hold_their_defaults_and_can_be_parsed_again():
    config = run_config(
        model=dict(dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=16),
        data=dict(sources=dict(a=dict(train="x"))),
        stages=[dict(name="only", tokens=10)],
        checkpoint=dict(every_steps=1),
    )
    assert config.optimizer.weight_decay == 0.1 and config.model.rope.theta == 500_000.0
    parsed = parse(RunConfig, config)
    assert parsed.checkpoint.keep_every is None and parsed.stages[0].length is None
    config.checkpoint.keep_every = 5
    assert parse(RunConfig, config).checkpoint.keep_every == 5
