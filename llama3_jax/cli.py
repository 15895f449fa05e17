"""How every program begins: options, --help, config files; and that its errors end it properly."""

import importlib.machinery
import importlib.util
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from llama3_jax import exits
from llama3_jax.errors import UserError
from llama3_jax.exits import (  # noqa: F401  (for the programs)
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    fail,
    is_disk_full,
)
from llama3_jax.files import OVERWRITE

HELP = ("--help", "-help", "--helpshort", "--helpfull", "-h")


def run(
    main: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    doc: str | None = None,
) -> None:
    """Parses absl flags, runs `main(argv)` and exits with its code.

    UserError and what a person can do about an error of the system end with one line and code 2,
    Ctrl-C with 130, a reader of the output that goes away with 141, anything else with its
    traceback and 1. `argv` is what to parse instead of the process's own, the program's name first.
    `doc` is what --help says before the options, by default the program's docstring.
    """
    exits.listen()
    sys.unraisablehook = _unraisable
    # Of a worker that is ended, Python's tracker of semaphores would tell after the last line.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    given = sys.argv if argv is None else argv
    code: Any = 1
    try:
        app.run(lambda rest: _main(main, rest), argv=given, flags_parser=_parser(doc))
    except SystemExit as ended:
        code = ended.code
        if isinstance(ended.__context__, BrokenPipeError):  # rich makes this of it
            code = exits.EXIT_BROKEN_PIPE
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # libraries in Rust panic past Exception
        traceback.print_exc()
    exits.leave(code or 0)


def _unraisable(error: Any) -> None:
    """As Python's own hook, but for what tensorstore's threads say of writes that outlive a save
    which failed, and whose error is raised as well."""
    if not (isinstance(error.exc_value, RuntimeError) and "loop is closed" in str(error.exc_value)):
        sys.__unraisablehook__(error)


def _main(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    if len(argv) > 1:
        return fail(f"unexpected argument {argv[1]!r}; options look like --name=value")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells 30 lines a checkpoint
        logging.get_absl_handler().addFilter(_is_for_people)
    _choose_platform()
    try:
        code = main(argv)
        sys.stdout.flush()  # here an error of it still has a name
        return code or 0
    except KeyboardInterrupt:  # raised by a library: ours does not come this way
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        return _output_gone()
    except Exception as error:
        described = exits.described(error)
        if described is None:
            raise
        code, message = described
        fail(message)
        return code


def _is_for_people(record: Any) -> bool:
    """Not what orbax and Daft say of their own use, and of errors that they raise as well."""
    return "/orbax/" not in record.pathname and not record.pathname.endswith(".rs")


def _output_gone() -> int:
    """As other tools end under `| head`; what is still buffered has no reader."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exits.EXIT_BROKEN_PIPE


def _choose_platform() -> None:
    """The CPU where there is no NVIDIA driver: JAX's GPU plugin would say so at length first."""
    driver = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
    if "JAX_PLATFORMS" not in os.environ and not driver and importlib.util.find_spec("jax_plugins"):
        import jax  # seconds, for programs that need none of it

        jax.config.update("jax_platforms", "cpu")


def define_overwrite() -> None:
    flags.DEFINE_bool(OVERWRITE, False, "Replace an output that exists.")


# ---- config files ----


def define_config(
    flag_values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None
) -> flags.FlagHolder:
    """`--config=experiments/….py[:argument]`, with overrides as `--config.model.layers=4`."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Python file with get_config(), FILE or FILE:ARGUMENT; its values can be set as "
        "--config.key=value.",
        flag_values=flag_values,
        sys_argv=argv,
    )
    flag_values["config"].parser = _ConfigParser()
    return holder


class _ConfigParser(flags.ArgumentParser):
    """Loads a config file; its errors name file, line and exception."""

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        path, colon, rest = argument.partition(":")
        try:
            loader = importlib.machinery.SourceFileLoader("config_config", path)
            module = importlib.util.module_from_spec(
                importlib.util.spec_from_loader(loader.name, loader)
            )
            sys.modules[loader.name] = module  # dataclasses in it look there
            loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise UserError(f"--config={path}: has no function get_config()")
            config = module.get_config(*([rest] if colon else []))
        except UserError:
            raise
        except Exception as error:
            raise UserError(_error_in(path, error)) from error
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(
                f"--config={path}: get_config() returned a {type(config).__name__}, not an "
                "ml_collections.ConfigDict"
            )
        return config.lock()

    def flag_type(self) -> str:
        return "config file"


def _error_in(path: str, error: Exception) -> str:
    """Where in the file, and what: the line of the file itself that led to the error."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"--config={path}: line {error.lineno}: {type(error).__name__}: {error.msg}"
    if isinstance(error, OSError) and error.filename == path:
        return f"--config={path}: {error.strerror}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == path]  # fmt: skip
    where = f"line {lines[-1]}: " if lines else ""
    return f"--config={path}: {where}{type(error).__name__}: {error}"


def require_config(config: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict:
    if config is None:
        raise UserError("--config is required: a Python file with get_config()")
    return config


def load_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """What a program would get of `--config=FILE` and its overrides.

    Raises:
      UserError: the file or an override is wrong, in the program's words.
    """
    values, argv = flags.FlagValues(), ["", *arguments]
    holder = define_config(values, argv)
    try:
        values(argv)
    except Exception as error:
        raise UserError(_flag_error(argv, error)) from None
    return require_config(holder.value)


# ---- options ----


def _parser(doc: str | None) -> Callable[[Sequence[str]], list[str]]:
    def parse(argv: Sequence[str]) -> list[str]:
        if any(argument in HELP for argument in argv[1:]):
            text = help_text(sys.modules["__main__"].__doc__ if doc is None else doc)
            sys.exit(_main(lambda _: print(text), argv[:1]))
        try:
            return flags.FLAGS(list(argv))
        except Exception as error:
            sys.exit(fail(_flag_error(argv, error)))

    return parse


def help_text(doc: str | None, values: flags.FlagValues = flags.FLAGS) -> str:
    """`doc`, and each option that this package or an experiment defined, in their order."""
    shown = [doc.strip() if doc else "", "", "Options:"]
    for module, defined in values.flags_by_module_dict().items():
        own = module.split(".")[0] in ("llama3_jax", "experiments") or "__main__" in module
        if own or module == sys.argv[0]:
            shown += [_option_text(flag) for flag in defined]
    return "\n".join(shown)


def _option_text(flag: flags.Flag) -> str:
    text, _, several = flag.help.partition(";\n    repeat this option")  # absl's words
    choices = re.match(r"<(.*?)>: ", text)
    text = text[choices.end() :] if choices else text
    form = f"--{flag.name}={choices[1] if choices else '…'}"
    if flag.boolean:
        form = f"--[no]{flag.name}"
    if flag.short_name:
        form += f", -{flag.short_name}"
    if several and "several" not in text:
        text += " May be given several times."
    if flag.default not in (None, [], "", False) and "default" not in text.lower():
        default = flag.default
        text += f" Default: {','.join(default) if isinstance(default, list) else default}."
    return textwrap.fill(
        f"  {form}  {text}", width=100, subsequent_indent=" " * 6, break_on_hyphens=False
    )


def _flag_error(argv: Sequence[str], error: Exception) -> str:
    if isinstance(error, flags.Error | UserError):
        return str(error)
    given = [argument for argument in argv if argument.startswith("--config")]
    if isinstance(error, AttributeError | KeyError):  # raised by an override
        words = re.findall(r"\w+", str(error).replace("\\n", " "))
        given = [argument for argument in given if words and f".{words[0]}" in argument] or given
        near = f"; nearest valid key: {words[4]}" if words[1:3] == ["Did", "you"] else ""
        return f"{given[0]}: the config has no such key{near}"
    return f"{given[0]}: {type(error).__name__}: {error}"
