"""Stage pii: e-mail addresses, phone, IP, card and identity numbers go, or their documents (sec. 3.1.1).

    text        with [email], [phone], [ip], [card], [iban], [id] in their place
    pii_<kind>  how many there were
    reason      pii_<kind>, pii_too_many

What finds them is in pii_patterns.py: by shape, and by checksum or range where there is one. Pages
where one pass of RE2 finds nothing of such a shape are not looked at again (RE2 reads each character
once, at 500 MB/s where Python's own patterns take a tenth of a second a MB).
"""

import itertools
from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from daft import col
from pydantic import Field

from llama3_jax.curation import pii_patterns
from llama3_jax.curation.pii_patterns import Kind
from llama3_jax.schema import Config

VERSION = 2


class PiiConfig(Config):
    """`mask` kinds are replaced by `placeholder`; a document with one of `reject` is rejected.

    So is one with more than `most` different items of any kind, masked or not (None for no limit):
    the paper removes sites with "high volumes of PII" and gives no number, this one is ours.
    """

    mask: tuple[Kind, ...] = pii_patterns.KINDS
    reject: tuple[Kind, ...] = ()
    most: int | None = Field(20, ge=0)
    placeholder: str = "[{kind}]"
    exempt_sources: tuple[str, ...] = ()


def pii(frame: daft.DataFrame, config: PiiConfig, scratch: Path) -> daft.DataFrame:
    """Changes text, adds the counts and reason."""
    frame = frame.with_column("_pii", _Pii(config)(col("text"), col("source")))
    names = {"text": "text", "reason": "reason"} | {
        f"pii_{kind}": kind for kind in pii_patterns.KINDS
    }
    frame = frame.with_columns({name: col("_pii").get(key) for name, key in names.items()})
    return frame.exclude("_pii")


def masked(text: str, found: list[pii_patterns.Item], config: PiiConfig) -> str:
    parts, end = [], 0
    for item in found:
        if item.kind in config.mask:
            parts += [text[end : item.start], config.placeholder.format(kind=item.kind)]
            end = item.stop
    return "".join([*parts, text[end:]])


def reason_of(text: str, found: list[pii_patterns.Item], config: PiiConfig) -> str | None:
    for kind in config.reject:
        if any(item.kind == kind for item in found):
            return f"pii_{kind}"
    different = {text[item.start : item.stop] for item in found}
    if config.most is not None and len(different) > config.most:
        return "pii_too_many"
    return None


@daft.cls
class _Pii:
    def __init__(self, config: PiiConfig):
        self.config = config

    @daft.method.batch(
        return_dtype=daft.DataType.struct(
            dict.fromkeys(("text", "reason"), daft.DataType.string())
            | dict.fromkeys(pii_patterns.KINDS, daft.DataType.int64())
        ),
        batch_size=1024,
    )
    def __call__(self, text: daft.Series, source: daft.Series) -> pa.Array:
        config, text = self.config, text.to_arrow().cast(pa.large_string()).fill_null("")
        mask = np.array(pc.match_substring_regex(text, pii_patterns.GATE))
        mask &= ~np.isin(np.array(source.to_pylist(), object), config.exempt_sources)
        shaped = text.filter(pa.array(mask))
        gates = [pc.match_substring_regex(shaped, one.gate) for one in pii_patterns.FINDERS]
        passed = np.array([np.asarray(gate) for gate in gates]).T
        counts = {kind: np.zeros(len(text), np.int64) for kind in pii_patterns.KINDS}
        reasons, texts = np.full(len(text), None, object), []
        for one, row, which in zip(shaped.to_pylist(), np.flatnonzero(mask), passed, strict=True):
            found = pii_patterns.find(one, itertools.compress(pii_patterns.FINDERS, which))
            for item in found:
                counts[item.kind][row] += 1
            texts.append(masked(one, found, config))
            reasons[row] = reason_of(one, found, config)
        text = pc.replace_with_mask(text, pa.array(mask), pa.array(texts, pa.large_string()))
        columns = [text, pa.array(reasons, pa.string()), *map(pa.array, counts.values())]
        return pa.StructArray.from_arrays(columns, ["text", "reason", *counts])
