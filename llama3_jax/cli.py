"""How every door runs: one line and a non-zero exit code for what the user can mend."""

import errno
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from llama3_jax.errors import UserError

EXIT_USER_ERROR = 2
# BSD's EX_TEMPFAIL: the run saved its state on SIGTERM and asks to be queued again.
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Parses absl flags, runs `main(argv)` and exits with its code; UserError exits with 2.

    `argv` is what to parse instead of the process's own, the program's name first.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        if len(argv) > 1:
            return fail(f"unexpected argument {argv[1]!r}; options look like --name=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax tells 30 lines a checkpoint
        _choose_platform()
        try:
            return main(argv)
        except UserError as error:
            return fail(str(error))
        except OSError as error:
            if not is_disk_full(error):
                raise
            return fail(f"no space left on the disk that holds {error.filename or os.getcwd()}")

    app.run(guarded, argv=argv, flags_parser=_parse_flags)


def _choose_platform() -> None:
    """The CPU where there is no NVIDIA driver: JAX's GPU plugin would say so at length first."""
    driver = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
    if "JAX_PLATFORMS" not in os.environ and not driver and importlib.util.find_spec("jax_plugins"):
        import jax  # seconds, for doors that need none of it

        jax.config.update("jax_platforms", "cpu")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a disk or quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "RESOURCE_EXHAUSTED: ENOSPC" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def define_config() -> flags.FlagHolder:
    """`--config=experiments/….py[:argument]`, with overrides as `--config.model.layers=4`."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file; its values can be set as --config.key=value."
    )


def require_config(config: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict:
    if config is None:
        raise UserError("--config is required: a Python file with get_config()")
    if not isinstance(config, ml_collections.ConfigDict):
        # config_flags puts off errors of opening the file to the first access.
        try:
            config.to_dict()
        except Exception as error:
            reason = str(error).replace("Configuration is not available because of an earlier", "")
            raise UserError(f"--config: {reason}") from None
        raise UserError(f"--config: get_config() returned a {type(config).__name__}")
    return config


def load_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """What a door would get of `--config=FILE` and its overrides.

    Raises:
      UserError: the file or an override is wrong, in the door's words.
    """
    values, argv = flags.FlagValues(), ["", *arguments]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except Exception as error:
        raise UserError(_flag_error(argv, error)) from None
    return require_config(holder.value)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except Exception as error:
        sys.exit(fail(_flag_error(argv, error)))


def _flag_error(argv: Sequence[str], error: Exception) -> str:
    if isinstance(error, flags.Error | UserError):
        return str(error)
    # Whatever the config file itself raises.
    given = [argument for argument in argv if argument.startswith("--config")]
    if isinstance(error, AttributeError | KeyError):  # raised by an override
        words = re.findall(r"\w+", str(error).replace("\\n", " "))
        given = [argument for argument in given if words and f".{words[0]}" in argument] or given
        near = f"; nearest valid key: {words[4]}" if words[1:3] == ["Did", "you"] else ""
        return f"{given[0]}: the config has no such key{near}"
    return f"{given[0]}: {type(error).__name__}: {error}"


def fail(message: Any) -> int:
    """Prints an error as one line; returns the exit code for it."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
