"""Layers over chunks of a pipeline."""

import numpy as np
import pytest

from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.parallel.stages import from_stages, make_stages, places_of_layers, to_stages


def sizes(layers: int, P: int, V: int = 1) -> list[int]:
    """Layers of each chunk in the network's order."""
    counts = make_stages(layers, MeshConfig(pipe=P, virtual_stages=V)).counts
    return [counts[chunk % P][chunk // P] for chunk in range(P * V)]


@pytest.mark.parametrize(
    "layers, P, V, expected",
    [
        (126, 16, 1, [7, *[8] * 14, 7]),  # Llama 3 405B
        (126, 16, 8, [0, *[1] * 126, 0]),
        (126, 4, 4, [7, *[8] * 14, 7]),
        (32, 4, 2, [4] * 8),
        (31, 4, 1, [7, 8, 8, 8]),  # one to spare: the first, which holds the embedding
        (30, 4, 1, [7, 8, 8, 7]),
        (29, 4, 1, [7, 8, 7, 7]),
        (6, 8, 1, [0, 1, 1, 1, 1, 1, 1, 0]),
        (1, 2, 1, [0, 1]),
    ],
)
def test_the_first_and_the_last_chunk_are_lighter(layers, P, V, expected):
    assert sizes(layers, P, V) == expected


def test_any_number_of_layers_lies_over_any_number_of_chunks():
    random = np.random.default_rng()
    for _ in range(200):
        P, V = int(random.integers(2, 9)), int(random.integers(1, 5))
        layers = int(random.integers(1, 5 * P * V))
        config = MeshConfig(pipe=P, virtual_stages=V)
        stages, each = make_stages(layers, config), sizes(layers, P, V)
        assert sum(each) == layers and max(each) - min(each) <= 1
        assert stages.most == max(each) and stages.even == (min(each) == max(each))
        assert each[0] == min(each)
        if each.count(min(each)) > 1:
            assert each[-1] == min(each)
        # Each chunk holds its layers in a row and its empty places at the end.
        order = np.array(stages.order).reshape(P, V, stages.most)
        starts = np.concatenate([[0], np.cumsum(each)])
        for chunk, size in enumerate(each):
            expected = [*range(starts[chunk], starts[chunk] + size), *[-1] * (stages.most - size)]
            assert order[chunk % P, chunk // P].tolist() == expected
        assert np.array(stages.order)[places_of_layers(stages)].tolist() == list(range(layers))


@pytest.mark.parametrize("layers, P, V", [(7, 4, 1), (5, 2, 3), (8, 2, 2), (1, 4, 2)])
def test_to_stages_and_back(layers, P, V):
    stages = make_stages(layers, MeshConfig(pipe=P, virtual_stages=V))
    x = {"w": np.random.default_rng().normal(size=(layers, 3, 2)).astype(np.float32)}
    stacked = to_stages(x, stages)
    assert stacked["w"].shape == (P * V * stages.most, 3, 2)
    empty = np.array(stages.order) < 0
    assert not np.asarray(stacked["w"])[empty].any()
    np.testing.assert_array_equal(from_stages(stacked, stages)["w"], x["w"])
