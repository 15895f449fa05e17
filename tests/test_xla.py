"""How XLA is run: options by platform, memory, cache."""

import subprocess
import sys

import jax
import pytest
from conftest import REPOSITORY

from llama3_jax import xla
from llama3_jax.errors import UserError
from llama3_jax.schema import parse
from llama3_jax.xla import XlaConfig


def test_options_are_those_of_the_platform_and_the_config_comes_last():
    config = XlaConfig(options="xla_gpu_memory_limit_slop_factor=95 xla_cpu_x=1 xla_dump_to=d")
    assert config.compiler_options("gpu") == xla.GPU_OPTIONS | {
        "xla_gpu_memory_limit_slop_factor": "95", "xla_dump_to": "d"
    }  # fmt: skip
    assert config.compiler_options("cpu") == {"xla_cpu_x": "1", "xla_dump_to": "d"}
    assert XlaConfig().compiler_options("gpu", 4) == xla.GPU_OPTIONS | xla.PIECES_OPTIONS
    assert XlaConfig(options="xla_gpu_x=true").compiler_options("gpu")["xla_gpu_x"] is True


def test_deterministic_mode_is_for_gpus():
    config = XlaConfig(deterministic=True)
    assert config.compiler_options("gpu")["xla_gpu_deterministic_ops"] is True
    assert config.compiler_options("cpu") == {}


@pytest.mark.parametrize("options", ["xla_gpu_x", "gpu_x=1", "xla_gpu_x="])
def test_what_is_no_option_is_named(options):
    with pytest.raises(UserError, match="config.options?: .*is not xla_name=value|xla_name=value"):
        parse(XlaConfig, {"options": options})


def test_the_fraction_is_the_environments_the_configs_or_ours(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert XlaConfig().fraction() == xla.MEMORY_FRACTION
    assert XlaConfig(memory_fraction=0.5).fraction() == 0.5
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".8")
    assert XlaConfig().fraction() == 0.8
    with pytest.raises(
        UserError, match="XLA_CLIENT_MEM_FRACTION=.8 and config.xla.memory_fraction"
    ):
        XlaConfig(memory_fraction=0.5).fraction()
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "92")
    with pytest.raises(UserError, match="XLA_CLIENT_MEM_FRACTION=92: should be"):
        XlaConfig().fraction()


class Device:
    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return {"bytes_limit": self.limit}


def test_a_forecast_above_what_jax_may_take_is_refused_with_what_to_set(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.75")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(60 * 2**30)])
    xla.check_memory({"short": 59 * 2**30}, XlaConfig())
    forecasts = {"short": 59 * 2**30, "long": 66 * 2**30}
    with pytest.raises(UserError, match=r"stage long needs 66.0 .* 60.0 .*memory_fraction=0.8[45]"):
        xla.check_memory(forecasts, XlaConfig())
    with pytest.raises(UserError, match="more ranks"):
        xla.check_memory({"long": 90 * 2**30}, XlaConfig())
    xla.check_memory(forecasts, XlaConfig(memory_check=False))


def test_a_cpu_has_no_limit_to_check():
    xla.check_memory({"long": 1e15}, XlaConfig())


def started(code: str, tmp_path, **environment) -> str:
    import os

    clean = {k: v for k, v in os.environ.items() if "CACHE" not in k and "XLA" not in k}
    done = subprocess.run(
        [sys.executable, "-c", "import jax; from llama3_jax import xla; " + code],
        capture_output=True, text=True, cwd=REPOSITORY,
        env=clean | {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cache_is_where_it_is_said_and_off_where_it_is_not_safe(tmp_path):
    show = "print(jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache)"
    on = started(f"xla.start(xla.XlaConfig(cache='on')); {show}", tmp_path)
    assert on == f"{tmp_path}/.cache/llama3_jax/xla True"
    given = started(
        f"xla.start(xla.XlaConfig(cache='on', cache_dir='{tmp_path}/here')); {show}", tmp_path
    )
    assert given == f"{tmp_path}/here True"
    auto = started(f"xla.start(); {show}", tmp_path)
    assert auto.endswith(str(jax.version.__version_info__ >= (0, 11)))
    assert started(f"xla.start(xla.XlaConfig(cache='off')); {show}", tmp_path).endswith("False")
