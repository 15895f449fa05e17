"""The report of a run, from metrics.jsonl to one page."""

import html.parser
import json
import os
import re
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
from conftest import write_jsonl

from llama3_jax.data import tokenizer_stats
from llama3_jax.errors import UserError
from llama3_jax.reporting import figures, page, tokenizers
from llama3_jax.reporting.page import Section, write_report
from llama3_jax.reporting.records import load

SOURCES = ("web", "code")
STAGES = {"short": (20, 64, 512), "long": (12, 128, 1024), "anneal": (8, 128, 1024)}


def train_records():
    records, step, tokens = [], 0, 0
    for stage, (steps, length, batch) in STAGES.items():
        for _ in range(steps):
            step, tokens = step + 1, tokens + batch
            losses = {"web": 4 - step / 20, "code": 5 - step / 20}
            seconds = None if step == 1 else 0.25
            records.append({
                "kind": "train", "step": step, "tokens": tokens, "stage": stage,
                "loss": sum(losses.values()) / 2, "losses": losses, "grad_norm": 2.0,
                "learning_rate": 1e-3 / step, "applied": True, "length": length,
                "batch_tokens": batch, "mix": {"web": 0.75, "code": 0.25}, "utilisation": 0.9,
                "documents": 10, "cut_documents": 1, "flops": {"full": 1.0}, "seconds": seconds,
                "tokens_per_second": batch / seconds if seconds else 0.0,
                "mfu": dict.fromkeys(("full", "causal", "document"), 0.4 if seconds else 0.0),
            })  # fmt: skip
    return records


def measured(step, tokens, web, text):
    """A validation and the samples that come with it."""
    losses = {"web": web, "code": 1.25}
    bits = {"web": web / 3, "code": 0.5}
    values = {"losses": losses, "bits_per_byte": bits, "length": 128}
    samples = [{"prompt": "Once", "text": text}]
    place = {"step": step, "tokens": tokens}
    return [
        {"kind": "validation", **place, **values},
        {"kind": "sample", **place, "samples": samples},
    ]


@pytest.fixture
def records():
    first = measured(20, 10_240, 2.5, " upon a time")
    return [*train_records(), *first, *measured(40, 30_720, 1.875, " more")]


@pytest.fixture
def report(tmp_path):
    """Writes records (and baselines) as a run and returns the text of its report."""

    def write(records, baselines=None, extra_sections=()):
        workdir = tmp_path / "demo <1>"
        workdir.mkdir(exist_ok=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (workdir / "metrics.jsonl").write_text(lines)
        (workdir / "config.json").write_text(json.dumps({"seed": 7, "note": "</pre><i>"}))
        if baselines is not None:
            (workdir / "baselines.json").write_text(json.dumps(baselines))
        path = write_report(workdir, extra_sections)
        assert path == workdir / "report.html"
        return path.read_text(encoding="utf-8")

    return write


class Elements(html.parser.HTMLParser):
    """All tags, the text of table cells row by row, and that of everything but scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.text, self._open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += f"*{data}*" if "strong" in self._open else data
        if not {"script", "style"} & set(self._open):
            self.text += data


def test_page_loads_nothing(report, records):
    text = report(records)
    tags = Elements(text).tags
    loading = {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in tags}
    assert not loading
    assert not [a for _, a in tags if {"src", "href", "srcset", "data"} & set(a)]
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert styles and not [s for s in styles if "url(" in s or "@import" in s]
    # plotly.js once, before the plots that call it.
    assert text.count("plotly.js v") == 1
    assert text.index("plotly.js v") < text.index("Plotly.newPlot(")
    assert text.lower().startswith("<!doctype html>")
    assert len(text) < 8e6


def test_plots_are_on_the_page_in_order(report, records):
    text = report(records)
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles == [
        "Training and held-out loss", "Loss on web", "Loss on code", "Learning rate", "Batch",
        "Sequence length", "Mix of sources", "Gradient norm", "Tokens per second",
        "Model FLOP/s utilisation", "Packing",
    ]  # fmt: skip
    identifiers = re.findall(r'<div id="([\w-]+)" class="plotly', text)
    assert len(identifiers) == len(set(identifiers)) == len(titles)
    assert "Thinned" not in Elements(text).text


def test_status_and_tables_are_those_of_the_records(report, records):
    elements = Elements(report(records))
    assert "step 40,\n30,720 tokens, stage anneal" in elements.text
    summary, stages = elements.rows[:4], elements.rows[4:]
    assert summary == [
        ["source", "this run", "bits per byte"],
        ["web", "1.875", "0.625"],
        ["code", "1.250", "0.500"],
        ["mean", "1.562", "0.562"],
    ]
    mix = "web 0.75, code 0.25"
    assert stages[1:] == [
        ["short", "10,240", "20", "64", "512", "0.001 to 5e-05", "2,048", mix],
        ["long", "12,288", "12", "128", "1,024", "4.76e-05 to 3.13e-05", "4,096", mix],
        ["anneal", "8,192", "8", "128", "1,024", "3.03e-05 to 2.5e-05", "4,096", mix],
    ]


def test_baselines_stand_beside_the_run_and_the_best_is_bold(report, records):
    baselines = {"unigram": {"web": 6.0, "code": 5.0}, "5-gram": {"web": 1.5}}
    text = report(records, baselines)
    assert Elements(text).rows[:4] == [
        ["source", "this run", "unigram", "5-gram", "bits per byte"],
        ["web", "1.875", "6.000", "*1.500*", "0.625"],
        ["code", "*1.250*", "5.000", "–", "0.500"],
        ["mean", "*1.562*", "5.500", "–", "0.562"],
    ]
    assert text.count('"name":"unigram 6.000"') == text.count('"name":"5-gram 1.500"') == 1


def test_without_validation_or_samples(report):
    elements = Elements(report(train_records()))
    assert "No held-out loss was measured." in elements.text
    assert "Samples" not in elements.text


def test_what_the_run_wrote_is_text_not_markup(report):
    evil = "</script><img src=x onerror=alert(1)>"
    records = train_records()
    for record in records:
        record["stage"] += evil
        record["mix"] = {evil: 1.0}
        record["losses"] = {evil: 2.0}
    records += measured(40, 30_720, 2.0, evil)
    records[-2]["losses"] = records[-2]["bits_per_byte"] = {evil: 2.0}
    text = report(records, {evil: {evil: 3.0}})
    elements = Elements(text)
    assert "img" not in {tag for tag, _ in elements.tags}
    assert f"Once{evil}" in elements.text and "</pre><i>" in elements.text
    assert elements.rows[1][0] == evil
    # plotly reads markup in names, so there it must be escaped twice.
    assert '"name":"\\u003c' not in text
    assert '"name":"&lt;\\u002fscript&gt;' in text


def test_latest_sample_first_and_the_others_in_details(report, records):
    text = report(records)
    samples = text.split("<h2>Samples</h2>")[1].split("</section>")[0]
    latest, earlier = samples.split("<details>")
    assert "<b>Once</b> more</pre>" in latest and "upon" not in latest
    assert "1 earlier" in earlier and "upon a time" in earlier


def test_steps_that_were_not_applied(report, records):
    assert "not applied" not in Elements(report(records)).text
    bad = records[9] | {"loss": "nan", "grad_norm": "inf", "applied": False}
    bad["losses"] = {"web": float("nan"), "code": 1.0}
    elements = Elements(report([*records[:9], bad, *records[10:]]))
    assert "1 of 40: the loss or the gradients were not" in elements.text
    assert elements.rows[-1] == ["10", "5,120", "short", "nan", "inf"]


def test_one_step_that_failed_is_a_report(report):
    record = train_records()[0]
    record |= {"loss": "nan", "losses": {}, "grad_norm": "nan", "applied": False, "documents": 0}
    assert "1 of 1" in Elements(report([record])).text


def test_extra_sections(report, records):
    table = page.table_html(page.Table(["a", "b"], [["x<y", "1"]]))
    plot = figures.figure_html(go.Figure(go.Scatter(x=[0, 1], y=[2, 3])), "mine")
    extra = [Section("Needle & thread", table), Section("Curve", plot)]
    text = report(records, extra_sections=extra)
    assert "<h2>Needle &amp; thread</h2>" in text and '<div id="mine"' in text
    assert Elements(text).rows[-2:] == [["a", "b"], ["x<y", "1"]]
    order = [text.index(f"<h2>{title}") for title in ("Samples", "Needle", "Curve", "Config")]
    assert order == sorted(order)


def test_statistics_of_tokenizers_become_a_section(
    report, records, command, tmp_path, byte_tokenizer
):
    report(records)
    workdir = tmp_path / "demo <1>"
    source = write_jsonl(tmp_path / "web.jsonl", {"a": "né"})
    stats = tokenizer_stats.measure([source], {"bytes": str(byte_tokenizer)})
    tokenizer_stats.save(*stats, workdir / tokenizers.FOLDER)
    result = command("report", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    elements = Elements((workdir / "report.html").read_text(encoding="utf-8"))
    assert ["web", "0.667"] in elements.rows  # 2 characters in 3 bytes
    assert "Tokenizers" in elements.text


def test_thinning_keeps_extremes_and_ends():
    values = np.random.default_rng(0).normal(size=12_345)
    values[[777, 9_001]] = -50, 60
    chosen = figures.thin(values)
    assert 1_500 < len(chosen) <= figures.POINTS
    assert {0, 777, 9_001, 12_344} <= set(chosen.tolist())
    assert (np.diff(chosen) > 0).all() and np.diff(chosen).max() < 40
    assert figures.thin(values[:2_000]).tolist() == list(range(2_000))


def test_thinned_plots_say_so(report, monkeypatch):
    monkeypatch.setattr(figures, "thin", lambda values: np.arange(0, len(values), 4))
    assert "Thinned: 10 of 40 points" in Elements(report(train_records())).text


def test_step_lines_hold_a_value_over_the_tokens_of_its_steps(report, records, tmp_path):
    report(records)
    batch = figures.schedule_plots(load(tmp_path / "demo <1>"))[1].figure.data[0]
    assert batch.line.shape == "vh"  # between two points: the value of the later one
    assert list(zip(batch.x, batch.y, strict=True)) == [
        (0, 512), (512, 512), (10_240, 512), (11_264, 1_024), (30_720, 1_024),
    ]  # fmt: skip


def test_smoothing_is_fair_to_both_sides():
    tokens = np.cumsum([1.0, 1, 1, 1, 4, 4, 4])
    line = 3 - 0.1 * tokens
    smoothed = figures.smooth(tokens, line, half_life=1.0)
    assert smoothed[2] == pytest.approx(line[2], abs=0.02)
    assert figures.smooth(tokens, np.full(7, 2.5), 3.0) == pytest.approx(2.5)
    # By hand: a neighbour one half-life away counts half.
    expected = [(1 + 5 / 2) / 1.5, (1 / 2 + 5) / 1.5]
    assert figures.smooth(tokens[:2], np.array([1.0, 5.0]), 1.0) == pytest.approx(expected)


def test_what_is_not_a_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no training step"),
        ('{"kind": "train", "st', "no training step"),
        ('{"kind": "gate", "step": 1, "tokens": 2}\n', "no training step"),
        ('{"kind": "gate", "step": 1, "tokens": 2}\nnot json\n', "line 2 is not JSON"),
        ("[1, 2]\n", "line 1 is not a record"),
        ('{"kind": "train", "step": 1, "tokens": 2}\n', "line 1: stage: Field required"),
        (
            json.dumps(train_records()[0] | {"grad_norm": "high"}) + "\n",
            "line 1: grad_norm: .* valid number",
        ),
    ],
)
def test_damaged_metrics_are_a_user_error(tmp_path, content, reason):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=reason):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_bytes_that_are_not_text_are_a_user_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "gate"}\n\xff\xfe\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        write_report(tmp_path)


def test_damaged_baselines_are_a_user_error(report, records):
    with pytest.raises(UserError, match=r"baselines\.json: unigram\.web: .* valid number"):
        report(records, {"unigram": {"web": "low"}})
    with pytest.raises(UserError, match=r"baselines\.json: unigram"):
        report(records, {"unigram": 3.0})


def test_unknown_kinds_and_a_cut_last_line_do_not_matter(report, records, tmp_path):
    whole = report([*records, {"kind": "gate", "step": 3, "tokens": 9, "passed": True}])
    metrics = tmp_path / "demo <1>" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "tra')
    assert write_report(metrics.parent).read_text(encoding="utf-8") == whole


def test_program(tmp_path):
    command = [sys.executable, "-m", "llama3_jax.report", f"--workdir={tmp_path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    failed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert failed.returncode == 2 and failed.stdout == ""
    assert re.fullmatch(r"error: .* no metrics\.jsonl\n", failed.stderr)
    lines = "".join(json.dumps(record) + "\n" for record in train_records())
    (tmp_path / "metrics.jsonl").write_text(lines)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"{tmp_path / 'report.html'}: ")
