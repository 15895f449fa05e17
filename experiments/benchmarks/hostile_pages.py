"""Hostile pages through the extractor: each must end as a document or a named rejection, in bounds.

    pip install -e '.[curation]'
    python -m experiments.benchmarks.hostile_pages --count=10000

Inputs are real pages (--pages, else made ones) damaged at random, and made ones: deep nesting, long
attributes, open formatting elements, wrong encodings, nulls, traps for patterns, files that are no
page, and compressed responses that are bombs, cut or damaged, as the reader of WARCs gets them. They run
in a process with a bound on its address space: what raises, dies or takes longer than --limit seconds counts against
the page in hand. Prints what became of them, by kind of input; fails if any page broke it.
"""

import collections
import functools
import gzip
import multiprocessing
import random
import resource
import time
import zlib
from pathlib import Path

import pyarrow as pa
from absl import flags
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.extraction import pages as truth
from llama3_jax import cli
from llama3_jax.errors import UserError

FLAGS = flags.FLAGS
console = Console(width=140, highlight=False)
PROSE = "The river rises in the hills above the town, and it runs through open country. " * 4
WRITTEN = (
    f"<html><head><title>The river</title></head><body><main><h1>A river</h1><p>{PROSE}</p><pre>def f(x):\n"
    f"    return x</pre><table><tr><td>1<td>2</table><ul><li>a<li>b</ul><math><mi>x</mi></math><p>{PROSE}</p>"
    "</main></body></html>"
)


def define_flags() -> None:
    flags.DEFINE_integer("count", 10_000, "Inputs, of all kinds together.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the random damage.")
    flags.DEFINE_string(
        "pages", None, "Folder with truth.jsonl and pages/; else the shared data's, else made."
    )
    flags.DEFINE_float("limit", 60, "Seconds of CPU time one page may take.")
    flags.DEFINE_integer("memory", 2048, "MiB of address space above its start a worker may take.")


def damaged(page: bytes, rng: random.Random) -> bytes:
    """The page with a few bytes changed, parts doubled, moved or cut."""
    page = bytearray(page)
    for _ in range(rng.randrange(1, 60)):
        at, size = rng.randrange(len(page)), rng.randrange(1, 400)
        kind = rng.randrange(5)
        if kind == 0:
            page[at] = rng.randrange(256)
        elif kind == 1:
            del page[at : at + size]
        elif kind == 2:
            page[at:at] = page[at : at + size] * rng.randrange(1, 5)
        elif kind == 3:
            page[at:at] = rng.choice(
                [b"<", b">", b'"', b"\0", b"</", b"<!--", b"\xff\xfe", b"<table>"]
            )
        else:
            to = rng.randrange(len(page))
            page[to:to] = page[at : at + size]
        if not page:
            break
    return bytes(page[: rng.randrange(len(page) + 1)] if rng.random() < 0.3 else page)


STARTS = (
    "<", "<a ", '<a b="', "<!--", "<!-", "<script>", "<table>", "<select><option>", "<math><mfrac>", "&",
    "&#x110000;", "<pre><code>", "[](", "**a", "`", "\\(", "<sup>", "<td>", "<b><p>", "<svg><p>", "<template>",
    "<br>", "<![CDATA[", "</p>", "<title>", "1 ", "<a><div>", "<div></x>", "<font a=1><p>x", "<code>x\n", "<li>",
    "<math>", "<span class=katex>", "<div class=highlighttable>", "a_", "$$", "<h1>#", "\x03", "\x031\x04",
)  # fmt: skip


def size(rng: random.Random, usual: tuple[int, ...], large: tuple[int, ...]) -> int:
    """One of the usual sizes, one time in twenty of the large."""
    return rng.choice(large if rng.random() < 0.05 else usual)


def repeated(rng: random.Random) -> str:
    start = rng.choice(STARTS) + rng.choice(("", "", rng.choice(STARTS)))
    return start * size(rng, (1, 100, 1_000), (14_000, 100_000)) + f"<p>{PROSE}"


def deep(rng: random.Random) -> str:
    tag = rng.choice(
        (
            "div",
            "span",
            "ul><li",
            "table><tr><td",
            "b",
            "font a=1",
            "math",
            "svg",
            "code",
            "q",
            "sup",
        )
    )
    depth = size(rng, (100, 1_000, 1_999, 2_001), (8_000, 14_000, 100_000))
    return (
        f"<{tag}>" * depth
        + PROSE
        + (f"</{tag.split('>')[0].split()[0]}>" * depth if rng.random() < 0.5 else "")
    )


def attributes(rng: random.Random) -> str:
    kind = rng.randrange(5)
    if kind == 0:
        return f'<p title="{"x" * size(rng, (10_000, 100_000), (9_000_000, 50_000_000))}">{PROSE}'
    if kind == 1:
        return (
            "<p "
            + " ".join(f"a{i}={i}" for i in range(size(rng, (100, 4_000), (100_000,))))
            + f">{PROSE}"
        )
    if kind == 2:
        return (
            "<p "
            + " ".join(f'a{i}="<>"' for i in range(size(rng, (100, 2_000), (100_000,))))
            + f">{PROSE}"
        )
    if kind == 3:
        return "".join(
            f'<div class="{"c" * 150} d{i}" id="{i}">x</div>'
            for i in range(size(rng, (100, 1_000), (20_000,)))
        )
    return "".join(f"<b a={i}>" for i in range(size(rng, (100, 200), (1_400,)))) + "<p>x" * size(
        rng, (100, 200), (1_500,)
    )


def encoded(rng: random.Random) -> bytes:
    codecs = [
        "utf-16",
        "utf-8",
        "cp037",
        "cp1251",
        "iso-2022-jp",
        "utf-7",
        "utf-32",
        "gb18030",
        "shift_jis",
    ]
    declared = rng.choice(
        ["utf-8", "utf-16", "hz", "shift_jis", "base64", "idna", "rot13", "zlib", "x" * 40]
    )
    text = (
        f"<meta charset={declared}><p>{PROSE}é{chr(rng.randrange(0x400, 0x2000))}</p>"
        * rng.randrange(1, 200)
    )
    return text.encode(rng.choice(codecs), "ignore")


def other(rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(size(rng, (1, 1_000), (300_000,)))
    if kind == 1:
        return b"\0" * size(rng, (1, 100_000), (20_000_000,))
    if kind == 2:
        return rng.choice(
            (b"%PDF-1.7 ", b"PK\x03\x04", b"\x1f\x8b\x08", b"\x89PNG", b"GIF89a")
        ) + rng.randbytes(9_000)
    if kind == 3:
        return zlib.compress(b"<p>" * 1_000_000)  # never unpacked: it is read as a page
    if kind == 4:
        return WRITTEN.encode().replace(b"a", b"a\0" if rng.random() < 0.5 else b"\xff")
    return rng.choice((b"", b" ", b"\xef\xbb\xbf", b"<", b"\xff\xfe"))


def large(rng: random.Random) -> str:
    """As much as the bounds let through, of one thing."""
    things = (
        "<p>word word",
        "a<br>",
        "<tr><td>a<td>b",
        '<div class="a b" id="c">x</div>',
        "&" * 40,
    )
    return "<table>" + rng.choice(things) * size(rng, (1_000,), (49_000, 240_000))


BOMB = 1_000_000_000


@functools.cache
def bomb(codec: str) -> bytes:
    """A GB of one tag, compressed."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        for _ in range(BOMB // 3_000_000):
            stream.write(b"<p>" * 1_000_000)
    return sink.getvalue().to_pybytes()


def compressed(rng: random.Random) -> bytes:
    """An HTTP response whose body says that it is compressed."""
    names = ("gzip", "br", "zstd", "deflate")
    name = rng.choice(names)
    codec = {"br": "brotli", "deflate": "gzip"}.get(name, name)
    kind = rng.randrange(5)
    if kind == 0:
        body = bomb(codec)
    elif kind == 1:
        name, body = f"gzip, {name}", gzip.compress(bomb(codec))
    elif kind == 2:
        body = pa.compress(WRITTEN.encode() * rng.randrange(1, 200), codec, asbytes=True)
        body = body[: rng.randrange(len(body))]
    elif kind == 3:
        body = pa.compress(WRITTEN.encode() * rng.randrange(1, 200), codec, asbytes=True)
        body = damaged(body, rng)
    else:
        name, body = ", ".join(rng.choices(names, k=rng.randrange(1, 300))), rng.randbytes(2_000)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: {name}\r\n\r\n"
    return head.encode() + body


MADE = {
    "large": large,
    "repeated": repeated,
    "deep": deep,
    "attributes": attributes,
    "encodings": encoded,
    "no pages": other,
    "compressed": compressed,
}


def inputs(numbers: list[int], seed: int, real: list[bytes]) -> list[tuple[int, str, bytes | str]]:
    """Of each number its kind and its page: half are damaged pages."""
    found = []
    for number in numbers:
        rng = random.Random(f"{seed}:{number}")
        if number % 2 == 0:
            found.append((number, "damaged", damaged(rng.choice(real), rng)))
        else:
            kind = list(MADE)[number // 2 % len(MADE)]
            found.append((number, kind, MADE[kind](rng)))
    return found


def work(numbers, seed, real, limit, memory, results) -> None:
    """A worker: says which page it takes, then what became of it."""
    from llama3_jax.curation import http
    from llama3_jax.curation.config import MAX_BYTES
    from llama3_jax.curation.page.extract import Document, extract

    extract(WRITTEN)
    pages = Path("/proc/self/statm").read_text().split()
    bound = int(pages[0]) * resource.getpagesize() + memory * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    for number in numbers:
        ((_, kind, page),) = inputs([number], seed, real)
        results.put((number, kind, "taken", 0.0, 0))
        start = time.process_time()
        try:
            if kind == "compressed":
                page = http.decoded(http.parse(page), MAX_BYTES)
            outcome = extract(page, "https://a.example/")
        except http.Undecodable as error:
            name = str(error)
        except Exception as error:
            name = f"raised {type(error).__name__}"
        else:
            name = "document" if isinstance(outcome, Document) else outcome.reason
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if seconds > limit:
            name = f"slow: {name}"
        results.put((number, kind, name, seconds, peak))
    results.put((-1, "", "", 0.0, 0))


def supervise(numbers: list[int], real: list[bytes], tell) -> list[tuple]:
    """Runs the numbers in a worker, in a fresh one after each that died or hung."""
    context = multiprocessing.get_context("spawn")
    rows = []
    while numbers:
        results = context.SimpleQueue()
        worker = context.Process(
            target=work,
            args=(numbers, FLAGS.seed, real, FLAGS.limit, FLAGS.memory, results),
            daemon=True,
        )
        worker.start()
        taken, since, done = None, time.monotonic(), set()
        while True:
            if results.empty():
                # Cores may be shared: a hang is many times the limit by the clock.
                if worker.is_alive() and time.monotonic() - since < 10 * FLAGS.limit:
                    time.sleep(0.01)
                    continue
                if results.empty():
                    break
            row = results.get()
            since = time.monotonic()
            if row[0] < 0:
                taken = None
                break
            if row[2] == "taken":
                taken = row
                continue
            rows.append(row)
            done.add(row[0])
            taken = None
            tell()
        if taken is not None:
            name = "hung" if worker.is_alive() else f"died ({worker.exitcode})"
            rows.append((taken[0], taken[1], name, 0.0, 0))
            done.add(taken[0])
            tell()
        elif not done:
            raise UserError("a worker died before its first page")
        worker.kill()
        worker.join()
        numbers = [number for number in numbers if number not in done]
    return rows


def main(argv) -> None:
    folder = Path(FLAGS.pages) if FLAGS.pages else truth.DATA / "html"
    real = [WRITTEN.encode()]
    if FLAGS.pages or (folder / "truth.jsonl").is_file():
        real = [page.html for page in truth.load(folder)]
    with Progress(console=console) as progress:
        task = progress.add_task("pages", total=FLAGS.count)
        rows = supervise(list(range(FLAGS.count)), real, lambda: progress.advance(task))
    table = Table("inputs", "count", "longest (CPU s)", "peak MiB so far", "outcomes")
    for kind in ["damaged", *MADE]:
        part = [row for row in rows if row[1] == kind]
        if part:
            outcomes = collections.Counter(row[2] for row in part).most_common()
            table.add_row(
                kind, str(len(part)), f"{max(row[3] for row in part):.2f}",
                str(max(row[4] for row in part)), ", ".join(f"{name} {n}" for name, n in outcomes),
            )  # fmt: skip
    console.print(table)
    bad = [row for row in rows if row[2].startswith(("raised", "slow", "hung", "died"))]
    for row in bad[:20]:
        console.print(f"input {row[0]} ({row[1]}): {row[2]}")
    console.print(
        f"{len(rows)} inputs of {len(real)} pages: {len(bad)} crashed or hung; peak memory "
        f"{max(row[4] for row in rows)} MiB, longest {max(row[3] for row in rows):.2f} s of CPU time"
    )
    if bad:
        raise UserError(
            f"{len(bad)} of {len(rows)} inputs crashed, raised or took over {FLAGS.limit} s"
        )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
