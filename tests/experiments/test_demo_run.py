import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import random_documents

from experiments.demo import recall, run
from experiments.demo.train import SOURCES, VOCAB_SIZE, get_config
from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data.corpus import Corpus
from llama3_jax.data.tokenizing import in_holdout
from llama3_jax.evaluation import tasks
from llama3_jax.model.definition import define
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.prepare import lay_out, prepare
from llama3_jax.schema import parse


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The demo's parts up to training, on small made text."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "corpus").mkdir()
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


def words_of(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("kind", recall.KINDS)
def test_recall_documents_state_each_key_with_one_value(kind):
    kind = recall.KINDS[kind]
    texts = [" ".join(f"word{i}" for i in range(300))]
    made = recall.documents(texts, 60, kind, words_of)
    assert len({document["id"] for document in made}) == 60
    repeated = 0
    for document in made:
        stated = re.findall(r" Note: (\w+) (\w+)\.", document["text"])
        assert stated and set(dict(stated).items()) == set(stated)
        assert set(dict(stated)) <= set(recall.KEYS)
        assert set(dict(stated).values()) <= set(recall.VALUES)
        repeated += len(stated) > len(set(stated))
    assert repeated > 40
    assert made == recall.documents(texts, 60, kind, words_of)


def test_recall_documents_made_as_needles_state_a_key_and_repeat_it_at_the_end():
    texts = [" ".join(f"word{i}" for i in range(600))]
    kind = recall.KINDS["recall_far"]._replace(once=1.0)
    depths, lengths = [], []
    for document in recall.documents(texts, 400, kind, words_of):
        text = document["text"]
        first, last = re.finditer(r" Note: (\w+) (\w+)\.", text)
        assert first.group() == last.group() and last.end() == len(text)
        depths.append(first.start() / len(text))
        lengths.append(words_of(text))
    assert 0.35 < np.mean(np.equal(depths, 0)) < 0.65
    # The others anywhere: also right before the end.
    assert np.quantile(depths, 0.7) > 0.2 and max(depths) > 0.9
    # To the end of the longest row, never longer: a statement is three words here, and begin and end none.
    least, most = min(lengths), max(lengths)
    shorter = recall.ENDS + 2 * (recall.STATED - 3)
    assert max(recall.ROWS) - shorter - 3 <= most <= max(recall.ROWS) - shorter
    assert least >= recall.LEAST_FILLED * min(recall.ROWS) - shorter - 2


def test_cloze_questions_have_the_right_passage_once(prepared):
    run.make_questions(prepared / "cloze.jsonl")
    task = tasks.load("cloze", str(prepared / "cloze.jsonl"))
    assert len(task.questions) == run.QUESTIONS * len(SOURCES)
    corpus = Corpus(prepared / "tokens" / "code" / "validation")
    tokenizer = corpus.tokenizer()
    text = " ".join(
        " ".join(tokenizer.decode(corpus.document(i).tokens[1:-1].tolist()).split())
        for i in range(len(corpus))
    )
    for question in (q for q in task.questions if q.id.startswith("code")):
        assert question.context + question.choices[question.answer] in text


def test_the_config_is_valid_and_has_all_three_stages(prepared):
    for kind in recall.KINDS:
        run.make_recall(prepared / "tokens" / kind)
    run.make_questions(prepared / "cloze.jsonl")
    config = parse(RunConfig, get_config(str(prepared)))
    timeline = prepare(config).timeline
    gated = [stage for stage in timeline.stages if stage.gate]
    assert [stage.length for stage in timeline.stages] == [96, 128, 128, 192, 256, 320, 320]
    assert [stage.length for stage in gated] == [192, 256, 320]
    assert timeline.stages[-1].average.checkpoints == 4
    without = lay_out(parse(RunConfig, get_config(f"{prepared},without_recall")))
    assert all(stage.mix["recall"] == 0 for stage in without.stages)
    assert 1e6 < define(config.model).parameter_count() < 2e6
    assert timeline.learning_rate(timeline.tokens) == 0
