"""One measurement of the tokenizer's benchmark, in a process of its own.

    python -m experiments.benchmarks.tokenizer_measure '["train", {"side": "ours", …}]'

Prints its result as JSON. Imports and the base's ranks are there before the clock starts; reading
the text is part of what is timed, on both sides.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data import tokenizer_training


def _texts(files: list[str]) -> Iterator[str]:
    for file in files:
        with open(file, "rb") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def train(
    side: str,
    files: list[str],
    base: str,
    new_tokens: int,
    options: dict,
    workers: int,
    output: str,
):
    """Seconds to train, of wall and of CPU time (processes that ended included)."""
    ranks = tokenizers.load_ranks(Path(base))
    if side == "ours":
        begun = time.monotonic()
        trained, record = tokenizer_training.train(
            [Path(file) for file in files],
            ranks,
            new_tokens,
            tokenizer_training.Options(**options),
            workers,
        )
        seconds = time.monotonic() - begun
        tokenizer_training.save(trained, record, Path(output))
    else:
        import tokenizers as peer
        from tokenizers import models, pre_tokenizers, trainers

        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pattern = pre_tokenizers.Split(peer.Regex(tokenizers.LLAMA3_PATTERN), "isolated")
        begun = time.monotonic()
        scratch = peer.Tokenizer(models.BPE())
        scratch.pre_tokenizer = pre_tokenizers.Sequence([pattern, level])
        trainer = trainers.BpeTrainer(
            vocab_size=32_000, initial_alphabet=level.alphabet(), show_progress=False
        )
        scratch.train_from_iterator(_texts(files), trainer)
        seconds = time.monotonic() - begun
    times = os.times()
    cpu = times.user + times.system + times.children_user + times.children_system
    return {"seconds": seconds, "process_cpu_seconds": cpu}


def encode(side: str, files: list[str], folder: str, seconds: float):
    """Bytes a second of CPU time that one thread encodes, a document a call."""
    if side == "ours":
        function = tokenizers.load(folder).encode
    elif side == "tiktoken":
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        function = tiktoken.Encoding(
            "peer",
            pat_str=tokenizers.LLAMA3_PATTERN,
            mergeable_ranks=load_tiktoken_bpe(f"{folder}/tokenizer.tiktoken"),
            special_tokens={},
        ).encode_ordinary
    else:
        import tokenizers as peer

        loaded = peer.Tokenizer.from_file(f"{folder}/tokenizer.json")
        loaded.encode_special_tokens = True

        def function(text: str) -> list[int]:
            return loaded.encode(text, add_special_tokens=False).ids

    texts = list(_texts(files))
    tokens = [function(text) for text in texts]
    size = sum(len(text.encode()) for text in texts)
    done, begun = 0, time.process_time()
    while time.process_time() - begun < seconds:
        for text in texts:
            function(text)
        done += size
    speed = done / (time.process_time() - begun)
    return {"bytes_per_second": speed, "ids": hash(tuple(map(tuple, tokens)))}


if __name__ == "__main__":
    name, options = json.loads(sys.argv[1])
    print(json.dumps({"train": train, "encode": encode}[name](**options)))
