"""More cases of faults.py: rewinds with few checkpoints, restores that fail, signals while measuring."""

import os
import re
import resource
import shutil
import time
from pathlib import Path

from experiments.benchmarks.faults_lives import END, at_step, live, newest, supervise
from experiments.benchmarks.faults_run import EVERY, MEASURED_END, STEPS
from llama3_jax import cli
from llama3_jax.training.checkpoint import CHECKPOINTS, DAMAGED, REWOUND
from llama3_jax.training.metrics import METRICS_FILE, MetricsWriter, read_metrics

LINES = 1_000_000  # of a long metrics file


def files(workdir: Path) -> set[str]:
    folder = workdir / CHECKPOINTS
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def rewind_few(faults):
    """Two checkpoints are kept; a second NaN comes right after the first one's rewind took the newer."""
    workdir, batch = faults.copy("rewind_few"), EVERY + 5
    back = EVERY // 2 + 1
    step = STEPS * 4 + batch
    arguments = ("--config.checkpoint.keep_last=2", "--config.health.not_finite=rewind")
    fault = f"nan:{batch},{batch + 1}"
    first = live(
        faults.program.start(workdir, *arguments, f"--config.health.rewind_steps={back}",
                          faults=(fault,)), workdir, None,
    )  # fmt: skip
    left = newest(workdir)
    refused = first.codes == [cli.EXIT_USER_ERROR] and left == step - EVERY - 5
    refused &= (workdir / REWOUND / f"{step - 5}-0").is_dir()
    lives = supervise(
        lambda: faults.program.start(workdir, *arguments, faults=(fault,)), workdir, iter(())
    )
    steps = [r["step"] for r in read_metrics(workdir) if r["kind"] == "train"]
    recovered = refused and lives[-1].codes == [0] and newest(workdir) == END
    return faults.finished(
        "two NaNs in a row, rewind, two checkpoints kept", workdir, [first, *lives],
        first.last_lines[0], manual="lower rewind_steps",
        recovered=recovered and steps == list(range(1, END + 1)),
    )  # fmt: skip


def memory(faults):
    return _unread(faults, "memory", "out of memory in a restore")


def storage(faults):
    return _unread(faults, "storage", "the storage fails in a restore (EIO)")


def _unread(faults, what: str, name: str):
    workdir = faults.copy(f"read_{what}")
    before = files(workdir)
    first = live(faults.program.start(workdir, faults=(f"read:{what}",)), workdir, None)
    untouched = files(workdir) == before and not (workdir / DAMAGED).exists()
    lives = supervise(lambda: faults.program.start(workdir), workdir, iter(()))
    outcome = faults.outcome(
        name, workdir, [first, *lives], first.last_lines[0], manual="start it again", lost=[0]
    )
    outcome.recovered &= untouched and first.codes == [cli.EXIT_USER_ERROR]
    return outcome


def smaller(faults):
    """Half the devices: sums over ranks come in another order, so losses are compared, not bits."""
    workdir = faults.copy("smaller")
    lives = supervise(
        lambda: faults.program.start(workdir, "--config.mesh.data=1", devices=1), workdir, iter(())
    )
    ours, theirs = (
        [r["loss"] for r in read_metrics(w) if r["kind"] == "train"]
        for w in (workdir, faults.reference)
    )
    recovered = lives[-1].codes == [0] and len(ours) == len(theirs) and not (
        workdir / DAMAGED).exists()  # fmt: skip
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) if recovered else 1.0
    return faults.finished(
        "a restore on half the devices", workdir, lives,
        f"losses within {worst:.1e} of the undisturbed run's", recovered=worst < 1e-3,
    )  # fmt: skip


def descriptors(faults):
    workdir, limit = faults.copy("descriptors"), 256

    def start():
        children = faults.program.start(workdir)
        resource.prlimit(children[0].pid, resource.RLIMIT_NOFILE, (limit, limit))
        return children

    lives = supervise(start, workdir, iter(()))
    return faults.outcome(
        f"at most {limit} open files", workdir, lives, "from the half way checkpoint", lost=[0]
    )


def long_metrics(faults):
    workdir = faults.copy("long_metrics")
    path = workdir / METRICS_FILE
    own = path.read_text()
    filler = '{"kind": "filler", "step": 0, "tokens": 0, "text": "' + "x" * 200 + '"}\n'
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(LINES):
            file.write(filler)
        file.write(own)
    copied = workdir / "copied"
    copied.mkdir()
    shutil.copy(path, copied / METRICS_FILE)
    os.sync()  # or opening would wait for what was written just now
    begun = time.perf_counter()
    MetricsWriter(copied, newest(workdir) - 3).close()
    seconds = time.perf_counter() - begun
    shutil.rmtree(copied)
    lives = supervise(lambda: faults.program.start(workdir), workdir, iter(()))
    with open(path, encoding="utf-8") as file:
        kept = all(next(file) == filler for _ in range(LINES))
        path.with_name("rest").write_text(file.read())
    path.with_name("rest").rename(path)
    outcome = faults.outcome(
        f"a metrics file of {LINES:,} lines", workdir, lives, f"opened in {seconds:.2f} s", lost=[0]
    )
    outcome.recovered &= kept
    return outcome


def term_validation(faults):
    return _terminated(faults, "validation")


def term_evaluation(faults):
    return _terminated(faults, "evaluation")


def term_gate(faults):
    return _terminated(faults, "gate")


def term_save(faults):
    return _terminated(faults, "save")


def _terminated(faults, place: str):
    """The signal comes where it begins; the next start does what was not gone through with."""
    reference = faults.measured()
    workdir = faults.folder / f"terminated_{place}"
    fault = f"terminate:{faults.folder}/terminated_{place}_once:{place}"
    lives = supervise(
        lambda: faults.program.start(workdir, measured=True, faults=(fault,)), workdir, iter(())
    )
    begun = read_metrics(workdir)
    outcome = faults.outcome(
        f"SIGTERM during {place}", workdir, lives, lives[0].last_lines[0], reference=reference,
        end=MEASURED_END,
    )  # fmt: skip
    gates = [(w / "gates.jsonl").read_text() for w in (workdir, reference)]
    seen = lives[0].codes == [cli.EXIT_REQUEUE] and len(lives) == 2
    stopped = re.search(r"after step (\d+)", lives[0].last_lines[0])
    outcome.recovered &= seen and gates[0] == gates[1] and bool(stopped) and bool(begun)
    return outcome


def two_trainers(faults):
    """The second is refused, and the first goes on as if it had not been."""
    workdir = faults.copy("two_trainers")
    second = []

    def start_another(children, workdir: Path) -> None:
        second.append(live(faults.program.start(workdir), workdir, None))

    lives = [
        live(faults.program.start(workdir), workdir, at_step(newest(workdir) + 3, start_another))
    ]
    outcome = faults.outcome(
        "two trainers in one folder", workdir, lives, second[0].last_lines[0], lost=[0]
    )
    outcome.recovered &= second[0].codes == [cli.EXIT_USER_ERROR]
    return outcome


CASES = {
    case.__name__: case
    for case in (rewind_few, memory, storage, smaller, term_validation, term_evaluation, term_gate,
                 term_save, descriptors, long_metrics, two_trainers)
}  # fmt: skip
