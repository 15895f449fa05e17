"""Files of tensors in the safetensors format, and the JSON files beside them.

https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header with each
tensor's dtype, shape and bytes, raw data. One tensor at a time is in memory.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llama3_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}


class Stored(NamedTuple):
    """Where a tensor is in its file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        count = math.prod(self.shape)
        return np.fromfile(self.file, self.dtype, count, offset=self.offset).reshape(self.shape)


def read_headers(directory: Path, ignore: frozenset[str] = frozenset()) -> dict[str, Stored]:
    """Every stored tensor by name, from the single file or from all shards of the index.

    Those named in `ignore` are left out, whatever they are.

    Raises:
      UserError: no checkpoint, or a file of it that is damaged, truncated or of another dtype.
    """
    if (directory / SINGLE).is_file():
        return _read_header(directory / SINGLE, ignore)
    if not (index := directory / INDEX).is_file():
        raise UserError(f"{directory}: has no {SINGLE} and no {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    stored = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if not (directory / shard).is_file():
            name = next(name for name, file in weight_map.items() if file == shard)
            raise UserError(f"{directory / shard}: shard not found; it should hold {name}")
        stored |= _read_header(directory / shard, ignore)
    for name, shard in weight_map.items():
        if name in ignore:
            continue
        if name not in stored or stored[name].file.name != shard:
            raise UserError(f"{directory / shard}: tensor {name} is missing")
    return stored


def _read_header(path: Path, ignore: frozenset[str]) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(f"{path}: header is truncated, or this is not a safetensors file")
        header = file.read(length)
    stored = {}
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            if name in ignore:
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            shape, kind = tuple(entry["shape"]), entry["dtype"]
            if kind not in _DTYPES:
                raise UserError(f"{path}: tensor {name} is {kind}; only {', '.join(_DTYPES)} work")
            if end > size:
                raise UserError(f"{path}: truncated at byte {size}; tensor {name} ends at {end}")
            stored[name] = Stored(path, np.dtype(_DTYPES[kind]), shape, begin)
            if end - begin != math.prod(shape) * stored[name].dtype.itemsize:
                raise UserError(f"{path}: tensor {name} of {shape} cannot have {end - begin} bytes")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: the header is not that of a safetensors file") from None
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: no such file, or no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: file not found")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object: {error}") from None


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: str,
) -> None:
    """Writes a file of the tensors named in `shapes`; `read` gives one, in `dtype`, when its turn is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        place = {"shape": shape, "data_offsets": [begin, end]}
        header[name] = {"dtype": _DTYPE_NAMES[dtype], **place}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            array = read(name)
            array.tofile(file)
            del array  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
