"""Breaks a tiny run in every way that we know of, and tells whether it survives.

    python -m experiments.benchmarks.faults --seed=1
    python -m experiments.benchmarks.faults --only=kill,frozen      # some of the cases

Each case starts the training program as a user does, breaks something, and starts the same command
again and again until it ends, as a launcher does (faults_lives.py). Recovered means: the run came to
its end, its final weights and optimizer state are those of the undisturbed run bit for bit, and so are
the records of all its steps. Where batches are to be left out, the run is compared with one that met
the same NaN, but no kill. Lost steps are those that had been recorded when the process died and were
done again.
"""

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from rich.table import Table

from experiments.benchmarks import faults_restoring
from experiments.benchmarks.faults_lives import (
    END,
    HALF,
    Life,
    Program,
    at_step,
    console,
    live,
    newest,
    random_kills,
    send,
    supervise,
)
from experiments.benchmarks.faults_run import EVERY, STAGES, STEPS
from llama3_jax import cli
from llama3_jax.training.checkpoint import CHECKPOINTS
from llama3_jax.training.events import EVENTS_FILE
from llama3_jax.training.goodput import GOODPUT_FILE
from llama3_jax.training.metrics import read_metrics

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_integer("seed", None, "Of the moments and places of faults; drawn if not given.")
    flags.DEFINE_integer("kills", 20, "Kills of the first case.", lower_bound=1)
    flags.DEFINE_list("only", [], f"Some of the cases: {', '.join(CASES)}.")
    flags.DEFINE_string("json", None, "File that takes every measurement.")


@dataclasses.dataclass
class Outcome:
    """A case. `lost` are the steps done again after each fault; `notes` say what was broken."""

    name: str
    recovered: bool
    lives: list[Life]
    lost: list[int]
    manual: str
    notes: str


# ------------------------------------------------------------------------------ what is compared


def final_state(workdir: Path, end: int) -> list[np.ndarray]:
    """All arrays of the last checkpoint."""
    import jax

    from llama3_jax.parallel.mesh import MeshConfig, make_mesh
    from llama3_jax.recipe.config import RunConfig
    from llama3_jax.schema import parse
    from llama3_jax.training.checkpoint import Checkpoints
    from llama3_jax.training.state import abstract_state

    config = parse(RunConfig, json.loads((workdir / "config.json").read_text()))
    abstract = abstract_state(config.model, config.optimizer, make_mesh(MeshConfig()), saved=True)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep_last=1, keep_every=1)
    restored = checkpoints.restore(end, *abstract)
    return [np.asarray(x) for x in jax.tree.leaves((restored.params, restored.optimizer))]


def records(workdir: Path) -> list[dict]:
    clock = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(workdir)]


def same(workdir: Path, reference: Path, end: int = END) -> bool:
    if newest(workdir) != end:
        return False
    pairs = zip(final_state(workdir, end), final_state(reference, end), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs) and records(workdir) == records(reference)


def lost_steps(lives: list[Life]) -> list[int]:
    """Of each fault: steps recorded by one life that the next one did again."""
    opened = [life for life in lives if life.reached is not None]
    return [max(a.reached - b.began, 0) for a, b in zip(opened, opened[1:], strict=False)]


# ------------------------------------------------------------------------------ the cases


class Faults:
    """The cases; each gives its outcome."""

    def __init__(self, program: Program, folder: Path, rng: random.Random):
        self.program, self.folder, self.rng = program, folder, rng
        self.half = folder / "half"

    @functools.cached_property
    def reference(self) -> Path:
        """The undisturbed run."""
        workdir = self.folder / "undisturbed"
        supervise(lambda: self.program.start(workdir), workdir, iter(()))
        return workdir

    @functools.cached_property
    def stopped(self) -> Life:
        """The life of a run that was stopped half way: where most cases begin."""
        stop = at_step(HALF + EVERY - 2, send(signal.SIGTERM))
        life = live(self.program.start(self.half), self.half, stop)
        assert life.codes == [cli.EXIT_REQUEUE], life
        return life

    def copy(self, name: str) -> Path:
        assert self.stopped
        return Path(shutil.copytree(self.half, self.folder / name))

    def outcome(
        self, name: str, workdir: Path, lives: list[Life], notes: str, manual: str = "none",
        reference: Path | None = None, lost: list[int] | None = None, end: int = END,
    ) -> Outcome:  # fmt: skip
        recovered = lives[-1].codes[0] == 0 and same(workdir, reference or self.reference, end)
        return self.finished(name, workdir, lives, notes, manual, recovered, lost)

    def finished(
        self, name: str, workdir: Path, lives: list[Life], notes: str, manual: str = "none",
        recovered: bool = False, lost: list[int] | None = None,
    ) -> Outcome:  # fmt: skip
        """As `outcome`, where the case itself says whether the run recovered."""
        return Outcome(name, recovered, lives, lost_steps(lives) if lost is None else lost, manual,
                       notes)  # fmt: skip

    def measured(self) -> Path:
        """The undisturbed run with validation, evaluation and a gate."""
        workdir = self.folder / "measured"
        if not workdir.exists():
            begin = lambda: self.program.start(workdir, measured=True, faults=("none",))  # noqa: E731
            supervise(begin, workdir, iter(()))
        return workdir

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
        lives = supervise(lambda: self.program.start(workdir, *arguments), workdir, kills)
        goodput = json.loads((workdir / GOODPUT_FILE).read_text())
        seconds = ", ".join(f"{key} {value:.1f}" for key, value in goodput["seconds"].items())
        booked = sum(goodput["seconds"].values())
        notes = f"{'; '.join(told)}. Booked {booked:.1f} of {goodput['elapsed']:.1f} s: {seconds}"
        kills = sum(-signal.SIGKILL in life.codes for life in lives)
        return self.outcome(f"kill -9, {kills} times in one run", workdir, lives, notes)

    def sigterm(self) -> Outcome:
        workdir = self.copy("sigterm")
        lives = supervise(lambda: self.program.start(workdir), workdir, iter(()))
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
        lives = supervise(lambda: self.program.start(workdir), workdir, iter(()))
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
            shutil.copytree(self.copy("disk"), workdir)

            def fill(children: list[subprocess.Popen], workdir: Path) -> None:
                with open(ballast, "wb", buffering=0) as file:
                    try:
                        while file.write(bytes(4096)):
                            pass
                    except OSError:
                        pass

            first = at_step(newest(workdir) + 3, fill)
            lives = supervise(
                lambda: self.program.start(workdir), workdir, iter([first]), fix=ballast.unlink
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
            lives = supervise(lambda: self.program.start(workdir), workdir, iter(()), fix=restore)
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
                lambda place=place: self.program.start(place, argument, faults=(f"nan:{number}",)),
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
            lambda: self.program.start(workdir, processes=2), workdir,
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
            lambda: self.program.start(workdir, processes=2, faults=("", fault)), workdir, iter(())
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
} | faults_restoring.CASES  # fmt: skip


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
        program = Program(Path(folder))
        try:
            faults = Faults(program, Path(folder), random.Random(seed))
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
            program.close()
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
