"""Every constant of the planner, with its source. A measured table replaces what it names.

None was fitted to a published training speed, so those remain a check. What is not measured has a
range beside its value: the planner gives every time as a range, too.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from llama3_jax.errors import UserError


class Constant(NamedTuple):
    """`slow` and `fast` are the ends of what it may be, where it is not known exactly."""

    value: float
    unit: str
    source: str
    slow: float | None = None
    fast: float | None = None


_SHEET = "NVIDIA H100 SXM5 data sheet"
TABLE: dict[str, Constant] = {
    "peak": Constant(989.4e12, "FLOP/s", f"{_SHEET}: bfloat16, dense"),
    "memory": Constant(84_929_347_584, "bytes", "what the driver of an H100 80GB HBM3 reports"),
    "memory_bandwidth": Constant(3.0e12, "bytes/s", f"{_SHEET}: 3.35 TB/s; copies reach about 0.9"),
    "gemm_efficiency": Constant(
        0.72, "of peak", "large bfloat16 products reach 700 to 790 TFLOP/s at 700 W (Bekman, "
        "Machine Learning Engineering, maximum achievable matmul FLOPS: 0.80 at the best shape); "
        "0.9 of that for the shapes of a layer", 0.66, 0.76,
    ),
    "triton_forward_efficiency": Constant(
        0.40, "of peak", "of these kernels by their instructions (experiments/benchmarks/gpu.md); "
        "Triton's kernel in FlashAttention-3 (arXiv 2407.08608), causal, 8K: 369 TFLOP/s",
        0.37, 0.45,
    ),
    "triton_backward_efficiency": Constant(
        0.30, "of peak", "as the forward one; counts 2.5 forwards, and computes 3.5", 0.27, 0.34
    ),
    "cudnn_forward_efficiency": Constant(
        0.53, "of peak", "FlashAttention-3 (arXiv 2407.08608, figure 5), cuDNN, causal, head dim "
        "128, 8K: 529 TFLOP/s", 0.48, 0.58,
    ),
    "cudnn_backward_efficiency": Constant(
        0.48, "of peak", "FlashAttention-3 (figure 6): 518 TFLOP/s without a mask; a causal one "
        "takes some of it", 0.42, 0.52,
    ),
    "nvlink": Constant(
        360e9, "bytes/s", f"{_SHEET}: 450 GB/s a direction; NCCL's collectives reach about 0.8",
        320e9, 390e9,
    ),
    "network": Constant(
        42e9, "bytes/s", "Llama 3 paper, section 3.3.1: 400 Gb/s a GPU; NCCL reaches about 0.85",
        36e9, 45e9,
    ),
    "overlap": Constant(
        0.8, "of its time", "assumed: what is hidden of a collective with products scheduled under "
        "it; the rest is what products lose by sharing memory and multiprocessors", 0.6, 0.95,
    ),
    "power": Constant(1_300, "W a GPU", f"{_SHEET}: 10.2 kW for a host of 8 (DGX H100 user guide)"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Constants:
    """The table's values as attributes, and where each is from."""

    values: dict[str, float]
    sources: dict[str, str]
    ends: dict[str, tuple[float, float]]

    def end(self, number: int) -> "Constants":
        """All at their slow (0) or fast (1) ends."""
        ends = {name: pair[number] for name, pair in self.ends.items()}
        return dataclasses.replace(self, values=self.values | ends, ends={})

    def __getattr__(self, name: str) -> float:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None


def load_constants(measured: str | None = None) -> Constants:
    """The table above, with the entries of a JSON file {name: {value, source}} in their place.

    What was measured has no range.

    Raises:
      UserError: the file cannot be read, or names a constant that is not in the table.
    """
    values = {name: constant.value for name, constant in TABLE.items()}
    sources = {name: constant.source for name, constant in TABLE.items()}
    ends = {name: (c.slow, c.fast) for name, c in TABLE.items() if c.slow and c.fast}
    if measured is not None:
        try:
            entries = json.loads(Path(measured).read_text(encoding="utf-8"))
            for name, entry in entries.items():
                if name not in TABLE:
                    raise UserError(
                        f"--constants={measured}: {name} is unknown; known: {', '.join(TABLE)}"
                    )
                values[name], sources[name] = float(entry["value"]), str(entry["source"])
                ends.pop(name, None)
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(
                f"--constants={measured}: should be JSON {{name: {{value, source}}}}: {error}"
            ) from error
    return Constants(values, sources, ends)
