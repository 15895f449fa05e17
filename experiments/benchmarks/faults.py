"""Breaks a tiny run in every way that we know of, and tells whether it survives.

    python -m experiments.benchmarks.faults --seed=1
    python -m experiments.benchmarks.faults --only=kill,frozen      # some of the cases

Each case starts the training door as a user does, breaks something, and starts the same command
again and again until it ends: `supervise` is that loop, and what a launcher does. Recovered means:
the run came to its end, its final weights and optimizer state are those of the undisturbed run bit
for bit, and so are the records of all its steps. Where batches are to be left out, the run is
compared with one that met the same NaN, but no kill. Lost steps are those that had been recorded
when the process died and were done again.
"""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.faults_run import EVERY, STAGES, STEPS
from llama3_jax import cli
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.data.tokenizing import Options, tokenize
from llama3_jax.parallel.liveness import EXIT_HUNG, EXIT_LOST
from llama3_jax.training.checkpoint import CHECKPOINTS
from llama3_jax.training.events import EVENTS_FILE
from llama3_jax.training.goodput import GOODPUT_FILE
from llama3_jax.training.metrics import METRICS_FILE, read_metrics

# After these a launcher starts the same command again: killed, a peer lost, hung, asked to requeue.
AGAIN = (-signal.SIGKILL, EXIT_LOST, EXIT_HUNG, cli.EXIT_REQUEUE)
MOST_LIVES = 60
CONFIG = "experiments/benchmarks/faults_run.py"
END, HALF = STEPS * len(STAGES), STEPS * len(STAGES) // 2

FLAGS = flags.FLAGS
console = Console(width=None if Console().is_terminal else 160, highlight=False)


def define_flags() -> None:
    flags.DEFINE_integer("seed", None, "Of the moments and places of faults; drawn if not given.")
    flags.DEFINE_integer("kills", 20, "Kills of the first case.", lower_bound=1)
    flags.DEFINE_list("only", [], f"Some of the cases: {', '.join(CASES)}.")
    flags.DEFINE_string("json", None, "File that takes every measurement.")


# ------------------------------------------------------------------------------ running the door


@dataclasses.dataclass
class Life:
    """One start of the command: process by process what it ended with, and the steps it saw.

    `reached` is None where it ended before it had opened the run.
    """

    codes: list[int]
    last_lines: list[str]
    began: int
    reached: int | None


@dataclasses.dataclass
class Outcome:
    """A case. `lost` are the steps done again after each fault; `notes` say what was broken."""

    name: str
    recovered: bool
    lives: list[Life]
    lost: list[int]
    manual: str
    notes: str


class Door:
    """Starts the training command; all processes share one compilation cache."""

    def __init__(self, folder: Path):
        self.folder, self._children = folder, []
        corpora = folder / "corpora"
        make_corpora(corpora)
        self._config = f"--config={CONFIG}:{corpora}"

    def start(
        self, workdir: Path, *arguments: str, processes: int = 1, faults: tuple[str, ...] = ("",)
    ) -> list[subprocess.Popen]:
        """`faults` are those of each process (see faults_program.py); "" is none."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(self.folder / "compiled")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}",
        }
        common = [self._config, f"--workdir={workdir}", *arguments]
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
    """The metrics.jsonl of a life that begins now, which writes the file anew when it opens the run."""

    def __init__(self, workdir: Path):
        self._path = workdir / METRICS_FILE
        self._before = self._inode()

    def step(self) -> int | None:
        """The last step recorded by this life; None before it opened the run."""
        if self._inode() in (None, self._before):
            return None
        steps = re.findall(rb'"step": (\d+),', self._path.read_bytes()[-8_000:])
        return int(steps[-1]) if steps else 0

    def _inode(self) -> int | None:
        try:
            return self._path.stat().st_ino
        except FileNotFoundError:
            return None


def newest(workdir: Path) -> int:
    """The newest complete checkpoint."""
    folder = workdir / CHECKPOINTS
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


Break = Callable[[list[subprocess.Popen], Path], None]


def live(children: list[subprocess.Popen], workdir: Path, disturb: Break | None) -> Life:
    """Disturbs a start of the command, and waits for its end."""
    metrics = Metrics(workdir)
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
    return Life([child.returncode for child in children], last_lines,
                int(began[1]) if began else 0, metrics.step())  # fmt: skip


def supervise(
    start: Callable[[], list[subprocess.Popen]],
    workdir: Path,
    disturbances: Iterator[Break | None],
    mend: Callable[[], None] | None = None,
) -> list[Life]:
    """Starts the command until it ends by itself; `mend` once, where its code says a person must."""
    lives: list[Life] = []
    while len(lives) < MOST_LIVES:
        lives.append(live(start(), workdir, next(disturbances, None)))
        codes = lives[-1].codes
        console.print(f"  exit {codes}, steps {lives[-1].began} to {lives[-1].reached}: "
                      f"{lives[-1].last_lines[0][:200]}", markup=False)  # fmt: skip
        if all(code == 0 for code in codes):
            return lives
        if cli.EXIT_USER_ERROR in codes and mend:
            mend()
            mend = None
        elif not any(code in AGAIN for code in codes):
            return lives
    return lives


# ------------------------------------------------------------------------------ what is compared


def final_state(workdir: Path) -> list[np.ndarray]:
    """All arrays of the last checkpoint."""
    import jax

    from llama3_jax.parallel.mesh import MeshConfig, make_mesh
    from llama3_jax.recipe.config import RunConfig
    from llama3_jax.schema import parse
    from llama3_jax.training.checkpoint import Checkpoints
    from llama3_jax.training.step import abstract_canonical

    config = parse(RunConfig, json.loads((workdir / "config.json").read_text()))
    abstract = abstract_canonical(config.model, config.optimizer, make_mesh(MeshConfig()))
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep_last=1, keep_every=1)
    restored = checkpoints.restore(END, *abstract)
    return [np.asarray(x) for x in jax.tree.leaves((restored.params, restored.optimizer))]


def records(workdir: Path) -> list[dict]:
    clock = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(workdir)]


def same(workdir: Path, reference: Path) -> bool:
    if newest(workdir) != END:
        return False
    pairs = zip(final_state(workdir), final_state(reference), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs) and records(workdir) == records(reference)


def lost_steps(lives: list[Life]) -> list[int]:
    """Of each fault: steps recorded by one life that the next one did again."""
    opened = [life for life in lives if life.reached is not None]
    return [max(a.reached - b.began, 0) for a, b in zip(opened, opened[1:], strict=False)]


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


# ------------------------------------------------------------------------------ the cases


class Faults:
    """The cases; each gives its outcome."""

    def __init__(self, door: Door, folder: Path, rng: random.Random):
        self.door, self.folder, self.rng = door, folder, rng
        self.reference, self.half = folder / "undisturbed", folder / "half"
        supervise(lambda: door.start(self.reference), self.reference, iter(()))
        # A run that was stopped half way is where most cases begin.
        stopped = at_step(HALF + EVERY - 2, send(signal.SIGTERM))
        children = door.start(self.half)
        self.stopped = live(children, self.half, stopped)
        assert self.stopped.codes == [cli.EXIT_REQUEUE], self.stopped

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.half, self.folder / name))

    def outcome(
        self, name: str, workdir: Path, lives: list[Life], notes: str, manual: str = "none",
        reference: Path | None = None, lost: list[int] | None = None,
    ) -> Outcome:  # fmt: skip
        recovered = lives[-1].codes[0] == 0 and same(workdir, reference or self.reference)
        return Outcome(name, recovered, lives, lost_steps(lives) if lost is None else lost, manual,
                       notes)  # fmt: skip

    def kill(self) -> Outcome:
        return self._kill("killed")

    def kill_waited(self) -> Outcome:
        """No step goes on while a save is written: an interval is all that may be lost."""
        outcome = self._kill("killed_waited", "--config.checkpoint.wait=true")
        outcome.name += ", saves waited for"
        outcome.recovered &= max(outcome.lost) <= EVERY
        return outcome

    def _kill(self, folder: str, *arguments: str) -> Outcome:
        workdir, told = self.folder / folder, []
        kills = random_kills(FLAGS.kills, self.rng, workdir, told)
        lives = supervise(lambda: self.door.start(workdir, *arguments), workdir, kills)
        goodput = json.loads((workdir / GOODPUT_FILE).read_text())
        seconds = ", ".join(f"{key} {value:.1f}" for key, value in goodput["seconds"].items())
        booked = sum(goodput["seconds"].values())
        notes = f"{'; '.join(told)}. Booked {booked:.1f} of {goodput['elapsed']:.1f} s: {seconds}"
        kills = sum(-signal.SIGKILL in life.codes for life in lives)
        return self.outcome(f"kill -9, {kills} times in one run", workdir, lives, notes)

    def sigterm(self) -> Outcome:
        workdir = self.copy("sigterm")
        lives = supervise(lambda: self.door.start(workdir), workdir, iter(()))
        notes = f"saved step {newest(self.half)} and exited with {self.stopped.codes[0]}"
        return self.outcome("SIGTERM", workdir, [self.stopped, *lives], notes)

    def truncated(self) -> Outcome:
        def cut(content: bytes) -> bytes:
            return content[: self.rng.randrange(1, len(content))]

        return self._damaged("a checkpoint truncated", "truncated", cut)

    def flipped(self) -> Outcome:
        def flip(content: bytes) -> bytes:
            at = self.rng.randrange(len(content))
            changed = content[at] ^ 1 << self.rng.randrange(8)
            return content[:at] + bytes([changed]) + content[at + 1 :]

        return self._damaged("a checkpoint with a flipped bit", "flipped", flip)

    def _damaged(self, name: str, folder: str, change: Callable[[bytes], bytes]) -> Outcome:
        workdir = self.copy(folder)
        step = newest(workdir)
        files = [p for p in (workdir / CHECKPOINTS / str(step)).rglob("d/*") if p.is_file()]
        path = max(files, key=lambda p: p.stat().st_size)
        path.write_bytes(change(path.read_bytes()))
        lives = supervise(lambda: self.door.start(workdir), workdir, iter(()))
        lost = [self.stopped.reached - lives[0].began]
        aside = (workdir / "damaged_checkpoints").is_dir()
        notes = f"checkpoint {step}: {'found, set aside' if aside else 'not found'}"
        return self.outcome(name, workdir, lives, notes, lost=lost)

    def disk(self) -> Outcome:
        place = self.folder / "small_disk"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            raise SkipCase("this machine lets nobody mount a small file system")
        try:
            workdir, ballast = place / "run", place / "ballast"
            shutil.copytree(self.half, workdir)

            def fill(children: list[subprocess.Popen], workdir: Path) -> None:
                with open(ballast, "wb", buffering=0) as file:
                    try:
                        while file.write(bytes(4096)):
                            pass
                    except OSError:
                        pass

            first = at_step(newest(workdir) + 3, fill)
            lives = supervise(
                lambda: self.door.start(workdir), workdir, iter([first]), mend=ballast.unlink
            )
            notes = lives[0].last_lines[0]
            return self.outcome("a full disk", workdir, lives, notes, manual="free the disk")
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)

    def shard(self) -> Outcome:
        workdir = self.copy("shard")
        shards = sorted((self.folder / "corpora/a/train").glob("*.arrayrecord"))
        whole = [shard.read_bytes() for shard in shards]
        for shard, content in zip(shards, whole, strict=True):
            shard.write_bytes(content[:200] + bytes(len(content) - 400) + content[-200:])

        def restore() -> None:
            for shard, content in zip(shards, whole, strict=True):
                shard.write_bytes(content)

        try:
            lives = supervise(lambda: self.door.start(workdir), workdir, iter(()), mend=restore)
        finally:
            restore()
        notes = lives[0].last_lines[0]
        return self.outcome(
            "a damaged data shard", workdir, lives, notes, manual="restore the shard"
        )

    def nan_skip(self) -> Outcome:
        return self._nan("skip")

    def nan_rewind(self) -> Outcome:
        return self._nan("rewind")

    def _nan(self, action: str) -> Outcome:
        number = self.rng.randrange(2, STEPS - EVERY)
        first = STEPS * (len(STAGES) - 1)
        argument = f"--config.health.not_finite={action}"
        reference, workdir = (self.copy(f"nan_{action}_{kind}") for kind in ("alone", "killed"))
        for place, kills in ((reference, ()), (workdir, (first + number + 1, first + number + 8))):
            disturbances = [at_step(step, send(signal.SIGKILL)) for step in kills]
            lives = supervise(
                lambda place=place: self.door.start(place, argument, faults=(f"nan:{number}",)),
                place, iter(disturbances),
            )  # fmt: skip
        events = [(place / EVENTS_FILE).read_text() for place in (reference, workdir)]
        event = json.loads(events[0].splitlines()[0])
        unlike = "" if events[0] == events[1] else "; EVENTS DIFFER"
        notes = f"step {event['step']}, batch {event['batch']}; killed twice after it{unlike}"
        outcome = self.outcome(
            f"NaN gradients, {action}", workdir, lives, notes, reference=reference
        )
        outcome.recovered &= not unlike
        return outcome

    def one_of_two(self) -> Outcome:
        return self._two("one of two processes killed", "two", signal.SIGKILL)

    def frozen(self) -> Outcome:
        return self._two("one of two processes frozen (SIGSTOP)", "frozen", signal.SIGSTOP)

    def _two(self, name: str, folder: str, number: int) -> Outcome:
        workdir = self.copy(folder)
        step = newest(workdir) + self.rng.randint(2, EVERY + 5)
        process = self.rng.randrange(2)
        lives = supervise(
            lambda: self.door.start(workdir, processes=2), workdir,
            iter([at_step(step, send(number, process))]),
        )  # fmt: skip
        notes = f"process {process} at step {step}; the other: {lives[0].last_lines[1 - process]}"
        return self.outcome(name, workdir, lives, notes)

    def stuck(self) -> Outcome:
        workdir = self.copy("stuck")
        step = newest(workdir) + self.rng.randint(EVERY + 10, EVERY + 20)
        index, number = divmod(step, STEPS)
        fault = f"stuck:{self.folder}/stuck_once:{index}:{number}"
        lives = supervise(
            lambda: self.door.start(workdir, processes=2, faults=("", fault)), workdir, iter(())
        )
        stacks = sorted(p.name for p in (workdir / "hangs").iterdir())
        notes = f"{lives[0].last_lines[0]} ({', '.join(stacks)})"
        return self.outcome("one of two stuck in its loader", workdir, lives, notes)


class SkipCase(Exception):
    """A case that cannot be tried here; the message says why."""


CASES = {
    name: getattr(Faults, name)
    for name in ("kill", "kill_waited", "sigterm", "truncated", "flipped", "disk", "shard", "nan_skip",
                 "nan_rewind", "one_of_two", "frozen", "stuck")
}  # fmt: skip


def main(_) -> int:
    for name in FLAGS.only:
        if name not in CASES:
            return cli.fail(f"--only={name}: no such case; cases: {', '.join(CASES)}")
    seed = random.randrange(10**6) if FLAGS.seed is None else FLAGS.seed
    console.print(f"seed {seed}")
    table = Table(title=f"Faults, seed {seed}; {END} steps, a checkpoint every {EVERY}")
    for column in ("fault", "recovered", "starts", "lost steps", "manual step", "what happened"):
        table.add_column(column, overflow="fold")
    rows, begun = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        door = Door(Path(folder))
        try:
            faults = Faults(door, Path(folder), random.Random(seed))
            for name in FLAGS.only or CASES:
                console.print(name)
                faults.rng = random.Random(f"{seed}/{name}")  # whichever others are run
                try:
                    result = CASES[name](faults)
                except SkipCase as reason:
                    table.add_row(name, "skipped", "", "", "", str(reason))
                    continue
                rows.append(dataclasses.asdict(result))
                lost = f"{max(result.lost, default=0)}"
                if len(result.lost) > 1:
                    lost += f" at most, {sum(result.lost)} in all"
                row = (
                    result.name, "yes" if result.recovered else "NO", str(len(result.lives)), lost,
                    result.manual, result.notes.replace(folder, "…"),
                )  # fmt: skip
                console.print(" | ".join(row), markup=False)
                table.add_row(*row)
        finally:
            door.close()
    console.print(table)
    failed = [row["name"] for row in rows if not row["recovered"]]
    console.print(f"{len(rows) - len(failed)} of {len(rows)} recovered in "
                  f"{time.monotonic() - begun:.0f} s")  # fmt: skip
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps({"seed": seed, "rows": rows}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
