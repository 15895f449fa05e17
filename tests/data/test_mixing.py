import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.data.mixing import Mix
from llama3_jax.errors import UserError

weights = st.lists(
    st.one_of(st.just(0.0), st.sampled_from([0.25, 0.5, 1.0]), st.floats(1e-4, 10)),
    min_size=1,
    max_size=6,
).filter(any)


@given(weights, st.integers(0, 2000), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_any_part_of_the_order_equals_the_same_part_of_the_whole(values, start, length):
    mix = Mix({str(i): value for i, value in enumerate(values)})
    assert mix.draw(start, start + length) == mix.draw(0, start + length)[start:]


@given(weights, st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_counts_keep_to_the_weights(values, rows):
    mix = Mix({str(i): value for i, value in enumerate(values)})
    counts, total = mix.counts(rows), sum(values)
    assert sum(counts.values()) == rows
    for name, count in counts.items():
        expected = rows * values[int(name)] / total
        assert abs(count - expected) <= len(values) / 2 + 1e-6


@given(weights, st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_each_source_gives_its_rows_in_order(values, rows):
    mix = Mix({str(i): value for i, value in enumerate(values)})
    seen: dict[str, int] = {}
    for source, row in mix.draw(0, rows):
        assert row == seen.get(source, 0)
        seen[source] = row + 1
    assert seen == {name: count for name, count in mix.counts(rows).items() if count}


def test_a_source_of_weight_zero_is_never_drawn():
    mix = Mix({"a": 1.0, "never": 0.0, "b": 1e-3})
    assert {source for source, _ in mix.draw(0, 5000)} == {"a", "b"}


def test_far_out_rows_are_drawn_at_once():
    mix = Mix({"general": 0.5, "math": 0.25, "code": 0.17, "multilingual": 0.08})
    rows = 10**10
    assert sum(mix.counts(rows).values()) == rows
    assert len(mix.draw(rows, rows + 100)) == 100


@pytest.mark.parametrize("bad", [{"a": -1.0}, {"a": float("nan")}, {"a": 0.0}, {}])
def test_bad_weights_are_refused(bad):
    with pytest.raises(UserError, match="mix"):
        Mix(bad)
