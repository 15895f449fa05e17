"""What is measured, item by item, so that two models can be compared on the same items."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from llama3_jax.data.corpus import Corpus
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.data.validation import validation_batches
from llama3_jax.data.workers import ahead
from llama3_jax.evaluation.scoring import Request, Scorer
from llama3_jax.evaluation.tasks import Task, encode

RESAMPLES = 1000


class Metric(NamedTuple):
    """A mean over items, sum(sums) / sum(weights), and which way is better."""

    sums: tuple[float, ...]
    weights: tuple[float, ...]
    higher_is_better: bool

    @property
    def value(self) -> float:
        return math.fsum(self.sums) / math.fsum(self.weights)

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, **self._asdict()}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "Metric":
        return cls(tuple(values["sums"]), tuple(values["weights"]), values["higher_is_better"])


def difference_error(before: Metric, after: Metric, seed: int = 0) -> float:
    """Standard error of after - before by the paired bootstrap: items are drawn, each with both."""
    if len(before.sums) != len(after.sums):
        raise ValueError(f"{len(before.sums)} items before, {len(after.sums)} after")
    draw = np.random.default_rng(seed)
    count = len(before.sums)
    arrays = [np.array(values, float) for values in (*before[:2], *after[:2])]
    differences = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        chosen = draw.integers(count, size=count)
        a, a_weights, b, b_weights = (array[chosen].sum() for array in arrays)
        differences[number] = b / b_weights - a / a_weights
    return float(differences.std(ddof=1))


# ------------------------------------------------------------------------------ multiple choice


class Answers(NamedTuple):
    """Of each question the log-likelihoods of its choices in nats, and their characters."""

    logprobs: list[Float[np.ndarray, "choices"]]
    characters: list[np.ndarray]
    answers: list[int]

    def metrics(self) -> dict[str, Metric]:
        """acc: the likeliest choice; acc_norm: the likeliest a character; both the first of equals.

        nll_per_char: -log p of the right answer over its characters, in nats: the normalised
        negative log-likelihood of the Llama 3 paper, section 3.2.1. Characters are counted without
        the choice's leading space, as lm-eval does.
        """
        of_each: dict[str, list[float]] = {"acc": [], "acc_norm": [], "nll_per_char": []}
        for logprobs, characters, answer in zip(*self, strict=True):
            of_each["acc"].append(float(np.argmax(logprobs) == answer))
            of_each["acc_norm"].append(float(np.argmax(logprobs / characters) == answer))
            of_each["nll_per_char"].append(float(-logprobs[answer] / characters[answer]))
        ones = (1.0,) * len(self.answers)
        return {
            name: Metric(tuple(values), ones, name != "nll_per_char")
            for name, values in of_each.items()
        }


def answer(scorer: Scorer, tokenizer: Tokenizer, task: Task, length: int) -> Answers:
    """Log-likelihood of every choice of a task's questions."""
    requests: list[Request] = []
    for question in task.questions:
        requests += [encode(tokenizer, question.context, choice) for choice in question.choices]
    scores = iter(scorer.score(requests, length))
    logprobs, characters = [], []
    for question in task.questions:
        logprobs.append(np.array([-next(scores).nll for _ in question.choices]))
        characters.append(np.array([max(len(c.strip()), 1) for c in question.choices], float))
    return Answers(logprobs, characters, [question.answer for question in task.questions])


# ------------------------------------------------------------------------------ held-out text


def held_out(scorer: Scorer, corpus: Corpus, length: int, tokens: int) -> Metric:
    """Loss on up to `tokens` held-out tokens in nats a token; an item is a row of `length`."""
    sums: list[float] = []
    weights: list[float] = []
    for batch in ahead(validation_batches(corpus, length, scorer.batch_rows(length), tokens)):
        batch.pop("source"), batch.pop("cut")
        losses, _ = scorer.tokens(batch)
        counts = batch["loss_mask"].sum(1)
        for row in np.flatnonzero(counts):
            sums.append(float(losses[row].astype(np.float64).sum()))
            weights.append(float(counts[row]))
    return Metric(tuple(sums), tuple(weights), higher_is_better=False)


def bits_per_byte(metric: Metric, corpus: Corpus, tokens: int) -> float:
    """A held-out loss by the text's bytes, which does not depend on the tokenizer."""
    share = min(tokens, corpus.info.tokens) / corpus.info.tokens
    return math.fsum(metric.sums) / math.log(2) / (corpus.info.utf8_bytes * share)


def table(metrics: Mapping[str, Metric]) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics.items()}


def recovered(
    before: Mapping[str, Metric], after: Mapping[str, Metric], epsilon: float
) -> Sequence[dict[str, Any]]:
    """Of each metric whether it is at least what it was, less max(epsilon, one standard error)."""
    rows = []
    for name, old in before.items():
        new, error = after[name], difference_error(old, after[name])
        tolerance = max(epsilon, error)
        loss = old.value - new.value if old.higher_is_better else new.value - old.value
        rows.append({
            "metric": name, "before": old.value, "after": new.value, "standard_error": error,
            "tolerance": tolerance, "recovered": bool(loss <= tolerance),
        })  # fmt: skip
    return rows
