import json

import pytest

from llama3_jax.errors import UserError
from llama3_jax.reporting import survival
from llama3_jax.training.events import Events
from llama3_jax.training.goodput import CATEGORIES, summary

SECONDS = dict.fromkeys(CATEGORIES, 0.0)
SESSIONS = [
    {"start": 0.0, "end": 600.0, "seconds": SECONDS | {"step": 500.0, "lost_work": 100.0}},
    {"start": 700.0, "end": 1000.0, "seconds": SECONDS | {"step": 250.0, "compile": 50.0}},
]
EVENT = {
    "kinds": ["loss_spike"], "action": "rewind", "stage": "long<", "step": 48, "batch": 28,
    "tokens": 12288, "loss": 3.04, "grad_norm": "nan", "grad_norm_band": None,
    "loss_band": {"median": 2.2, "deviation": 0.17, "limit": 2.93, "steps": 12},
    "documents": ["a:1", "a:2"], "rewound_to": 45, "left_out": {"1": [25, 26, 27, 28]},
}  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "goodput.json").write_text(json.dumps(summary(SESSIONS)))
    Events(tmp_path, writes=True).add(EVENT)
    return tmp_path


def test_the_waterfall_ends_at_useful_training(workdir):
    goodput = survival.read(workdir / "goodput.json")
    plot = survival.waterfall(goodput)
    bars = dict(zip(plot.figure.data[0].x, plot.figure.data[0].y, strict=True))
    assert list(bars)[0] == "elapsed" and list(bars)[-1] == "useful training"
    minutes = {"elapsed": 1000 / 60, "lost work": -100 / 60, "down": -100 / 60, "compile": -50 / 60}
    assert {k: v for k, v in bars.items() if k != "useful training"} == pytest.approx(minutes)
    assert sum(bars.values()) == pytest.approx(750 / 60)
    assert "Effective training time 75.0%" in plot.caption and "2 starts" in plot.caption


def test_the_section_has_times_and_events(workdir):
    (section,) = survival.sections(workdir)
    for text in (">lost work</", "10.0%", "loss spike", "rewind to 45", "3.04 / 2.93",
                 "nan / –", "long&lt;"):  # fmt: skip
        assert text in section.html


def test_runs_without_any_and_damaged_ones(tmp_path):
    assert survival.sections(tmp_path) == []
    (tmp_path / "goodput.json").write_text('{"seconds": {}}')
    with pytest.raises(UserError, match="goodput.json: damaged"):
        survival.sections(tmp_path)
