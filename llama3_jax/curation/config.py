"""What a curation run reads, which stages it passes through, and what it makes of the rest."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_collections
import pydantic
from ml_collections import config_dict

from llama3_jax import schema
from llama3_jax.curation import registry
from llama3_jax.curation.mix import MixConfig
from llama3_jax.curation.page.extract import MAX_BYTES
from llama3_jax.errors import UserError
from llama3_jax.schema import Config

Name = Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Input(Config):
    """One source of documents.

    `paths`: files, folders (read with all below them) or patterns. By suffix: .warc(.gz),
    .warc.wet(.gz), .html(.gz), .htm, .xhtml, .parquet, .jsonl(.gz, .zst), .json.gz and .json.zst
    (JSON lines). `url_prefix` + the path below the folder is the URL of an HTML file; without, it is
    the file's own (file://…). `time` of documents that carry none, ISO 8601. `fields`: what
    parquet columns and JSON fields are called here.
    """

    paths: tuple[str, ...] = pydantic.Field(min_length=1)
    url_prefix: str = ""
    time: str = ""
    fields: Mapping[Literal["url", "time", "html", "text", "title", "language"], str] = (
        pydantic.Field(default_factory=dict)
    )
    # Larger pages are rejected unread.
    max_bytes: int = pydantic.Field(default=MAX_BYTES, gt=0)


class Tokens(Config):
    """Token shards for training, a corpus for each source, as `tokenize encode` writes them.

    `tokenizer` is a path; None: no shards, and no tokens in the funnel. `holdout`: share of the
    documents that go to validation.
    """

    tokenizer: str | None = None
    holdout: float = pydantic.Field(default=0.0, ge=0, lt=1)


class CurationConfig(Config):
    """`inputs` by source name; `stages`, each with its own config, run in the registry's order.

    `mix` plans the sources' weights in a training run from the tokens that came out.
    """

    inputs: Mapping[Name, Input] = pydantic.Field(min_length=1)
    stages: Mapping[str, Any]
    tokens: Tokens = Tokens()
    mix: MixConfig | None = None

    @pydantic.model_validator(mode="after")
    def _mixed_from_shards(self) -> "CurationConfig":
        if self.mix and not self.tokens.tokenizer:
            raise ValueError("mix counts tokens: it needs tokens.tokenizer")
        return self

    @pydantic.field_validator("stages")
    @classmethod
    def _known_stages(cls, stages: Mapping[str, Any]) -> Mapping[str, Any]:
        known = [stage.name for stage in registry.STAGES]
        for name in stages:
            if name not in known:
                raise ValueError(f"{name!r} is no stage; known: {', '.join(known)}")
        if "extract" not in stages:
            raise ValueError("'extract' is missing: it makes text of what was read")
        return stages


def curation_config(**values: Any) -> ml_collections.ConfigDict:
    """What a config file's `get_config` returns: `values` checked, every default filled in.

    With the defaults present, `--config.stages.extract.seconds=5` works for each key.

    Raises:
      UserError: an unknown key or a bad value.
    """
    config, stages = parse(values)
    filled = config.model_dump(exclude={"stages"})
    filled["stages"] = {stage.name: own.model_dump() for stage, own in stages}
    if filled["tokens"]["tokenizer"] is None:
        filled["tokens"]["tokenizer"] = config_dict.placeholder(str)
    return ml_collections.ConfigDict(filled)


def parse(
    values: Mapping[str, Any] | ml_collections.ConfigDict,
) -> tuple[CurationConfig, list[tuple[registry.Stage, Config]]]:
    """The run's config and its stages with theirs, in order.

    Raises:
      UserError: the first offending key by its full path.
    """
    config = schema.parse(CurationConfig, values)
    stages = [
        (
            stage,
            schema.parse(stage.config, config.stages[stage.name], f"config.stages.{stage.name}"),
        )
        for stage in registry.STAGES
        if stage.name in config.stages
    ]
    if config.tokens.tokenizer is not None and not os.path.exists(config.tokens.tokenizer):
        raise UserError(f"config.tokens.tokenizer: {config.tokens.tokenizer} does not exist")
    return config, stages


# Keys whose values are paths, whatever they look like.
_PATH_KEYS = frozenset(("file", "files", "model", "models", "path", "tokenizer"))


def named_files(value: Any, is_path: bool = False) -> list[Path]:
    """Files and folders that a config names: what is in them counts as part of the config."""
    if isinstance(value, str):
        # Elsewhere a word may happen to be a file's name; a path has a slash or a suffix there.
        is_path = is_path or "/" in value or "." in value
        return [Path(value)] if is_path and os.path.exists(value) else []
    if isinstance(value, Mapping):
        return [
            path
            for key, item in value.items()
            for path in named_files(item, is_path or key in _PATH_KEYS)
        ]
    if isinstance(value, list | tuple):
        return [path for item in value for path in named_files(item, is_path)]
    return []
