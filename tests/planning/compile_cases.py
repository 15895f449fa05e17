"""Compiles small cases for H100s and prints, as JSON, what the compiler says of each.

A program of its own: the tests' process is set up for CPU devices. Arguments name cases.
"""

import llama3_jax.planning.environment  # noqa: F401, I001  # before jax

import json
import sys

from llama3_jax.model.config import ModelConfig
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.planning.case import Case
from llama3_jax.planning.compiler import compile_case
from llama3_jax.planning.hlo import collectives, overlap, totals
from llama3_jax.training.optimizer import OptimizerConfig

WIDE = ModelConfig(
    dim=2048, layers=6, heads=16, kv_heads=8, head_dim=128, ffn_dim=7168, vocab_size=32_000
)

KERNELS = dict.fromkeys(("attention", "loss", "norm", "rotary", "swiglu"), "triton")


def case(name: str, rows: int, length: int, micro: int, mesh: dict, **model) -> Case:
    model = WIDE.model_copy(update={"attention": "chunked", "remat": "full"} | model)
    return Case(name, model, OptimizerConfig(), MeshConfig(**mesh), rows, length, micro, steps=10)


CASES = [
    case("one GPU", 1, 8192, 1, {}, remat="save_attention", **KERNELS),
    case("zero3", 16, 2048, 1, dict(data=8), attention="reference"),
    case("zero3 again", 64, 1024, 2, dict(data=16), attention="reference", remat="save_dots"),
    case("kept, none", 16, 256, 2, dict(data=8, reshard_after_forward=False), remat="none", attention="reference"),
    case("tensor", 8, 1024, 2, dict(data=2, tensor=4), attention="reference"),
    case("context", 2, 16_384, 1, dict(data=2, context=2, tensor=2), remat="save_dots"),
    case("kernels", 8, 8192, 1, dict(data=4, tensor=2), layers=2, remat="save_dots", **KERNELS),
    case("pipeline", 32, 1024, 8,
         dict(data=2, pipe=2, tensor=2, reshard_after_forward=False, virtual_stages=2), attention="reference"),
    case("all four", 16, 8192, 4,
         dict(data=2, pipe=2, context=2, tensor=2, virtual_stages=3), remat="save_dots"),
]  # fmt: skip


def main() -> None:
    results = {}
    for case in (case for case in CASES if case.name in sys.argv[1:]):
        compiled = compile_case(case)
        found = collectives(compiled.hlo, case)
        results[case.name] = {
            "arguments": compiled.arguments,
            "peak": compiled.peak,
            "kernels": compiled.hlo.count("triton_kernel_call"),
            "overlap": overlap(found),
            "bytes": [[kind, axes, link, n] for (kind, axes, link), n in totals(found).items()],
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
