"""Every constant of the planner, with its source. A measured table replaces what it names.

None was fitted to a published training speed, so those remain a check.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from llama3_jax.errors import UserError


class Constant(NamedTuple):
    value: float
    unit: str
    source: str


_SHEET = "NVIDIA H100 SXM5 data sheet"
TABLE: dict[str, Constant] = {
    "peak": Constant(989.4e12, "FLOP/s", f"{_SHEET}: bfloat16, dense"),
    "memory": Constant(84_929_347_584, "bytes", "what the driver of an H100 80GB HBM3 reports"),
    "memory_bandwidth": Constant(3.0e12, "bytes/s", f"{_SHEET}: 3.35 TB/s; copies reach about 0.9"),
    "gemm_efficiency": Constant(
        0.72, "of peak", "large bfloat16 products reach 700 to 790 TFLOP/s at 700 W (Bekman, "
        "Machine Learning Engineering, maximum achievable matmul FLOPS: 0.80 at the best shape); "
        "0.9 of that for the shapes of a layer",
    ),
    "attention_forward_efficiency": Constant(
        0.60, "of peak", "FlashAttention-3 (arXiv 2407.08608, figure 5), causal, head dim 128, 8K+",
    ),
    "attention_backward_efficiency": Constant(
        0.50, "of peak", "FlashAttention-3 (arXiv 2407.08608, figure 6), counting 2.5 forwards",
    ),
    "nvlink": Constant(
        360e9, "bytes/s", f"{_SHEET}: 450 GB/s a direction; NCCL's collectives reach about 0.8"
    ),
    "network": Constant(
        42e9, "bytes/s", "Llama 3 paper, section 3.3.1: 400 Gb/s a GPU; NCCL reaches about 0.85"
    ),
    "overlap": Constant(
        0.8, "of its time", "assumed: what is hidden of a collective with products scheduled under it"
    ),
    "power": Constant(1_300, "W a GPU", f"{_SHEET}: 10.2 kW for a host of 8 (DGX H100 user guide)"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Constants:
    """The table's values as attributes, and where each is from."""

    values: dict[str, float]
    sources: dict[str, str]

    def __getattr__(self, name: str) -> float:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None


def load_constants(measured: str | None = None) -> Constants:
    """The table above, with the entries of a JSON file {name: {value, source}} in their place.

    Raises:
      UserError: the file cannot be read, or names a constant that is not in the table.
    """
    values = {name: constant.value for name, constant in TABLE.items()}
    sources = {name: constant.source for name, constant in TABLE.items()}
    if measured is not None:
        try:
            entries = json.loads(Path(measured).read_text(encoding="utf-8"))
            for name, entry in entries.items():
                if name not in TABLE:
                    raise UserError(
                        f"--constants={measured}: {name} is unknown; known: {', '.join(TABLE)}"
                    )
                values[name], sources[name] = float(entry["value"]), str(entry["source"])
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(
                f"--constants={measured}: should be JSON {{name: {{value, source}}}}: {error}"
            ) from error
    return Constants(values, sources)
