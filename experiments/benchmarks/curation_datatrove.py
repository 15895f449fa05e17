"""The peer's side of curation.py: datatrove's steps, in an environment of its own.

Reads documents (json lines: url, text) from the file in argv[1], the model for languages from argv[2]
and dirty words from argv[3]; then for each name of a stage on standard input prints
{"seconds": CPU seconds} or {"error": why}. Imports, models and tokenizers are loaded beforehand.
"""

import copy
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.dedup import exact_dedup, minhash, sentence_dedup
from datatrove.pipeline.filters import (
    C4BadWordsFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    URLFilter,
)
from datatrove.pipeline.formatters import PIIFormatter
from fasttext.FastText import _FastText
from loguru import logger

DOCUMENTS, MODEL, WORDS = map(Path, sys.argv[1:4])


def filtered(step, documents) -> None:
    for document in documents:
        step.filter(document)


def urls():
    step = URLFilter()
    step.download_data()
    return lambda documents: filtered(step, documents)


def url_dedup():
    def run(documents):
        config = exact_dedup.ExactDedupConfig(
            content_getter=lambda document: document.metadata["url"], only_dedup_in_index=False
        )
        folder = tempfile.mkdtemp()
        exact_dedup.ExactDedupSignature(f"{folder}/sig", config).run(documents)
        exact_dedup.ExactFindDedups(f"{folder}/sig", f"{folder}/dup", config).run()
        for _ in exact_dedup.ExactDedupFilter(f"{folder}/dup", config).run(iter(documents)):
            pass
        shutil.rmtree(folder)

    return run


def languages():
    step = LanguageFilter()
    step.model._model = _FastText(str(MODEL))
    return lambda documents: filtered(step, documents)


def near_duplicates():
    def run(documents):
        config, folder = minhash.MinhashConfig(), tempfile.mkdtemp()
        minhash.MinhashDedupSignature(f"{folder}/sig", config).run(documents)
        for bucket in range(config.num_buckets):
            step = minhash.MinhashDedupBuckets(
                f"{folder}/sig", f"{folder}/dup", config=config, only_dedup_in_index=False
            )
            step.run(rank=bucket, world_size=config.num_buckets)
        minhash.MinhashDedupCluster(f"{folder}/dup", f"{folder}/remove", config).run()
        for _ in minhash.MinhashDedupFilter(f"{folder}/remove").run(iter(documents)):
            pass
        shutil.rmtree(folder)

    return run


def lines():
    def run(documents):
        config = sentence_dedup.SentDedupConfig(
            n_sentences=1, split_sentences=False, only_dedup_in_index=False
        )
        folder = tempfile.mkdtemp()
        sentence_dedup.SentenceDedupSignature(f"{folder}/sig", config=config).run(documents)
        sentence_dedup.SentenceFindDedups(f"{folder}/sig", f"{folder}/dup", config=config).run()
        step = sentence_dedup.SentenceDedupFilter(f"{folder}/dup", config=config)
        for _ in step.run(iter(documents)):
            pass
        shutil.rmtree(folder)

    return run


def gopher():
    steps = GopherRepetitionFilter(), GopherQualityFilter()

    def run(documents):
        for step in steps:
            filtered(step, documents)

    return run


def safety():
    step = C4BadWordsFilter(default_language="en")
    words = WORDS.read_text(encoding="utf-8").split("\n")
    # As _get_badwords builds it from the list that it downloads.
    step._badwords_regex["en"] = re.compile(
        r"(?:\W|^)({})(?:\W|$)".format("|".join(map(re.escape, words)))
    )
    return lambda documents: filtered(step, documents)


def pii():
    step = PIIFormatter()

    def run(documents):
        for document in documents:
            step.format(document.text)

    return run


STAGES = {
    "urls": urls, "url_dedup": url_dedup, "languages": languages, "minhash": near_duplicates, "lines": lines,
    "gopher": gopher, "safety": safety, "pii": pii,
}  # fmt: skip


def main() -> None:
    logger.remove()
    documents = [
        Document(text=row["text"], id=str(number), metadata={"url": row["url"]})
        for number, row in enumerate(map(json.loads, DOCUMENTS.open(encoding="utf-8")))
    ]
    ready = {}
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in ready:
                ready[name] = STAGES[name]()
                ready[name](copy.deepcopy(documents[:3]))
            own = copy.deepcopy(documents)
            start = time.process_time()
            ready[name](own)
            answer = {"seconds": time.process_time() - start}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
