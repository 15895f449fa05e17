"""What a person sees while a run goes on: a live bar, or plain lines where there is no terminal."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class RunProgress:
    """Shows stage, loss, tokens, tokens/s, MFU (where known) and the time left; nothing where `quiet`."""

    def __init__(self, total_tokens: int, tokens: int, log_every: int, quiet: bool = False):
        self._total, self._log_every = total_tokens, log_every
        self._console = Console(file=sys.stdout, soft_wrap=True, quiet=quiet)
        self._live = self._console.is_terminal
        self._begun, self._first_tokens = time.monotonic(), tokens
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("start", total=total_tokens, completed=tokens, text="")
        self._progress.start()

    def step(self, record: dict[str, Any], last: bool) -> None:
        """Shows a train record of metrics.jsonl."""
        left = self._time_left(record["tokens"])
        mfu = f"MFU {record['mfu']['document']:.0%}  " if record["mfu"] else ""
        text = (
            f"loss {record['loss']:.4f}  {_count(record['tokens'])}/{_count(self._total)} tokens  "
            f"{record['tokens_per_second']:,.0f}/s  {mfu}left {left}"
        )
        stage = record["stage"]
        self._progress.update(self._task, completed=record["tokens"], description=stage, text=text)
        if not self._live and (last or record["step"] % self._log_every == 0):
            self.say(f"{stage}: step {record['step']}  {text}")

    def set_total(self, tokens: int) -> None:
        """The run has become longer or shorter."""
        self._total = tokens
        self._progress.update(self._task, total=tokens)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()

    def _time_left(self, tokens: int) -> str:
        done = tokens - self._first_tokens
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - self._begun) / done * (self._total - tokens)
        hours, seconds = divmod(int(seconds), 3600)
        return f"{hours}:{seconds // 60:02}:{seconds % 60:02}"


def _count(tokens: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)
