"""The statistics of tokenizers as tables and plots, in a run's report or a page of their own."""

import html
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from llama3_jax.data.tokenizer_stats import STATS_FILE
from llama3_jax.errors import UserError
from llama3_jax.files import write_text
from llama3_jax.reporting import figures
from llama3_jax.reporting.page import Section, Table, table_html

FOLDER = "tokenizer_stats"
MEASURES = {
    "characters_per_token": "Characters per token",
    "bytes_per_token": "Bytes per token",
    "tokens_per_word": "Tokens per word",
}
_POINTS = 300
_LONGEST = 60  # characters of a token that are shown


def sections(workdir: Path) -> list[Section]:
    """The report's section on tokenizers, if the run has statistics of them.

    Raises:
      UserError: they are damaged.
    """
    directory = workdir / FOLDER
    if not (directory / STATS_FILE).exists():
        return []
    return [section(*read(directory))]


def read(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `tokenizer_stats.save` wrote."""
    try:
        stats = json.loads((directory / STATS_FILE).read_bytes())
        usage = {name: np.load(directory / f"usage_{name}.npy") for name in stats["tokenizers"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}: damaged statistics of tokenizers ({error})") from None
    return stats, usage


def section(stats: dict[str, Any], usage: dict[str, np.ndarray]) -> Section:
    parts = [
        figures.figure_html(compression_figure(stats), "tokenizer-compression"),
        *(f"<h3>{title}</h3>{table_html(measure_table(stats, key))}"
          for key, title in MEASURES.items()),
        f"<h3>Use of the ids</h3>{table_html(use_table(stats))}",
        figures.figure_html(use_figure(usage), "tokenizer-use"),
    ]  # fmt: skip
    return Section("Tokenizers", "\n".join(parts))


def measure_table(stats: dict[str, Any], key: str) -> Table:
    """One measure: a row for each source and language, a column for each tokenizer."""
    names = list(stats["tokenizers"])
    rows = [
        [text_name(text), *(f"{text[key][name]:.3f}" for name in names)]
        for text in [*stats["texts"], {"source": "all", "language": "", **stats["all"]}]
    ]
    return Table(["text", *names], rows)


def use_table(stats: dict[str, Any]) -> Table:
    """How much of each vocabulary was used, and its longest tokens."""
    rows = []
    for name, use in stats["tokenizers"].items():
        longest = ", ".join(_shown(token["text"]) for token in use["longest"][:3])
        most = ", ".join(_shown(t["text"]) + f" {t['share']:.1%}" for t in use["most_used"][:3])
        rows.append([
            name, f"{use['vocab_size']:,}", f"{use['used']:,}", f"{use['used_share']:.1%}",
            most, longest,
        ])  # fmt: skip
    columns = ["tokenizer", "vocabulary", "ids used", "share", "most used", "longest"]
    return Table(columns, rows, words=["most used", "longest"])


def compression_figure(stats: dict[str, Any]) -> go.Figure:
    """Characters per token of each tokenizer, side by side for each text."""
    texts = [html.escape(text_name(text)) for text in stats["texts"]]
    bars = [
        go.Bar(
            name=html.escape(name),
            x=texts,
            y=[text["characters_per_token"][name] for text in stats["texts"]],
            marker={"color": colour},
        )
        for name, colour in zip(stats["tokenizers"], itertools.cycle(figures.COLOURS))
    ]
    return go.Figure(bars, _layout(yaxis={"title": {"text": "characters per token"}}))


def use_figure(usage: dict[str, np.ndarray]) -> go.Figure:
    """Share of all tokens that each id has, ids in falling order."""
    lines = []
    for (name, counts), colour in zip(usage.items(), itertools.cycle(figures.COLOURS)):
        used = np.sort(counts[counts > 0])[::-1]
        if not len(used):
            continue
        places = np.unique(np.geomspace(1, len(used), _POINTS).astype(int)) - 1
        lines.append(
            go.Scatter(
                name=html.escape(name), x=places + 1, y=used[places] / used.sum(), mode="lines",
                line={"color": colour, "width": 1.5},
            )
        )  # fmt: skip
    axes = {
        "xaxis": {"type": "log", "title": {"text": "ids by use"}},
        "yaxis": {"type": "log", "title": {"text": "share of all tokens"}, "exponentformat": "e"},
    }
    return go.Figure(lines, _layout(**axes))


def write_page(stats: dict[str, Any], usage: dict[str, np.ndarray], path: Path) -> None:
    """The plots as a page of their own, which opens offline."""
    body = section(stats, usage)
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:76rem;padding:0 1rem}"
        "th,td{padding:.3rem .7rem;text-align:right}th:first-child,.words{text-align:left}"
        "table{border-collapse:collapse}tr{border-bottom:1px solid #ddd}"
    )
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Tokenizers</title>'
        f"<style>{style}</style><script>{get_plotlyjs()}</script></head>\n"
        f"<body><h1>{body.title}</h1>\n{body.html}\n</body></html>\n",
    )


def text_name(text: dict[str, Any]) -> str:
    source, language = text["source"], text["language"]
    return source if language in ("", source) else f"{source} {language}"


def _layout(**axes: Any) -> dict[str, Any]:
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    margin = {"l": 60, "r": 14, "t": 8, "b": 60}
    return {"height": 360, "margin": margin, "barmode": "group", "legend": legend, **axes}


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")
