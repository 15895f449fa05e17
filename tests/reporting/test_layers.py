"""Heat maps of layers: what is shown is what the records hold."""

import numpy as np

from llama3_jax.reporting import layers


def record(tokens: int, scale: float) -> dict:
    rms = [scale, 10 * scale, float("nan")]
    one = {"rms": rms, "largest": [9 * scale] * 3}
    found = {name: one for name in ("output", "ffn/up/gradient", "ffn/up/update")}
    found["ffn/down/gradient"] = {"rms": [7 * scale] * 3, "largest": [1.0] * 3}
    return {"kind": "train", "tokens": tokens, "layers": found}


def test_a_run_without_statistics_has_no_section():
    assert layers.sections([{"kind": "train", "tokens": 1}, {"kind": "validation"}]) == []


def test_each_statistic_by_layer_and_tokens():
    (section,) = layers.sections([record(100, 1.0), record(200, 2.0)])
    for title in ("output, root mean square", "output, largest absolute value",
                  "Gradients, root mean square", "Updates, root mean square"):  # fmt: skip
        assert title in section.html
    values = layers._values(
        record(1, 1.0)["layers"], ["ffn/up/gradient", "ffn/down/gradient"], "rms"
    )
    np.testing.assert_allclose(values, [5.0, np.sqrt((100 + 49) / 2), np.nan])
    plot = layers._plot("t", [100, 200], [np.array([1.0, 0.0]), np.array([100.0, 10.0])])
    (heat,) = plot.figure.data
    np.testing.assert_allclose(np.array(heat.z, float), [[0.0, 2.0], [np.nan, 1.0]])
