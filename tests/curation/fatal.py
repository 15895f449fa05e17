"""An extractor that dies of some pages; in a file of its own, which a sandbox imports quickly."""

import os

from llama3_jax.curation.page.extract import Document


def extract(html: bytes, url: str, kind: str) -> Document:
    if url.endswith("/1/2"):
        os.abort()
    while url.endswith("/1/3"):
        pass
    if url.endswith("/1/5"):
        raise MemoryError
    return Document("text", "", None, None, url, ("encoding:utf-8:utf-8", "dropped:boilerplate:0"))
