import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import random_documents

from experiments.demo import run
from experiments.demo.train import SOURCES, VOCAB_SIZE, get_config
from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data.corpus import Corpus
from llama3_jax.data.tokenizing import in_holdout
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.timeline import Timeline
from llama3_jax.schema import parse


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The demo's parts up to training, on small made text."""
    folder = tmp_path_factory.mktemp("demo")
    random = np.random.default_rng(0)
    for seed, source in enumerate(SOURCES):
        documents = random_documents(source, 150, seed)
        # Enough different words for the tokenizer to find 4,080 tokens.
        for identifier in documents:
            words = ("".join(random.choice(list("abcdefghijklmnop"), 6)) for _ in range(60))
            documents[identifier] += " " + " ".join(words)
        curated = folder / "curation" / "documents" / source
        curated.mkdir(parents=True)
        columns = {"doc": [*documents], "text": [*documents.values()]}
        pq.write_table(pa.table(columns), curated / "part-00000.parquet")
    run.train_tokenizer(folder / "tokenizer_4k")
    run.tokenize(folder / "tokens")
    run.count_baselines(folder / run.BASELINES_FILE)
    return folder


def test_the_tokenizer_has_the_models_vocabulary(prepared):
    assert tokenizers.load(prepared / "tokenizer_4k").vocab_size == VOCAB_SIZE


def test_documents_are_split_by_the_holdout_the_tokenizer_left_out(prepared):
    for source in SOURCES:
        for split, held_out in (("train", False), ("validation", True)):
            corpus = Corpus(prepared / "tokens" / source / split)
            ids = {corpus.document(i).id for i in range(len(corpus))}
            assert ids and all(in_holdout(i, run.HOLDOUT) == held_out for i in ids)


def test_baselines_are_there_for_each_source(prepared):
    baselines = json.loads((prepared / run.BASELINES_FILE).read_text())
    assert list(baselines) == ["unigram", "bigram", "5-gram"]
    assert all(set(losses) == set(SOURCES) for losses in baselines.values())
    assert all(0 < loss < 10 for losses in baselines.values() for loss in losses.values())


def test_a_finished_part_is_passed_over(tmp_path):
    made = []
    for _ in range(2):
        run.part("make", tmp_path / "thing", made.append)
    assert made == [tmp_path / "thing"]


def test_the_config_is_valid_and_has_both_ramps():
    config = parse(RunConfig, get_config("anywhere"))
    timeline = Timeline(config.stages, config.model.rope, config.mesh)
    assert len({stage.length for stage in timeline.stages}) == 2
    assert len({stage.batch_tokens for stage in timeline.stages}) == 2
    assert 1e6 < config.model.parameter_count() < 2e6
    assert timeline.learning_rate(timeline.tokens) == 0
