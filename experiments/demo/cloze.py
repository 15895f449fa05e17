"""Multiple-choice questions of held-out text: which of four passages goes on here?

The right one and three that go on other documents of the same source.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from llama3_jax.data.corpus import Corpus
from llama3_jax.files import write_text

SEED = 0
CONTEXT_WORDS, CHOICE_WORDS, CHOICES = 40, 12, 4


def questions(texts: Sequence[str], count: int, source: str) -> list[dict]:
    """`count` questions on `texts`, of which there are at least four."""
    draw = random.Random(f"{SEED} {source}")
    words = [text.split() for text in texts]
    words = [text for text in words if len(text) >= CONTEXT_WORDS + CHOICE_WORDS]
    made = []
    for number in range(count):
        chosen = draw.sample(range(len(words)), CHOICES)
        pieces = []
        for document in chosen:
            start = draw.randint(0, len(words[document]) - CONTEXT_WORDS - CHOICE_WORDS)
            pieces.append(words[document][start : start + CONTEXT_WORDS + CHOICE_WORDS])
        context = " ".join(pieces[0][:CONTEXT_WORDS])
        choices = [" " + " ".join(piece[CONTEXT_WORDS:]) for piece in pieces]
        right = choices[0]
        draw.shuffle(choices)
        made.append({"id": f"{source}#{number}", "context": context, "choices": choices,
                     "answer": choices.index(right)})  # fmt: skip
    return made


def write(corpora: dict[str, Path], result: Path, count: int) -> None:
    """`count` questions of each tokenised corpus, as JSON lines."""
    lines = []
    for source, folder in corpora.items():
        corpus = Corpus(folder)
        tokenizer = corpus.tokenizer()
        texts = [
            tokenizer.decode(corpus.document(i).tokens[1:-1].tolist()) for i in range(len(corpus))
        ]
        lines += [json.dumps(q, ensure_ascii=False) + "\n" for q in questions(texts, count, source)]
    write_text(result, "".join(lines))
