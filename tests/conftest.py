"""Set-up shared by all tests: CPU only, and one compilation cache for the whole session."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices, so that meshes can be tested; a single-device mesh is the first of them.
# Compiling, not running, is what takes these tests' time: without optimisations, a third less.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import itertools
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from experiments.scaling_laws import published
from llama3_jax.data import tokenizing
from llama3_jax.data.tokenizer import Tokenizer

QUICK = "--xla_backend_optimization_level=0"
flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for flags

REPOSITORY = Path(__file__).parents[1]
WORDS = "the of and model token attention layer loss gradient mixture document data".split()


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory) -> Path:
    """A tokenizer folder with the 256 bytes and 16 specials."""
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer({bytes([byte]): byte for byte in range(256)}, specials=16).save(folder)
    return folder


def write_jsonl(path: Path, documents: dict[str, str]) -> Path:
    lines = (json.dumps({"id": i, "text": text}) + "\n" for i, text in documents.items())
    path.write_text("".join(lines), encoding="utf-8")
    return path


def random_documents(name: str, count: int, seed: int) -> dict[str, str]:
    """Documents of log-normal length made of a dozen words."""
    random = np.random.default_rng(seed)
    lengths = np.maximum(1, random.lognormal(2.0, 1.0, count).astype(int))
    return {f"{name}-{i}": " ".join(random.choice(WORDS, n)) for i, n in enumerate(lengths)}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory, byte_tokenizer) -> Path:
    """A folder with two tokenised corpora, a and b, each with train and validation."""
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate("ab"):
        source = write_jsonl(folder / f"{name}.jsonl", random_documents(name, 400, seed))
        options = tokenizing.Options(holdout=0.1, piece_bytes=8_000)
        tokenizing.tokenize([source], folder / name, byte_tokenizer, options)
    return folder


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def command(compilation_cache):
    """Runs `python -m llama3_jax.<name>` as a user does, on one CPU device."""

    def run(name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", f"llama3_jax.{name}", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=REPOSITORY, env=command_environment(
                compilation_cache), timeout=300, **options,
        )  # fmt: skip

    return run


# Imports a program once; then forks for each line of standard input, which says what to run where.
FORKING = """
import importlib, json, os, runpy, signal, sys, warnings
name = sys.argv[1]
importlib.import_module(name)
warnings.filterwarnings("ignore", module="runpy")  # it says that the program is imported already
for line in sys.stdin:
    arguments, out, error = json.loads(line)
    if not (child := os.fork()):
        for number, path in enumerate((os.devnull, out, error)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        signal.alarm(300)
        sys.argv = [name, *arguments]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
"""


@pytest.fixture(scope="session")
def forked_command(compilation_cache, tmp_path_factory):
    """As `command`, without the two seconds of imports: for the many runs that end with an error."""
    folder, servers, count = tmp_path_factory.mktemp("forked"), {}, itertools.count()

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
        if name not in servers:
            servers[name] = subprocess.Popen(
                [sys.executable, "-c", FORKING, f"llama3_jax.{name}"], cwd=REPOSITORY, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=command_environment(compilation_cache),
            )  # fmt: skip
        number = next(count)
        out, error = (folder / f"{number}.{kind}" for kind in ("out", "error"))
        print(json.dumps([arguments, str(out), str(error)]), file=servers[name].stdin, flush=True)
        code = int(servers[name].stdout.readline())
        return subprocess.CompletedProcess(arguments, code, out.read_text(), error.read_text())

    yield run
    for server in servers.values():
        server.communicate()


def command_environment(compilation_cache: Path) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return environment | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The directory of the published sweeps, or a skip."""
    if not published.DIRECTORY.is_dir():
        pytest.skip(f"published sweeps are not in {published.DIRECTORY}")
    return published.DIRECTORY
