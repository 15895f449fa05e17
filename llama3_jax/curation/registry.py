"""The stages of curation, in the order in which a document passes them.

A stage is `function(frame, config, scratch) -> frame`. It returns exactly the rows that it got, one
for each `doc`, in any order, with score columns named `<stage>_<score>`, possibly another `text`,
and a column `reason`: null for what is kept, otherwise a short name that can be counted. `scratch`
is an empty folder that is removed afterwards. `version` rises whenever the same input and config
would give another output: results of older versions are made anew. `files`: what the result depends
on besides the files that the config names. `report` writes what the stage can tell of all its
documents, those it rejected included.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import daft

from llama3_jax.curation import (
    c4,
    classes,
    contamination,
    divergence,
    extract,
    gopher,
    language_quality,
    languages,
    lines,
    minhash,
    page_kinds,
    pii,
    quality_fasttext,
    quality_roberta,
    safety,
    url_dedup,
    urls,
)
from llama3_jax.schema import Config


class Stage(NamedTuple):
    name: str
    function: Callable[[daft.DataFrame, Any, Path], daft.DataFrame]
    config: type[Config]
    version: int
    files: Callable[[Any], Sequence[Path]] = lambda config: ()
    report: Callable[[Path, daft.DataFrame, Any], None] | None = None


STAGES: list[Stage] = [
    Stage("extract", extract.extract, extract.ExtractConfig, extract.VERSION),
    Stage("urls", urls.urls, urls.UrlsConfig, urls.VERSION, urls.list_files),
    Stage("url_dedup", url_dedup.url_dedup, url_dedup.UrlDedupConfig, url_dedup.VERSION),
    Stage("languages", languages.languages, languages.LanguagesConfig, languages.VERSION),
    Stage("minhash", minhash.minhash, minhash.MinhashConfig, minhash.VERSION),
    Stage("lines", lines.lines, lines.LinesConfig, lines.VERSION),
    Stage("c4", c4.c4, c4.C4Config, c4.VERSION),
    Stage("gopher", gopher.gopher, gopher.GopherConfig, gopher.VERSION),
    Stage("divergence", divergence.divergence, divergence.DivergenceConfig, divergence.VERSION),
    Stage("safety", safety.safety, safety.SafetyConfig, safety.VERSION),
    Stage("pii", pii.pii, pii.PiiConfig, pii.VERSION),
    Stage(
        "quality_fasttext",
        quality_fasttext.quality_fasttext,
        quality_fasttext.QualityFastTextConfig,
        quality_fasttext.VERSION,
    ),
    Stage(
        "quality_roberta",
        quality_roberta.quality_roberta,
        quality_roberta.QualityRobertaConfig,
        quality_roberta.VERSION,
    ),
    Stage("page_kinds", page_kinds.page_kinds, page_kinds.PageKindsConfig, page_kinds.VERSION),
    Stage(
        "language_quality",
        language_quality.language_quality,
        language_quality.LanguageQualityConfig,
        language_quality.VERSION,
    ),
    Stage("classes", classes.classes, classes.ClassesConfig, classes.VERSION),
    Stage(
        "contamination",
        contamination.contamination,
        contamination.ContaminationConfig,
        contamination.VERSION,
        report=contamination.write_report,
    ),
]
