"""Compiles kernels for a GPU that is not there, and says what of the chip they take.

launches = launches_of(function, *shapes)        # what a JAX function would launch
resources = compile_for_hopper(launches[0])      # registers, spills, shared memory
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llama3_jax.kernels.gpu.call import HOPPER, Launch, recorded

# What a block may take of an H100 at most, in bytes of shared memory and 32-bit registers.
SHARED_BYTES = 232_448
REGISTERS = 65_536


class Resources(NamedTuple):
    """Registers a thread, bytes spilled to local memory by a thread, shared bytes and threads of a
    block, how many instructions use Hopper's tensor cores, and machine instructions of each loop
    that has such."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    wgmma: int
    loops: tuple[int, ...]

    @property
    def fits(self) -> bool:
        return (
            self.spilled_bytes == 0
            and self.shared_bytes <= SHARED_BYTES
            and self.registers * self.threads <= REGISTERS
        )


def launches_of(function: Callable, *shapes: Any) -> list[Launch]:
    """The launches of `function(*shapes)`, of arrays or ShapeDtypeStructs, without any."""
    with recorded() as launches:
        # A fresh function: a trace that jax already holds would launch nothing again.
        jax.eval_shape(lambda *arguments: function(*arguments), *shapes)
    return launches


def compile_for_hopper(launch: Launch) -> Resources:
    """Compiles a launch for compute capability 9.0 as jax-triton does."""
    names = launch.kernel.arg_names
    constants = dict(launch.constants)
    signature = {
        name: f"*{_TYPES[dtype]}" for name, dtype in zip(names, launch.dtypes, strict=False)
    }
    signature |= dict.fromkeys(constants, "constexpr")
    # XLA's buffers are aligned, which vector loads rely on.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(launch.dtypes))}
    source = ASTSource(launch.kernel, signature, constants, aligned)
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
    registers, spilled, loops = _assembled(compiled.asm["ptx"])
    # Warp specialisation adds warps of its own.
    warps = getattr(compiled.metadata, "total_num_warps", None) or compiled.metadata.num_warps
    wgmma = compiled.asm["ptx"].count("wgmma.mma_async")
    return Resources(registers, spilled, compiled.metadata.shared, 32 * warps, wgmma, loops)


def _assembled(ptx: str) -> tuple[int, int, tuple[int, ...]]:
    """Registers and spilled bytes (stores and loads) by the assembler's own account, and loops."""
    architecture = re.search(r"^\.target (\S+)", ptx, re.MULTILINE)[1].rstrip(",")
    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as directory:
        source, binary = Path(directory, "kernel.ptx"), Path(directory, "kernel.cubin")
        source.write_text(ptx)
        command = [tools.ptxas.path, "-v", f"--gpu-name={architecture}", source, "-o", binary]
        told = _run(command).stderr
        loops = _loops(_run([tools.nvdisasm.path, "-c", binary]).stdout)
    registers = int(re.search(r"Used (\d+) registers", told)[1])
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told).groups()
    return registers, int(stores) + int(loads), loops


def _run(command: list) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def _loops(assembly: str) -> tuple[int, ...]:
    """Instructions of each loop that uses tensor cores; of nested loops the inner alone."""
    labels, code, found = {}, [], []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            start = labels.get(back[1], len(code)) if back else len(code)
            if any("HGMMA" in x for x in code[start:]):
                found.append((start, len(code)))
    inner = [
        (start, stop)
        for start, stop in found
        if not any(start <= a and b <= stop for a, b in found if (a, b) != (start, stop))
    ]
    return tuple(stop - start for start, stop in inner)


_TYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "bool": "i1",
}  # fmt: skip
