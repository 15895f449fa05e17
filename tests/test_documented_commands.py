"""Every command that README, GUIDE, the experiments and the programs tell a reader to type.

Each is started up to the point where its options are parsed and its config file is loaded.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, command_environment

COMMAND = re.compile(r"python -m ((?:llama3_jax|experiments)(?:\.\w+)+)((?:\\\n|[^\n])*)")
CONFIG = "experiments/demo/train.py"
# What stands for a file of the reader's.
STANDS_FOR = {
    "my_run.py": CONFIG,
    "--config=…": f"--config={CONFIG}",
    "…": f"--config={CONFIG}",
    "COMMAND": "isoflop",
}
NOT_HERE = re.compile("there is no directory corpora|runs/base/checkpoints holds no checkpoint")
# No options of absl's: these take a JSON or another program's options.
OTHERS = ("loader_measure", "tokenizer_measure", "faults_program")


def texts() -> dict[str, str]:
    """What readers read, by file: pages whole, of programs the docstring."""
    found = {}
    for path in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("experiments/**/*.md")]:
        found[str(path.relative_to(REPOSITORY))] = path.read_text(encoding="utf-8")
    for folder in ("experiments/**", "llama3_jax"):
        for path in REPOSITORY.glob(f"{folder}/*.py"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            found[str(path.relative_to(REPOSITORY))] = text or ""
    return found


def commands(text: str) -> list[str]:
    """Module and arguments; of an example with ` | ` between, each."""
    # A command in a sentence may go on in the next line, and ends with its quotes.
    text = re.sub(r"`[^`]+`", lambda found: f"\n{' '.join(found[0][1:-1].split())}\n", text)
    made = []
    for found in COMMAND.finditer(text):
        module, rest = found[1], found[2].replace("\\\n", " ")
        first, *others = re.sub(r"\s#\s.*|   #.*", "", rest).split(" | ")
        made += [" ".join(f"{module} {arguments}".split()) for arguments in (first, *others)]
    return made


CASES = sorted(
    {(source, command) for source, text in texts().items() for command in commands(text)}
)

# A process with everything imported, which forks for each command. In place of the work, options
# are parsed.
PARSING = """
import importlib, json, os, runpy, sys, warnings
from absl import flags
from llama3_jax import cli
import llama3_jax.train, llama3_jax.curate, llama3_jax.evaluate, llama3_jax.fit, llama3_jax.launch


def parsed(main, argv=None, doc=None):
    argv = [each for each in (sys.argv if argv is None else argv) if each != "--help"]
    try:
        rest = flags.FLAGS(list(argv))
    except Exception as error:
        sys.exit(cli.fail(cli._flag_error(argv, error)))
    sys.exit(cli.fail(f"unexpected argument {rest[1]}") if rest[1:] else 0)


cli.run = parsed
warnings.filterwarnings("ignore")
for line in sys.stdin:
    module, *arguments = json.loads(line)
    readable, writable = os.pipe()
    if not (child := os.fork()):
        os.dup2(writable, 1), os.dup2(writable, 2)
        sys.argv = [module, *arguments]
        code = 0
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
        if isinstance(code, str):
            print(code)
            code = 1
        sys.stdout.flush()
        os._exit(code)
    os.close(writable)
    said = open(readable).read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, said]), flush=True)
"""


@pytest.fixture(scope="module")
def parse(compilation_cache):
    server = subprocess.Popen(
        [sys.executable, "-c", PARSING], cwd=REPOSITORY, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=command_environment(compilation_cache),
    )  # fmt: skip

    def run(module: str, *arguments: str) -> tuple[int, str]:
        print(json.dumps([module, *arguments]), file=server.stdin, flush=True)
        return tuple(json.loads(server.stdout.readline()))

    yield run
    server.communicate()


def test_commands_are_found():
    found = {source for source, _ in CASES}
    assert {"README.md", "GUIDE.md", "llama3_jax/train.py", "experiments/demo/train.py"} <= found
    assert len(CASES) > 100
    assert commands("`python -m llama3_jax.a\n  --b=1`, and\n\n    python -m llama3_jax.c \\\n  d"
                    "  # e") == ["llama3_jax.a --b=1", "llama3_jax.c d"]  # fmt: skip


@pytest.mark.parametrize(("source", "command"), CASES, ids=[f"{s}: {c}" for s, c in CASES])
def test_a_command_that_readers_are_told_to_type_is_right(source, command, parse):
    module, *arguments = shlex.split(command)
    assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file()
    if module.endswith(OTHERS):
        return
    arguments = [STANDS_FOR.get(argument, argument) for argument in arguments]
    if module.endswith(".curate"):
        arguments = [a.replace(CONFIG, "experiments/curation/web.py:crawl") for a in arguments]
    arguments = [argument.replace("my_run.py", CONFIG) for argument in arguments]
    for argument in arguments:
        if argument.startswith("--config=") and module.endswith(".launch"):
            assert Path(REPOSITORY, argument[9:].split(":")[0]).is_file()
    code, said = parse(module, *arguments)
    if missing := re.search(r"No module named '(\w+)'", said):
        pytest.skip(f"{missing[1]} is not installed")
    if code == 2 and NOT_HERE.search(said):
        return  # of the reader's own
    assert code == 0, said


@pytest.mark.parametrize("source", ["README.md", "GUIDE.md"])
def test_extras_that_readers_are_told_to_install_exist(source):
    text = (REPOSITORY / source).read_text()
    setup = (REPOSITORY / "setup.py").read_text()
    named = re.findall(r"pip install\s+-e '\.\[([\w,-]+)\]'", text)
    assert named and "llama3_jax[" not in text
    for extra in ",".join(named).split(","):
        assert f'"{extra}": ' in setup
