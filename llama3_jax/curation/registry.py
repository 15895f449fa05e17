"""The stages of curation, in the order in which a document passes them.

A stage is `function(frame, config, scratch) -> frame`. It returns exactly the rows that it got, one
for each `doc`, in any order, with score columns named `<stage>_<score>`, possibly another `text`,
and a column `reason`: null for what is kept, otherwise a short name that can be counted. `scratch`
is an empty folder that is removed afterwards. `version` rises whenever the same input and config
would give another output: results of older versions are made anew.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import daft

from llama3_jax.curation import extract
from llama3_jax.schema import Config


class Stage(NamedTuple):
    name: str
    function: Callable[[daft.DataFrame, Config, Path], daft.DataFrame]
    config: type[Config]
    version: int


STAGES: list[Stage] = [
    Stage("extract", extract.extract, extract.ExtractConfig, extract.VERSION),
]
