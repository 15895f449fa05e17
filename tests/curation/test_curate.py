"""Whole runs of the engine: outputs, restart, sample, explanation, damage, runners."""

import errno
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import daft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from daft import DataType, col
from daft.functions import when

from llama3_jax.curation import config as configs
from llama3_jax.curation import engine, explain, read, registry, run
from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.folder_lock import locked
from llama3_jax.schema import Config
from tests.curation.page.test_extract import PROSE, page
from tests.curation.test_warc import record

WORDS = PROSE.split()


@pytest.fixture(scope="module", autouse=True)
def native():
    engine.start()


class ShoutConfig(Config):
    """Of the stage that the tests add: rejects short texts, and rewrites what has a word."""

    least: int = 1_000
    word: str = "river"


def shout(frame: daft.DataFrame, config: ShoutConfig, scratch: Path) -> daft.DataFrame:
    assert scratch.is_dir() and not list(scratch.iterdir())
    (scratch / "leftover").mkdir()
    length = col("text").length_bytes()
    return frame.with_columns(
        {
            "text": col("text").replace(config.word, config.word.upper() + "!"),
            "shout_length": length,
            "reason": when(length < config.least, "short").otherwise(None),
        }
    )


@pytest.fixture
def stages(monkeypatch):
    stage = registry.Stage("shout", shout, ShoutConfig, 1)
    monkeypatch.setattr(registry, "STAGES", [*registry.STAGES[:1], stage])


def pages(count: int, seed: int = 0) -> dict[str, bytes]:
    """Article pages of different lengths by URL; every fifth has no content."""
    random_ = random.Random(seed)
    made = {}
    for number in range(count):
        words = " ".join(random_.choices(WORDS, k=random_.randint(60, 200)))
        html = "<html></html>" if number % 5 == 4 else page(f"<p>{number} {words}</p>")
        made[f"http://site.org/{seed}/{number}"] = html.encode()
    return made


def write_warc(path: Path, made: dict[str, bytes], damaged: bool = False) -> None:
    members = []
    for url, body in made.items():
        whole = record(0, body).replace(b"http://x.org/0", url.encode())
        members.append(bytearray(gzip.compress(whole, mtime=0)))
    if damaged:
        members[3][50:60] = bytes(10)
    path.write_bytes(b"".join(members))


@pytest.fixture
def crawl(tmp_path) -> Path:
    """A folder with two archives, one of them damaged, and a file of JSON lines."""
    folder = tmp_path / "crawl"
    folder.mkdir()
    write_warc(folder / "a.warc.gz", pages(12, 0), damaged=True)
    write_warc(folder / "b.warc.gz", pages(8, 1))
    rows = [{"url": f"http://json/{n}", "text": f"{n} {PROSE * 6}"} for n in range(6)]
    (folder / "c.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    return folder


def curate(crawl: Path, workdir: Path, sample: int | None = None, lines=None, **values):
    values = {
        "inputs": {"web": {"paths": (f"{crawl}/*.warc.gz",)}, "books": {"paths": (f"{crawl}/c.jsonl",)}},
        "stages": {"shout": {}, "extract": {}},
    } | values  # fmt: skip
    config, stages = configs.parse(configs.curation_config(**values))
    say = (lambda line: None) if lines is None else lines.append
    return run.run(config, stages, workdir, sample, say)


def outputs(workdir: Path) -> dict[str, str]:
    """Checksums of what must not depend on interruptions, partitions or runners."""
    paths = [p for p in workdir.rglob("*") if p.is_file() and p.name not in ("times.json", ".lock")]
    tokens = workdir / "tokens"  # the accounts of its shards hold times of their inputs
    paths = [p for p in paths if tokens not in p.parents or p.suffix in (".arrayrecord", ".npy")]
    return {str(p.relative_to(workdir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def rows(workdir: Path, stage: str, kind: str) -> list[dict]:
    files = sorted(workdir.glob(f"stages/*_{stage}/{kind}/*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def test_every_page_is_kept_or_rejected_by_name_and_counted(
    stages, crawl, tmp_path, byte_tokenizer
):
    work = tmp_path / "work"
    funnel = curate(crawl, work, tokens={"tokenizer": str(byte_tokenizer), "holdout": 0.3})
    assert [stage["stage"] for stage in funnel["stages"]] == ["read", "extract", "shout"]
    assert json.loads((work / "funnel.json").read_text()) == funnel

    account = funnel["inputs"]["web"]
    assert (account["files"], account["rows"]) == (2, 19)  # of 20, one in the damaged member
    (damage,) = account["damaged"]
    assert damage["file"].endswith("a.warc.gz") and "decompress" in damage["what"]
    assert next(run.damage(funnel)).startswith(f"damaged: {crawl.resolve()}/a.warc.gz at byte ")

    for before, after in (("read", "extract"), ("extract", "shout")):
        came = {row["doc"] for row in rows(work, before, "kept")}
        kept, rejected = rows(work, after, "kept"), rows(work, after, "rejected")
        assert [r["doc"] for r in kept] == sorted(r["doc"] for r in kept)
        assert {r["doc"] for r in kept} | {r["doc"] for r in rejected} == came
        assert len(kept) + len(rejected) == len(came)
        assert all(r["reason"] and r["stage"] == after for r in rejected)
    assert {r["reason"] for r in rows(work, "read", "rejected")} == {"not_json"}
    assert {r["reason"] for r in rows(work, "extract", "rejected")} == {"no_text"}

    final = rows(work, "shout", "kept")
    assert final and all("RIVER!" in row["text"] or "river" not in row["text"] for row in final)
    for stage in funnel["stages"]:
        for count in stage["counts"]:
            found = rows(work, stage["stage"], "rejected" if count["reason"] else "kept")
            found = [r for r in found if (r["source"], r.get("reason") or "")
                     == (count["source"], count["reason"])]  # fmt: skip
            assert count["documents"] == len(found)
            if stage["stage"] != "read":
                assert count["characters"] == sum(len(r["text"]) for r in found)
                assert count["tokens"] == sum(len(r["text"].encode()) for r in found)

    for source in ("web", "books"):
        of_source = {r["doc"]: r["text"] for r in final if r["source"] == source}
        table = pa.concat_tables(
            map(pq.read_table, (work / "documents" / source).glob("*.parquet"))
        )
        assert (
            dict(zip(table["doc"].to_pylist(), table["text"].to_pylist(), strict=True)) == of_source
        )
        tokenised = {}
        for split in ("train", "validation"):
            corpus = Corpus(work / "tokens" / source / split)
            documents = [corpus.document(i) for i in range(len(corpus))]
            tokenised |= {d.id: bytes(d.tokens[1:-1].tolist()).decode() for d in documents}
            assert funnel["shards"][source][split]["documents"] == len(documents)
        assert tokenised == of_source


def test_what_is_unchanged_is_passed_over_and_what_follows_a_change_is_not(stages, crawl, tmp_path):
    work, lines = tmp_path / "work", []
    curate(crawl, work, lines=lines)
    first = outputs(work)
    assert not any("unchanged" in line for line in lines)

    lines.clear()
    curate(crawl, work, lines=lines)
    assert all("unchanged" in line for line in lines) and len(lines) == 3
    assert outputs(work) == first

    lines.clear()
    curate(crawl, work, lines=lines, stages={"extract": {}, "shout": {"least": 1_100}})
    assert ["unchanged" in line for line in lines] == [True, True, False]
    assert outputs(work) != first

    curate(crawl, work, stages={"extract": {}})  # the other stage's folder goes
    assert not list(work.glob("stages/*shout*"))

    lines.clear()
    (crawl / "c.jsonl").write_text(json.dumps({"text": PROSE * 9}))
    curate(crawl, work, lines=lines)
    assert not any("unchanged" in line for line in lines)


def test_tokens_of_removed_sources_and_of_an_earlier_holdout_go(
    stages, crawl, tmp_path, byte_tokenizer
):
    work, tokenizer = tmp_path / "work", str(byte_tokenizer)
    curate(crawl, work, tokens={"tokenizer": tokenizer, "holdout": 0.5})
    assert (work / "tokens/books/validation").is_dir()
    inputs = {"books": {"paths": (f"{crawl}/c.jsonl",)}}
    funnel = curate(crawl, work, tokens={"tokenizer": tokenizer}, inputs=inputs)
    assert [path.name for path in (work / "tokens").iterdir()] == ["books"]
    assert not (work / "tokens/books/validation").exists()
    assert funnel["shards"]["books"]["train"]["documents"] == 6


def test_reading_goes_on_after_a_lost_worker(stages, crawl, tmp_path, monkeypatch):
    class WorkerLost(Exception):
        pass

    real, attempts = read.read, []

    def losing(*arguments):
        attempts.append(1)
        account = real(*arguments)
        if len(attempts) == 1:
            raise WorkerLost
        return account

    monkeypatch.setattr(read, "read", losing)
    monkeypatch.setattr(engine, "_lost_worker", lambda error: isinstance(error, WorkerLost))
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: None)
    funnel = curate(crawl, tmp_path / "work")
    assert len(attempts) == 2 and funnel["inputs"]["web"]["rows"] == 19


def test_a_disk_that_fills_is_named_and_the_run_goes_on_when_there_is_space(
    stages, crawl, tmp_path, monkeypatch
):
    """As Daft tells of it: its writer's channel is closed."""
    curate(crawl, tmp_path / "whole")
    work, real = tmp_path / "work", run.parts.write

    def filling(frame, stage, folder, *rest):
        (folder / "unsorted").mkdir()
        (folder / "unsorted/half.parquet").write_bytes(b"PAR1")
        raise RuntimeError("DaftError::ParquetError channel closed")

    with monkeypatch.context() as patch:
        patch.setattr(run.parts, "write", filling)
        with pytest.raises(RuntimeError, match="channel closed"):
            curate(crawl, work)  # something else: the disk has space
        usage = shutil.disk_usage(work)
        patch.setattr(run.shutil, "disk_usage", lambda path: usage._replace(free=4_096))
        with pytest.raises(OSError, match="No space left on device: .*01_extract") as raised:
            curate(crawl, work)
        assert raised.value.errno == errno.ENOSPC
    assert run.parts.write is real
    curate(crawl, work)
    assert outputs(work) == outputs(tmp_path / "whole")


class Interrupted(Exception):
    pass


def test_interrupted_at_any_write_a_run_ends_with_the_same_files(
    stages, crawl, tmp_path, monkeypatch, byte_tokenizer
):
    """Each rename that makes an output appear fails in its turn, then the run goes on."""
    tokens = {"tokenizer": str(byte_tokenizer)}
    curate(crawl, tmp_path / "whole", tokens=tokens)
    work, real, done, failures = tmp_path / "work", {}, set(), 0

    def failing(name):
        real[name] = getattr(os, name)

        def call(source, target, *rest):
            key = str(target)
            if key not in done and str(work) in key:
                done.add(key)
                raise Interrupted(key)
            return real[name](source, target, *rest)

        monkeypatch.setattr(os, name, call)

    failing("rename")
    failing("replace")
    for _ in range(200):
        try:
            curate(crawl, work, tokens=tokens)
            break
        except Interrupted:
            failures += 1
    assert failures >= 12
    assert outputs(work) == outputs(tmp_path / "whole")


def test_a_sample_takes_some_of_many_files(stages, crawl, tmp_path):
    funnel = curate(crawl, tmp_path / "work", sample=4)
    counts = {source: account["rows"] for source, account in funnel["inputs"].items()}
    assert counts == {"web": 4, "books": 4}
    assert funnel["inputs"]["web"]["files"] == 2


def test_an_explanation_tells_each_decision_with_the_text_before_and_after(stages, crawl, tmp_path):
    work = tmp_path / "work"
    curate(crawl, work)
    story = explain.explain(work, "http://site.org/1/0")
    kept, rejected = rows(work, "shout", "kept"), rows(work, "extract", "rejected")
    assert "read: kept" in story and "extract: kept" in story and "shout: " in story
    assert "| <!doctype html>" in story and "extract_encoding: utf-8" in story
    assert "+" in story and "RIVER!" in story and "-The river" not in story.split("shout:")[0]
    assert kept[0]["doc"] in explain.explain(work, kept[0]["doc"])
    story = explain.explain(work, rejected[0]["url"])
    assert "extract: REJECTED, no_text" in story and "shout" not in story
    assert "read: kept" in explain.explain(work, "HTTPS://site.org:443/1/0#part")
    with pytest.raises(UserError, match="no such URL"):
        explain.explain(work, "http://elsewhere.org")
    with pytest.raises(UserError, match="no finished stage"):
        explain.explain(tmp_path / "nowhere", "x")


def test_an_html_file_is_explained_by_its_path_and_what_is_not_read_is_said(
    stages, tmp_path, monkeypatch
):
    folder, work, said = tmp_path / "site", tmp_path / "work", []
    folder.mkdir()
    for name, body in zip(("a.html", "b.html"), pages(2).values(), strict=True):
        (folder / name).write_bytes(body)
    for name in ("style.css", "old.warc.zst", "README"):
        (folder / name).write_text("x")
    inputs = {"docs": {"paths": (str(folder),)}}
    funnel = curate(folder, work, inputs=inputs, lines=said)
    assert said[0].startswith("docs: 3 files of formats that are not read (")
    assert all(each in said[0] for each in (".css 1", ".warc.zst 1", "none 1"))
    assert funnel["files_not_read"]["docs"] == {".css": 1, ".warc.zst": 1, "none": 1}
    monkeypatch.chdir(tmp_path)
    for wanted in ("site/a.html", str(folder / "a.html"), (folder / "a.html").as_uri()):
        story = explain.explain(work, wanted)
        assert story.startswith((folder / "a.html").as_uri()) and "extract: kept" in story


def test_an_explanation_reads_one_part_of_a_stage(stages, crawl, tmp_path, monkeypatch):
    monkeypatch.setattr(run.parts, "PART_BYTES", 2_000)
    work = tmp_path / "work"
    curate(crawl, work)
    parts_of = sorted((work / "stages/01_extract/kept").iterdir())
    assert len(parts_of) > 5
    doc = rows(work, "shout", "kept")[0]["doc"]
    opened, real = [], pq.ParquetFile
    monkeypatch.setattr(explain.pq, "ParquetFile", lambda path: opened.append(path) or real(path))
    story = explain.explain(work, doc)
    assert "extract: kept" in story and "shout: kept" in story
    assert len([path for path in opened if "01_extract" in str(path)]) == 1


def loses(frame, config, scratch):
    return frame.with_column("reason", daft.lit(None).cast(DataType.string())).limit(3)


def doubles(frame, config, scratch):
    frame = frame.with_column("reason", daft.lit(None).cast(DataType.string()))
    return frame.union_all(frame)


def forgets(frame, config, scratch):
    return frame


@pytest.mark.parametrize(
    ("function", "message"),
    [(loses, "documents came"), (doubles, "twice"), (forgets, "lacks the column reason")],
)
def test_a_stage_that_breaks_its_contract_is_an_error(
    crawl, tmp_path, monkeypatch, function, message
):
    stage = registry.Stage("bad", function, ShoutConfig, 1)
    monkeypatch.setattr(registry, "STAGES", [*registry.STAGES[:1], stage])
    with pytest.raises(Exception, match=message):
        curate(crawl, tmp_path / "work", stages={"extract": {}, "bad": {}})
    assert not list(tmp_path.glob("work/stages/*_bad"))


def test_a_page_that_kills_the_extractor_is_rejected_and_its_neighbours_are_kept(
    crawl, tmp_path, monkeypatch
):
    monkeypatch.setattr("llama3_jax.curation.extract.EXTRACTOR", "tests.curation.fatal:extract")
    funnel = curate(crawl, tmp_path / "work", stages={"extract": {"seconds": 1}})
    reasons = {c["reason"]: c["documents"] for c in funnel["stages"][1]["counts"]
               if c["source"] == "web"}  # fmt: skip
    assert reasons == {"": 16, "crashed": 1, "timeout": 1, "out_of_memory": 1}


def test_files_that_a_config_names_count_also_by_a_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("words", "positive", "list.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "quality").mkdir()
    values = {"model": "quality", "label": "positive", "files": {"en": "words"}, "x": ["list.txt"]}
    values["benchmarks"] = {"quiz": {"path": "positive"}, "other": {"fields": ("words",)}}
    found = sorted(map(str, configs.named_files(values)))
    assert found == ["list.txt", "positive", "quality", "words"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": {"extract": {"secods": 1}}}, "config.stages.extract.secods: .*seconds"),
        ({"stages": {"extract": {}, "minihash": {}}}, "'minihash' is no stage; known: extract"),
        ({"stages": {"shout": {}}}, "'extract' is missing"),
        ({"inputs": {}}, "inputs"),
        (
            {"inputs": {"web": {"paths": ("/no/such/*.warc",)}}},
            "web.paths: /no/such/.*no such file",
        ),
        ({"inputs": {"web": {"paths": (__file__,)}}}, "unknown format; known: .warc"),
        ({"tokens": {"tokenizer": "/no/tokenizer"}}, "/no/tokenizer does not exist"),
    ],
)
def test_bad_configs_are_named(stages, crawl, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        curate(crawl, tmp_path / "work", **values)


def test_two_runs_in_one_folder_are_refused(stages, crawl, tmp_path):
    with locked(tmp_path / "work"), pytest.raises(UserError, match="another process works in it"):
        curate(crawl, tmp_path / "work")


def test_all_stages_that_need_no_classifier_follow_each_other(tmp_path, byte_tokenizer):
    crawl = tmp_path / "crawl"
    crawl.mkdir()
    made = pages(12, 0)
    del made["http://site.org/0/4"], made["http://site.org/0/9"]
    twin = made["http://site.org/0/1"]
    made |= {"http://site.org/copy": twin, "http://site.org/0/2?utm_source=x": twin}
    made["http://www.xvideos.com/1"] = made["http://site.org/0/0"]
    write_warc(crawl / "a.warc.gz", made)
    benchmark = crawl / "benchmark.txt"
    benchmark.write_text(json.dumps({"question": page_words(made["http://site.org/0/7"])}))
    stages = {
        "extract": {}, "urls": {}, "url_dedup": {}, "languages": {}, "minhash": {}, "lines": {},
        "contamination": {"benchmarks": {"quiz": {"path": str(benchmark)}}},
    }  # fmt: skip
    tokens = {"tokenizer": str(byte_tokenizer)}
    mix = {"total_tokens": 1_000, "weights": {"web": 1.0}}
    inputs = {"web": {"paths": (f"{crawl}/a.warc.gz",)}}
    funnel = curate(crawl, tmp_path / "work", inputs=inputs, stages=stages, tokens=tokens, mix=mix)
    reasons = {
        (stage["stage"], count["reason"]): count["documents"]
        for stage in funnel["stages"]
        for count in stage["counts"]
        if count["reason"]
    }
    assert reasons == {
        ("urls", "urls_adult"): 1,
        ("url_dedup", "url_dedup_older"): 1,
        ("minhash", "minhash_near_duplicate"): 1,
        ("contamination", "contaminated"): 1,
    }
    (report,) = tmp_path.glob("work/stages/*_contamination/report.json")
    assert json.loads(report.read_text())["benchmarks"]["quiz"]["documents"] == 1
    plan = json.loads((tmp_path / "work" / "mix.json").read_text())
    assert plan["main"] == {"web": 1.0} and funnel["shards"]["web"]["train"]["documents"] == 9
    assert all(row["lines_removed"] > 3 for row in rows(tmp_path / "work", "lines", "kept"))


def page_words(html: bytes) -> str:
    """Words of a page that no other page has in this order."""
    return " ".join(html.decode().split("<p>7 ")[1].split("</p>")[0].split()[:20])


# ---------------------------------------------------------------------------------------- the program


def config_file(tmp_path: Path, crawl: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(
        "from llama3_jax.curation.config import curation_config\n"
        "def get_config():\n"
        f"    return curation_config(inputs=dict(web=dict(paths=({str(crawl)!r},))), "
        "stages=dict(extract={}))\n"
    )
    return path


def test_the_program_writes_the_page_and_names_damage(command, crawl, tmp_path):
    config, work = config_file(tmp_path, crawl), tmp_path / "work"
    done = command("curate", f"--config={config}", f"--workdir={work}")
    assert done.returncode == 0, done.stderr
    assert "extract: 22 kept, 3 rejected" in done.stdout and "damaged: " in done.stdout
    html = (work / "curation.html").read_text()
    assert "Documents rejected, by reason" in html and "no_text" in html and PROSE[:40] in html
    bad = command("curate", f"--config={config}", f"--workdir={work}", "--address=host:1")
    assert bad.returncode == 2 and "--runner=ray" in bad.stderr


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_files(command, crawl, tmp_path):
    write_warc(crawl / "d.warc.gz", pages(400, 3))
    config = config_file(tmp_path, crawl)
    assert (
        command("curate", f"--config={config}", f"--workdir={tmp_path / 'whole'}").returncode == 0
    )
    work, random_ = tmp_path / "work", random.Random(0)
    argv = [sys.executable, "-m", "llama3_jax.curate", f"--config={config}", f"--workdir={work}"]

    def entries() -> int:
        return sum(len(folders) + len(names) for _, folders, names in os.walk(work))

    kills = 0
    for _ in range(6):
        process = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        goal = entries() + random_.randint(1, 6)
        while process.poll() is None and entries() < goal:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    assert command("curate", f"--config={config}", f"--workdir={work}").returncode == 0
    found, whole = outputs(work), outputs(tmp_path / "whole")
    assert found.keys() == whole.keys()
    assert [p for p in whole if found[p] != whole[p] and p != "curation.html"] == []


@pytest.mark.slow
def test_ray_gives_the_same_documents(command, crawl, tmp_path):
    config = config_file(tmp_path, crawl)
    for runner in ("native", "ray"):
        work = f"--workdir={tmp_path / runner}"
        done = command("curate", f"--config={config}", work, f"--runner={runner}")
        assert done.returncode == 0, done.stderr
    found, expected = outputs(tmp_path / "ray"), outputs(tmp_path / "native")
    assert found.keys() == expected.keys()
    assert [p for p in expected if found[p] != expected[p] and p != "curation.html"] == []


@pytest.mark.slow
def test_a_ray_worker_that_dies_changes_nothing(command, crawl, tmp_path):
    from ray.cluster_utils import Cluster

    for number in range(6):
        write_warc(crawl / f"more{number}.warc.gz", pages(300, number))
    config = config_file(tmp_path, crawl)
    assert (
        command("curate", f"--config={config}", f"--workdir={tmp_path / 'native'}").returncode == 0
    )
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        # Addresses of their own, or the run might hang on the node that is killed.
        addresses = ("127.0.0.2", "127.0.0.3")
        workers = [cluster.add_node(num_cpus=1, node_ip_address=ip) for ip in addresses]
        argv = [
            sys.executable, "-m", "llama3_jax.curate", f"--config={config}",
            f"--workdir={tmp_path / 'ray'}", "--runner=ray", f"--address={cluster.address}",
        ]  # fmt: skip
        process = subprocess.Popen(argv, cwd=REPOSITORY)
        while process.poll() is None and not list(tmp_path.glob("ray/stages/.01_extract*")):
            time.sleep(0.1)
        time.sleep(3)
        assert process.poll() is None, "it ended before the worker could be killed"
        cluster.remove_node(workers[0], allow_graceful=False)
        assert process.wait(240) == 0
    finally:
        cluster.shutdown()
    found, expected = outputs(tmp_path / "ray"), outputs(tmp_path / "native")
    assert [p for p in expected if found[p] != expected[p] and p != "curation.html"] == []
