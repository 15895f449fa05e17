"""Connected components of a graph whose nodes are strings: by scipy, or by rounds where it is large.

The rounds are large-star and small-star (Kiveris et al. 2014, "Connected Components in MapReduce
and Beyond"): groups and joins only, each round written to parquet before the next. Without that a
plan of n rounds is computed again in each, which took minutes where this takes seconds.
"""

import shutil
from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse
from daft import col
from daft import functions as F


def in_memory(edges: pa.Table) -> pa.Table:
    """(node, component) of the nodes of `edges` (low, high); a component is named by its least node."""
    nodes = pc.unique(
        pa.chunked_array(edges["low"].chunks + edges["high"].chunks, pa.large_string())
    )
    nodes = nodes.take(pc.sort_indices(nodes))
    low = pc.index_in(edges["low"], nodes).to_numpy()
    high = pc.index_in(edges["high"], nodes).to_numpy()
    graph = scipy.sparse.coo_array((np.ones(len(low), bool), (low, high)), (len(nodes), len(nodes)))
    count, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    least = np.full(count, len(nodes))
    np.minimum.at(least, labels, np.arange(len(nodes)))
    return pa.table({"node": nodes, "component": nodes.take(pa.array(least[labels]))})


def by_rounds(edges: daft.DataFrame, scratch: Path) -> daft.DataFrame:
    """The same from a frame of any size, by rounds in folders under `scratch`."""
    edges = edges.select("low", "high")
    number = 0
    while True:
        folder = fresh(scratch / f"round-{number}")
        _small_star(_large_star(edges)).write_parquet(str(folder))
        if number:
            shutil.rmtree(scratch / f"round-{number - 1}")
        edges = daft.read_parquet(str(folder / "*.parquet"))
        if _is_star(edges):
            break
        number += 1
    centres = edges.select(col("low").alias("node"), col("low").alias("component")).distinct()
    leaves = edges.select(col("high").alias("node"), col("low").alias("component"))
    return leaves.concat(centres)


def fresh(folder: Path) -> Path:
    """The folder, empty: what a killed run left there is no part of this one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _large_star(edges: daft.DataFrame) -> daft.DataFrame:
    """Ties each node's greater neighbours to the least of its neighbourhood."""
    both = edges.concat(edges.select(col("high").alias("low"), col("low").alias("high")))
    both = both.select(col("low").alias("node"), col("high").alias("neighbour"))
    least = both.groupby("node").agg(col("neighbour").min().alias("least"))
    own = F.when(col("least") < col("node"), col("least")).otherwise(col("node"))
    least = least.select("node", own.alias("least"))
    tied = both.join(least, on="node").with_column("greater", col("neighbour") > col("node"))
    tied = tied.where(col("greater"))
    return tied.select(col("least").alias("low"), col("neighbour").alias("high")).distinct()


def _small_star(edges: daft.DataFrame) -> daft.DataFrame:
    """Ties each node, and its lesser neighbours, to the least of these."""
    least = edges.groupby("high").agg(col("low").min().alias("least"))
    tied = edges.join(least, on="high").with_column("apart", col("low") > col("least"))
    others = tied.where(col("apart")).select(col("least").alias("low"), col("low").alias("high"))
    return others.concat(least.select(col("least").alias("low"), "high")).distinct()


def _is_star(edges: daft.DataFrame) -> bool:
    """Whether every node is either a centre or tied to one centre."""
    leaves = edges.select("high").distinct()
    if leaves.count_rows() < edges.count_rows():
        return False
    centres = edges.select(col("low").alias("high")).distinct()
    return leaves.join(centres, on="high").count_rows() == 0
