from types import SimpleNamespace

import jax
import pytest

from llama3_jax.training.hardware import peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_the_data_sheets_or_unknown(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert peak_flops()[0] == peak
