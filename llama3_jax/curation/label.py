"""Documents judged by a Llama against a written rubric (Llama 3 paper, section 3.1.1).

The model does not write: the likelihoods of the answers that a rubric allows are compared.
Rubrics are text files (rubrics/): a line `[answer] criterion` for each answer, and `{document}`
where the document goes.

Shapes: N documents, A answers, R rows of a batch, S length, K tokens of the longest answer.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pydantic
from jaxtyping import Float
from rich.progress import Progress

from llama3_jax.curation.agreement import Agreement, agreement
from llama3_jax.data.documents import Fields, TextDocument, plan_pieces, read_piece
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.files import atomic_path
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.decoding import compute_params
from llama3_jax.model.definition import Params, define
from llama3_jax.schema import Config

RUBRICS = Path(__file__).with_name("rubrics")
_DOCUMENT = "{document}"
_ANSWER = re.compile(r"\[([\w -]+)\] (\S.*)")
_FIELDS = Fields(id="doc", language="label")
_CHUNK = 256  # documents judged and written at once
# What Llama 3's chat models expect around a question.
_CHAT = (
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
)


class LabelConfig(Config):
    """`rubric` is the name of one in the package or a path.

    `order` is that of the answers in the prompt: with both, an agreement report tells how far the
    order decides. `chat` puts the prompt in Llama 3's chat format. `calibrate` divides by what the
    model would answer for an empty document (Zhao et al. 2021, arXiv 2102.09690). Prompts are cut
    to `max_length` tokens, in the document. `batch_tokens` are in memory at once.
    """

    rubric: str = "quality"
    order: Literal["given", "reversed"] = "given"
    chat: bool = False
    calibrate: bool = False
    max_length: pydantic.PositiveInt = 2048
    batch_tokens: pydantic.PositiveInt = 16_384


class Rubric(NamedTuple):
    """Text before and after the document, and the answers allowed."""

    before: str
    after: str
    answers: tuple[str, ...]


class Judge(NamedTuple):
    """A Llama that labels. Params may be those of a checkpoint or of Hugging Face's weights."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer


def read_rubric(name: str, order: Literal["given", "reversed"] = "given") -> Rubric:
    """A rubric of the package by name, or any by path.

    Raises:
      UserError: there is none, or it lacks `{document}` or two different answers.
    """
    path = Path(name) if "/" in name or name.endswith(".txt") else RUBRICS / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RUBRICS.glob("*.txt")))
        raise UserError(f"rubric {name!r} not found; known: {known}, or the path of a text file")
    lines = path.read_text(encoding="utf-8").rstrip().split("\n")
    places = [number for number, line in enumerate(lines) if _ANSWER.fullmatch(line)]
    answers = [_ANSWER.fullmatch(lines[number]).group(1) for number in places]
    if len(set(answers)) < 2 or len(set(answers)) < len(answers):
        raise UserError(
            f"{path}: a rubric needs two or more different answers, lines such as '[yes] The page …'; "
            f"found: {', '.join(answers) or 'none'}"
        )
    if order == "reversed":
        turned = [lines[number] for number in reversed(places)]
        for number, line in zip(places, turned, strict=True):
            lines[number] = line
    text = "\n".join(lines)
    if text.count(_DOCUMENT) != 1:
        raise UserError(f"{path}: a rubric needs {_DOCUMENT} once, where the document goes")
    before, after = text.split(_DOCUMENT)
    return Rubric(before, after, tuple(answers))


def probabilities(
    judge: Judge, rubric: Rubric, texts: Sequence[str], config: LabelConfig
) -> Float[np.ndarray, "N A"]:
    """Of each answer to each document, among those allowed; rows sum to 1.

    Raises:
      UserError: the rubric leaves no room for a document, the answers are not told apart by the
        tokenizer, or it lacks the specials of a chat.
    """
    space = "" if config.chat else " "
    answers = [judge.tokenizer.encode(space + answer) for answer in rubric.answers]
    if len(set(map(tuple, answers))) < len(answers):
        raise UserError("the tokenizer gives two answers of the rubric the same tokens")
    prompts = [_prompt(judge.tokenizer, rubric, text, config) for text in texts]
    scores = _log_likelihoods(judge, prompts, answers, config.batch_tokens)
    if config.calibrate:
        empty = [_prompt(judge.tokenizer, rubric, "", config)]
        scores = scores - _log_likelihoods(judge, empty, answers, config.batch_tokens)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def label(
    inputs: Sequence[Path],
    output: Path,
    judge: Judge,
    config: LabelConfig,
    limit: int | None = None,
) -> Counter[str]:
    """Judges documents (parquet, jsonl) and writes a parquet; returns how many got each answer.

    Columns: doc, text, label (the likeliest answer), probability (of it), answers (of each, in the
    order of the rubric's file), rubric. Whole or not at all. `limit`: the first so many documents.

    Raises:
      UserError: no input, a damaged one, no document with text; and as `probabilities`.
    """
    if output.suffix != ".parquet":
        raise UserError(f"{output}: labels are written as parquet; name a file *.parquet")
    rubric = read_rubric(config.rubric, config.order)
    pieces = plan_pieces(list(inputs), 64 * 2**20)
    documents = itertools.chain.from_iterable(read_piece(piece, _FIELDS) for piece in pieces)
    documents = itertools.islice(documents, limit)
    counts: Counter[str] = Counter()
    judge = judge._replace(params=compute_params(judge.config, judge.params))
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary, Progress(transient=True) as progress:
        task = progress.add_task("labelling", total=limit)
        with pyarrow.parquet.ParquetWriter(temporary, _SCHEMA) as writer:
            for chunk in _chunks(documents):
                found = probabilities(judge, rubric, [d.text for d in chunk], config)
                rows = _rows(chunk, found, rubric, config)
                writer.write_table(pyarrow.Table.from_pylist(rows, _SCHEMA))
                counts.update(row["label"] for row in rows)
                progress.update(task, advance=len(chunk))
        if not counts:
            raise UserError(f"no document with text in {', '.join(map(str, inputs))}")
    return counts


def compare(reference: Path, other: Path) -> Agreement:
    """Labels of the same documents (columns doc and label) by two judges, orders or people.

    Raises:
      UserError: a file that cannot be read, or no document in both.
    """
    first, second = (_labels(path) for path in (reference, other))
    both = sorted(first.keys() & second.keys())
    if not both:
        raise UserError(f"{reference} and {other} have no labelled document in common (column doc)")
    return agreement([first[doc] for doc in both], [second[doc] for doc in both])


_SCHEMA = pyarrow.schema(
    {
        "doc": pyarrow.string(),
        "text": pyarrow.large_string(),
        "label": pyarrow.string(),
        "probability": pyarrow.float64(),
        "answers": pyarrow.list_(pyarrow.float64()),
        "rubric": pyarrow.string(),
    }
)


def _rows(
    chunk: list[TextDocument], found: np.ndarray, rubric: Rubric, config: LabelConfig
) -> list[dict]:
    best = found.argmax(axis=1)
    return [
        {
            "doc": document.id,
            "text": document.text,
            "label": rubric.answers[best[row]],
            "probability": found[row, best[row]],
            "answers": found[row],
            "rubric": config.rubric,
        }
        for row, document in enumerate(chunk)
    ]


def _labels(path: Path) -> dict[str, str]:
    found = {}
    for piece in plan_pieces([path], 64 * 2**20):
        found |= {d.id: d.language for d in read_piece(piece, _FIELDS) if d.language}
    return found


def _chunks(documents: Iterator[TextDocument]) -> Iterator[list[TextDocument]]:
    while chunk := list(itertools.islice(documents, _CHUNK)):
        yield chunk


def _prompt(tokenizer: Tokenizer, rubric: Rubric, text: str, config: LabelConfig) -> list[int]:
    """Begin of text, the rubric, as much of the document as there is room for, the question."""
    before, after = (
        [tokenizer.bos, *tokenizer.encode(rubric.before)],
        tokenizer.encode(rubric.after),
    )
    if config.chat:
        if missing := [name for name in _SPECIALS if name not in tokenizer.special_ids]:
            raise UserError(f"chat=True: the tokenizer lacks {missing[0]}; it is no chat model's")
        opened, closed = (tokenizer.encode(part, parse_specials=True) for part in _CHAT)
        before, after = [tokenizer.bos, *opened, *before[1:]], [*after, *closed]
    room = config.max_length - len(before) - len(after)
    if room <= 0:
        raise UserError(
            f"max_length={config.max_length}: the rubric alone has {len(before) + len(after)} tokens"
        )
    # A token has at least a byte: more characters than that cannot be used.
    return [*before, *tokenizer.encode(text[: 64 * room])[:room], *after]


_SPECIALS = tuple(re.findall(r"<\|\w+\|>", "".join(_CHAT)))


def _log_likelihoods(
    judge: Judge, prompts: list[list[int]], answers: list[list[int]], batch_tokens: int
) -> Float[np.ndarray, "N A"]:
    """log p(answer | prompt) in nats.

    A row is a prompt and all but the last token of an answer; answers of one token share the
    prompt's own row, so that a yes or no costs one forward pass.
    """
    prefixes = sorted({tuple(answer[:-1]) for answer in answers})
    longest = max(map(len, answers))
    rows = [(n, prefix) for n in range(len(prompts)) for prefix in prefixes]
    lengths = [len(prompts[n]) + len(prefix) for n, prefix in rows]
    found = np.zeros((len(prompts), len(answers)))
    order = sorted(range(len(rows)), key=lambda row: (_rounded(lengths[row]), row))
    for length, group in itertools.groupby(order, key=lambda row: _rounded(lengths[row])):
        group = list(group)
        count = max(1, batch_tokens // length)
        for start in range(0, len(group), count):
            chosen = group[start : start + count]
            tokens = np.zeros((count, length), np.int32)
            at = np.zeros((count, longest), np.int32)
            for place, row in enumerate(chosen):
                n, prefix = rows[row]
                tokens[place, : lengths[row]] = [*prompts[n], *prefix]
                ends = len(prompts[n]) - 1 + np.arange(longest)
                at[place] = np.minimum(ends, lengths[row] - 1)
            log_p = np.asarray(_log_p(judge.config, judge.params, tokens, at))
            for place, row in enumerate(chosen):
                n, prefix = rows[row]
                for a, answer in enumerate(answers):
                    if tuple(answer[:-1]) == prefix:
                        found[n, a] = sum(log_p[place, k, token] for k, token in enumerate(answer))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _log_p(config: ModelConfig, params: Params, tokens, at) -> Float[jax.Array, "R K vocab"]:
    """Log probabilities of what follows index `at` of each row."""
    model = define(config).bind(params)
    positions = jax.numpy.broadcast_to(jax.numpy.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.hidden(tokens, positions, jax.numpy.ones_like(tokens))
    chosen = jax.numpy.take_along_axis(hidden, at[:, :, None], axis=1)
    return jax.nn.log_softmax(model.logits(chosen), axis=-1)


def _rounded(length: int) -> int:
    """Up to a multiple of an eighth of it, so that few programs are compiled and little is padded."""
    step = max(64, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step
