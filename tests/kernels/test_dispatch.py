import subprocess
import sys
import typing

import pytest

from llama3_jax.errors import UserError
from llama3_jax.kernels import dispatch
from llama3_jax.model.config import ModelConfig, preset
from tests.conftest import REPOSITORY

CHOICES = preset("42M").kernels()


def test_every_choice_of_the_config_is_in_the_table_and_the_reverse():
    for operation, known in dispatch.KERNELS.items():
        annotation = ModelConfig.model_fields[operation].annotation
        assert set(typing.get_args(annotation)) == set(known)


@pytest.mark.parametrize("operation", dispatch.KERNELS)
def test_every_entry_is_a_function(operation):
    for implementation in dispatch.KERNELS[operation]:
        if implementation == "triton":
            pytest.importorskip("triton", reason="triton has wheels for Linux only")
        assert callable(dispatch.resolve(operation, implementation))


def test_what_needs_a_gpu_is_refused_elsewhere():
    dispatch.check(CHOICES, "cpu")
    with pytest.raises(UserError, match="attention='cudnn' needs an NVIDIA GPU.*here: 'reference'"):
        dispatch.check(CHOICES | {"attention": "cudnn"}, "cpu")
    dispatch.check(CHOICES | {"attention": "cudnn"}, "gpu")


def test_the_log_names_the_kernel_behind_each_operation():
    told = dispatch.describe(CHOICES | {"attention": "triton", "loss": "chunked"})
    assert told.startswith(
        "attention=triton (gpu/flash_attention.py), loss=chunked (cross_entropy.py), norm=reference"
    )
    assert all(f"{operation}=" in told for operation in dispatch.KERNELS)


def test_without_triton_installed_the_package_to_install_is_named():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from llama3_jax.kernels import dispatch\n"
        "try: dispatch.resolve('loss', 'triton')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    assert "UserError loss='triton' needs the package triton" in run(program)


def test_the_programs_import_no_triton():
    program = (
        "import sys, llama3_jax.train, llama3_jax.generate, llama3_jax.convert\n"
        # torch, where installed, has a module of that name for its own kernels.
        "found = [name for name in sys.modules if {'triton', 'jax_triton'} & set(name.split('.'))]\n"
        "print([name for name in found if not name.startswith('torch.')])"
    )
    assert run(program).strip() == "[]"


def run(program: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
