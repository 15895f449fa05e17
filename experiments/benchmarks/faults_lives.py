"""Starts a tiny training run, breaks it, and starts the same command again, for faults.py."""

import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.benchmarks.faults_run import EVERY, STAGES, STEPS
from llama3_jax import cli
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.data.tokenizing import Options, tokenize
from llama3_jax.parallel.liveness import EXIT_HUNG, EXIT_LOST
from llama3_jax.training.checkpoint import CHECKPOINTS
from llama3_jax.training.metrics import METRICS_FILE

# After these a launcher starts the same command again: killed, a peer lost, hung, asked to requeue.
AGAIN = (-signal.SIGKILL, EXIT_LOST, EXIT_HUNG, cli.EXIT_REQUEUE)
MOST_LIVES = 60
CONFIG = "experiments/benchmarks/faults_run.py"
END, HALF = STEPS * len(STAGES), STEPS * len(STAGES) // 2

console = Console(width=None if Console().is_terminal else 160, highlight=False)


@dataclasses.dataclass
class Life:
    """One start of the command: process by process what it ended with, and the steps it saw.

    `reached` is None where it ended before it had opened the run.
    """

    codes: list[int]
    last_lines: list[str]
    began: int
    reached: int | None


class Program:
    """Starts the training command; all processes share one compilation cache."""

    def __init__(self, folder: Path):
        self.folder, self._children = folder, []
        corpora = folder / "corpora"
        make_corpora(corpora)
        self._config = f"--config={CONFIG}:{corpora}"

    def start(
        self, workdir: Path, *arguments: str, processes: int = 1, faults: tuple[str, ...] = ("",),
        devices: int = 2, measured: bool = False,
    ) -> list[subprocess.Popen]:  # fmt: skip
        """`faults` are those of each process (see faults_program.py); "" is none."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(self.folder / "compiled")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        }
        common = [
            self._config + (",measured" if measured else ""),
            f"--workdir={workdir}",
            *arguments,
        ]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            common += ["--distributed=explicit", f"--coordinator=127.0.0.1:{port}",
                       f"--processes={processes}", "--heartbeat_timeout=5"]  # fmt: skip
        begun = []
        for process in range(processes):
            fault = faults[process % len(faults)]
            module = "experiments.benchmarks.faults_program" if fault else "llama3_jax.train"
            own = [f"--process_id={process}"] if processes > 1 else []
            output = tempfile.TemporaryFile("w+")
            child = subprocess.Popen(
                [sys.executable, "-m", module, *common, *own],
                stdout=output, stderr=subprocess.STDOUT, text=True, env=environment | {"FAULT": fault},
            )  # fmt: skip
            child.output = output
            begun.append(child)
        self._children += begun
        return begun

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()


def make_corpora(folder: Path) -> None:
    """Two corpora of log-normal documents made of a dozen words."""
    folder.mkdir()
    Tokenizer({bytes([byte]): byte for byte in range(256)}, specials=16).save(folder)
    words = "the of and model token attention layer loss gradient mixture document data".split()
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        lengths = np.maximum(1, rng.lognormal(2.0, 1.0, 400).astype(int))
        texts = (" ".join(rng.choice(words, n)) for n in lengths)
        lines = (json.dumps({"id": f"{name}-{i}", "text": t}) + "\n" for i, t in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("".join(lines))
        tokenize([folder / f"{name}.jsonl"], folder / name, folder, Options(piece_bytes=8_000))


class Metrics:
    """The metrics.jsonl of a life that begins now: it cuts the file when it opens the run, and then
    begins a file of its own for TensorBoard."""

    def __init__(self, workdir: Path):
        self._path = workdir / METRICS_FILE
        self._before = self._boards()

    def step(self) -> int | None:
        """The last step recorded by this life; None before it opened the run."""
        if self._boards() == self._before:
            return None
        steps = re.findall(rb'"step": (\d+),', self._path.read_bytes()[-8_000:])
        return int(steps[-1]) if steps else 0

    def _boards(self) -> set[str]:
        return {path.name for path in self._path.parent.glob("tensorboard/*")}


def newest(workdir: Path) -> int:
    """The newest complete checkpoint."""
    folder = workdir / CHECKPOINTS
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


Break = Callable[[list[subprocess.Popen], Path], None]


def live(children: list[subprocess.Popen], workdir: Path, disturb: Break | None) -> Life:
    """Disturbs a start of the command, and waits for its end."""
    metrics, checkpoint = Metrics(workdir), newest(workdir)
    if disturb:
        disturb(children, workdir)
    while all(child.poll() is None for child in children):
        time.sleep(0.02)
    end = time.monotonic() + 60
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(0.05)
    for child in children:  # a frozen one; schedulers do the same once others have failed
        child.kill()
        child.wait()
    texts = []
    for child in children:
        child.output.seek(0)
        texts.append(child.output.read())
        child.output.close()
    began = re.search(r"goes on after step (\d+)", texts[0])
    lines = [text.strip().splitlines() or [""] for text in texts]
    errors = [[line for line in of_one if line.startswith("error: ")] for of_one in lines]
    last_lines = [(e or of_one)[-1] for e, of_one in zip(errors, lines, strict=True)]
    # A kill may come between the opening of the run and the line that says where it goes on.
    return Life([child.returncode for child in children], last_lines,
                int(began[1]) if began else checkpoint, metrics.step())  # fmt: skip


def supervise(
    start: Callable[[], list[subprocess.Popen]],
    workdir: Path,
    disturbances: Iterator[Break | None],
    fix: Callable[[], None] | None = None,
) -> list[Life]:
    """Starts the command until it ends by itself; `fix` once, where its code says a person must."""
    lives: list[Life] = []
    while len(lives) < MOST_LIVES:
        lives.append(live(start(), workdir, next(disturbances, None)))
        codes = lives[-1].codes
        console.print(f"  exit {codes}, steps {lives[-1].began} to {lives[-1].reached}: "
                      f"{lives[-1].last_lines[0][:200]}", markup=False)  # fmt: skip
        if all(code == 0 for code in codes):
            return lives
        if cli.EXIT_USER_ERROR in codes and fix:
            fix()
            fix = None
        elif not any(code in AGAIN for code in codes):
            return lives
    return lives


# ------------------------------------------------------------------------------ disturbances


def at_step(step: int, act: Break, delay: float = 0.0) -> Break:
    """Acts once a step is recorded (or a later one), and a little later if so wished; -1: at once."""

    def disturb(children: list[subprocess.Popen], workdir: Path) -> None:
        metrics = Metrics(workdir)
        while step >= 0 and all(child.poll() is None for child in children):
            if (metrics.step() or 0) >= max(step, 1):
                break
            time.sleep(0.001)
        time.sleep(delay)
        act(children, workdir)

    return disturb


def in_save(after: int, delay: float) -> Break:
    """Kills while a checkpoint is being written, at or after a step."""

    def disturb(children: list[subprocess.Popen], workdir: Path) -> None:
        folder, metrics = workdir / CHECKPOINTS, Metrics(workdir)
        while all(child.poll() is None for child in children):
            names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
            if (metrics.step() or 0) >= after and any("tmp" in name for name in names):
                break
            time.sleep(0.0005)
        time.sleep(delay)
        send(signal.SIGKILL)(children, workdir)

    return disturb


def send(number: int, process: int = 0) -> Break:
    return lambda children, workdir: children[process].send_signal(number)


def random_kills(count: int, rng: random.Random, workdir: Path, told: list[str]) -> Iterator[Break]:
    """Kills at random moments, up to three intervals after the checkpoint where a life begins."""
    for number in range(count):
        step = newest(workdir)
        near = range(step + 1, step + 2 * EVERY + 1)
        boundary = next((s for s in range(STEPS, END, STEPS) if s in near), None)
        if boundary and rng.random() < 0.7:
            told.append(f"stage change {boundary}")
            yield at_step(boundary, send(signal.SIGKILL), rng.uniform(0, 0.3))
        elif number % 3 == 0:
            told.append(f"save {step + 2 * EVERY}")
            yield in_save(step + 2 * EVERY - 1, rng.uniform(0, 0.1))
        elif number % 7 == 1:
            delay = rng.uniform(0.5, 6)
            told.append(f"start +{delay:.1f} s")
            yield at_step(-1, send(signal.SIGKILL), delay)
        else:
            target = step + rng.randint(1, 3 * EVERY)
            told.append(f"step {target}")
            yield at_step(target, send(signal.SIGKILL), rng.uniform(0, 0.01))
