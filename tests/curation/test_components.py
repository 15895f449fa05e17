"""Components by scipy and by rounds, against union and find; and the trap that the rounds avoid."""

import daft
import pytest
from daft import col
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation import components
from tests.curation import frames

edges = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(lambda e: e[0] != e[1]), min_size=1, max_size=40)  # fmt: skip


def union_find(pairs: list[tuple[str, str]]) -> dict[str, str]:
    parent = {node: node for pair in pairs for node in pair}

    def root(node):
        while parent[node] != node:
            node = parent[node]
        return node

    for one, other in pairs:
        low, high = sorted([root(one), root(other)])
        parent[high] = low
    return {node: root(node) for node in parent}


def named(pairs):
    return sorted({tuple(sorted([f"n{a:02}", f"n{b:02}"])) for a, b in pairs})


@settings(max_examples=40, deadline=None)
@given(edges)
def test_in_memory(pairs):
    pairs = named(pairs)
    table = daft.from_pylist([{"low": a, "high": b} for a, b in pairs]).to_arrow()
    out = components.in_memory(table).to_pydict()
    assert dict(zip(out["node"], out["component"], strict=True)) == union_find(pairs)


@pytest.mark.parametrize(
    "pairs",
    [
        [(n, n + 1) for n in range(33)],  # a chain: the worst for naive rounds
        [(0, n) for n in range(1, 20)],
        [(n, 20) for n in range(20)],
        [(n, (7 * n + 3) % 41) for n in range(41) if n != (7 * n + 3) % 41],
        [(2 * n, 2 * n + 1) for n in range(10)],
    ],
    ids=["chain", "star out", "star in", "tangle", "pairs"],
)
def test_by_rounds(tmp_path, pairs):
    pairs = named(pairs)
    rows = [{"low": a, "high": b} for a, b in pairs]
    out = components.by_rounds(frames.frame(rows, tmp_path / "edges", 3), tmp_path).to_pylist()
    assert len(out) == len({row["node"] for row in out})
    assert {row["node"]: row["component"] for row in out} == union_find(pairs)


@settings(max_examples=5, deadline=None)
@given(edges)
def test_rounds_give_what_memory_gives(tmp_path_factory, pairs):
    pairs = named(pairs)
    folder = tmp_path_factory.mktemp("rounds")
    rows = [{"low": a, "high": b} for a, b in pairs]
    out = components.by_rounds(frames.frame(rows, folder / "edges", 2), folder).to_pylist()
    assert {row["node"]: row["component"] for row in out} == union_find(pairs)


def test_inequality_as_a_column_keeps_its_rows_on_parquet(tmp_path):
    """Daft's where(a != b) on parquet with statistics has been seen to return nothing: never use it."""
    rows = [{"low": "a", "high": "b", "n": number} for number in range(5)]
    rows += [{"low": "a", "high": "a", "n": 9}]
    frame = frames.frame(rows, tmp_path / "one")
    apart = frame.with_column("apart", col("low") != col("high")).where(col("apart"))
    assert apart.count_rows() == 5
    greater = frame.with_column("apart", col("high") > col("low")).where(col("apart"))
    assert greater.count_rows() == 5
    joined = frame.join(frame.select("n", col("low").alias("other")), on="n")
    joined = joined.with_column("apart", col("high") > col("other")).where(col("apart"))
    assert joined.count_rows() == 5
