import errno
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPOSITORY, command_environment, random_documents, write_jsonl

from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data import tokenizing
from llama3_jax.data.corpus import DATASET_FILE, Corpus
from llama3_jax.data.tokenizing import Options, tokenize
from llama3_jax.errors import UserError
from llama3_jax.folder_lock import locked


def texts(directory: Path) -> dict[str, str]:
    corpus, tokenizer = Corpus(directory), tokenizers.load(directory)
    documents = (corpus.document(i) for i in range(len(corpus)))
    return {d.id: tokenizer.decode(d.tokens[1:-1].tolist()) for d in documents}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_documents_come_back_whole_and_framed(tmp_path, byte_tokenizer):
    documents = {"x": "naïve 漢字\n\ttabs", "y": "<|end_of_text|> is text", "z": "ok", "empty": " "}
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    infos = tokenize([source], tmp_path / "out", byte_tokenizer, Options())
    assert texts(tmp_path / "out/train") == {k: v for k, v in documents.items() if k != "empty"}
    corpus, tokenizer = Corpus(tmp_path / "out/train"), tokenizers.load(byte_tokenizer)
    for i in range(len(corpus)):
        tokens = corpus.document(i).tokens
        assert tokens[0] == tokenizer.bos and tokens[-1] == tokenizer.eos
        assert not np.isin(tokens[1:-1], [tokenizer.bos, tokenizer.eos]).any()
    assert infos["train"].utf8_bytes == sum(len(documents[k].encode()) for k in "xyz")


def test_formats_and_pieces_give_the_same_documents(tmp_path, byte_tokenizer):
    documents = random_documents("d", 200, seed=3)
    write_jsonl(tmp_path / "in.jsonl", documents)
    with gzip.open(tmp_path / "zipped.jsonl.gz", "wb") as file:
        file.write((tmp_path / "in.jsonl").read_bytes())
    columns = {"id": list(documents), "text": list(documents.values())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet", row_group_size=30)
    for name in ("in.jsonl", "zipped.jsonl.gz", "in.parquet"):
        for piece_bytes in (1_000, 10**9):
            out = tmp_path / f"{name}.{piece_bytes}"
            tokenize([tmp_path / name], out, byte_tokenizer, Options(piece_bytes=piece_bytes))
            assert texts(out / "train") == documents


def test_row_groups_are_packed_and_documents_keep_their_names(tmp_path, byte_tokenizer):
    texts_ = [f"{n} " + "word " * 20 for n in range(60)]
    table = pyarrow.table({"text": texts_})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    names = {}
    for piece_bytes in (1, 1_500, 10**9):
        out = tmp_path / str(piece_bytes)
        tokenize([tmp_path / "in.parquet"], out, byte_tokenizer, Options(piece_bytes=piece_bytes))
        assert sorted(texts(out / "train").values()) == sorted(texts_)
        names[piece_bytes] = list(texts(out / "train"))
    assert names[1] == names[1_500] == names[10**9]
    assert names[1][:3] == ["in.parquet#0.0", "in.parquet#0.1", "in.parquet#1.0"]
    shards = {at: len(Corpus(tmp_path / str(at) / "train").info.shards) for at in names}
    assert shards[1] == 30 and 1 < shards[1_500] < 20 and shards[10**9] == 1


_READ_ALL = """
import resource, sys
soft = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.folder_lock import locked
corpus = Corpus(sys.argv[1])
held = []
if sys.argv[3:]:
    corpus.document(0)
    try:
        while True:
            held.append(open("/dev/null"))
    except OSError:
        pass
try:
    print(sum(len(corpus.document(i).tokens) for i in range(len(corpus))))
except UserError as error:
    held.clear()
    print(error)
"""


def test_more_shards_than_files_may_be_open(tmp_path, byte_tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", random_documents("d", 300, seed=8))
    tokenize([source], tmp_path / "out", byte_tokenizer, Options(piece_bytes=300))
    corpus = Corpus(tmp_path / "out/train")
    assert len(corpus.info.shards) > 80
    (tmp_path / "read.py").write_text(_READ_ALL)
    command = [sys.executable, str(tmp_path / "read.py"), str(tmp_path / "out/train"), "64"]
    options = dict(capture_output=True, text=True, check=True, cwd=REPOSITORY,
                   env=os.environ | {"PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    done = subprocess.run(command, **options)
    assert done.stdout.strip() == str(corpus.info.tokens)
    done = subprocess.run([*command, "hold"], **options)
    assert "too many open files, the limit is 64" in done.stdout and "damaged" not in done.stdout


def test_the_holdout_depends_on_the_id_alone(tmp_path, byte_tokenizer):
    documents = random_documents("d", 400, seed=4)
    write_jsonl(tmp_path / "all.jsonl", documents)
    write_jsonl(tmp_path / "half.jsonl", dict(list(documents.items())[::2]))
    held = {}
    for name in ("all", "half"):
        infos = tokenize(
            [tmp_path / f"{name}.jsonl"], tmp_path / name, byte_tokenizer, Options(holdout=0.2)
        )
        held[name] = set(texts(tmp_path / name / "validation"))
        assert not held[name] & set(texts(tmp_path / name / "train"))
        assert 0.1 < infos["validation"].documents / (len(documents) / (2 - (name == "all"))) < 0.3
    assert held["half"] == held["all"] & set(list(documents)[::2])


def test_processes_write_the_same_bytes(tmp_path, byte_tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", random_documents("d", 300, seed=5))
    for workers in (1, 2):
        options = Options(holdout=0.1, piece_bytes=2_000)
        tokenize([source], tmp_path / str(workers), byte_tokenizer, options, workers)
    for split in ("train", "validation"):
        assert content(tmp_path / "1" / split) == content(tmp_path / "2" / split)


def test_a_killed_run_leaves_no_corpus_and_is_finished_by_the_same_command(
    tmp_path, byte_tokenizer, compilation_cache
):
    source = write_jsonl(tmp_path / "in.jsonl", random_documents("d", 60_000, seed=6))
    out = tmp_path / "out"
    options = ["encode", f"--input={source}", f"--output={out}", f"--tokenizer={byte_tokenizer}"]
    code = (
        "import llama3_jax.data.tokenizing as t, llama3_jax.tokenize as program, sys;"
        "t.Options.__new__.__defaults__ = ('text', 'id', 0.0, 100_000);"
        "program.run(sys.argv)"
    )
    command = [sys.executable, "-c", code, *options]
    options = dict(cwd=REPOSITORY, env=command_environment(compilation_cache))
    child = subprocess.Popen(command, **options)
    while not list(out.glob("train/shard-00002.json")):
        assert child.poll() is None, "finished before it could be killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(UserError, match="not a tokenised corpus"):
        Corpus(out / "train")
    kept = {path: os.stat(path).st_mtime_ns for path in out.glob("train/shard-0000[012].json")}

    subprocess.run(command, check=True, capture_output=True, **options)
    assert {path: os.stat(path).st_mtime_ns for path in kept} == kept
    tokenize([source], tmp_path / "whole", byte_tokenizer, Options(piece_bytes=100_000))
    (left, right) = (content(folder / "train") for folder in (out, tmp_path / "whole"))
    assert [n for n in left if not n.startswith(".")] == list(right)
    assert left["lengths.npy"] == right["lengths.npy"]
    assert texts(out / "train") == texts(tmp_path / "whole/train")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a.jsonl at byte 15: not a line of JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"no text in field 'text'; fields: body"),
        ("a.jsonl", b"[1]\n", r"at byte 0: a list, not a JSON object"),
        (
            "a.jsonl",
            b'{"text": "\xff"}\n',
            r"at byte 0: not a line of JSON \(.*invalid start byte",
        ),
        (
            "a.jsonl",
            b'{"text": "\\udc00"}\n',
            r"at byte 0: not Unicode: half of a surrogate pair",
        ),
        ("a.jsonl", b"[" * 100_000, r"at byte 0: not a line of JSON \(maximum recursion"),
        ("a.jsonl", b"", r"no document with text"),
        ("a.jsonl.gz", b"not gzip", r"damaged gzip"),
        ("a.parquet", b"PAR1nope", r"not a whole parquet file"),
        ("a.txt", b"ab\xff", r"a.txt: not UTF-8 at byte 2"),
        ("a.csv", b"x", r"unknown format; known: .jsonl"),
    ],
)
def test_bad_input_is_named_and_leaves_no_corpus(tmp_path, byte_tokenizer, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        tokenize([tmp_path / name], tmp_path / "out", byte_tokenizer, Options())
    assert not (tmp_path / "out/train" / DATASET_FILE).exists()
    leftovers = list((tmp_path / "out").rglob("*.tmp")) if (tmp_path / "out").exists() else []
    assert not leftovers


def test_damaged_parquet_is_named(tmp_path, byte_tokenizer):
    values = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: row group 0, rows 0 to 2: not UTF-8"):
        tokenize([tmp_path / "a.parquet"], tmp_path / "out", byte_tokenizer, Options())
    texts = [str(np.random.default_rng(i).integers(0, 1 << 60, 50)) for i in range(100)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[200:20_000] = bytes(19_800)
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(UserError, match="b.parquet: row group 0: damaged parquet"):
        tokenize([tmp_path / "b.parquet"], tmp_path / "out", byte_tokenizer, Options())


def test_the_program_says_what_is_missing(command, tmp_path):
    result = command("tokenize", "encode", f"--input={tmp_path}/no*.jsonl", f"--output={tmp_path}/o",
                  f"--tokenizer={tmp_path}/none.tiktoken")  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.strip() == f"error: --input={tmp_path}/no*.jsonl: no such file"


class TestFullDisk:
    """A disk that takes no more while a corpus is written."""

    def test_lengths_say_why_they_cannot_be_written(self, tmp_path):
        """np.save says "100000 requested and 512 written", and no more."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_048, hard))
        try:
            with pytest.raises(OSError) as raised:
                tokenizing._save_lengths(tmp_path / "x.npy", np.arange(100_000, dtype=np.uint32))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert raised.value.errno == errno.EFBIG and not list(tmp_path.iterdir())

    def test_lengths_are_as_numpy_saves_them(self, tmp_path):
        for size in (0, 1, 1_000):
            lengths = np.arange(size, dtype=np.uint32)
            tokenizing._save_lengths(tmp_path / "x.npy", lengths)
            np.save(tmp_path / "y.npy", lengths)
            assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()

    @pytest.mark.parametrize("after", [0, 1, 2, 3])
    def test_the_same_command_goes_on(self, tmp_path, monkeypatch, byte_tokenizer, after):
        source = write_jsonl(tmp_path / "in.jsonl", random_documents("d", 100, seed=5))
        options = Options(holdout=0.2, piece_bytes=5_000)
        tokenize([source], tmp_path / "whole", byte_tokenizer, options)
        real, written = tokenizing._save_lengths, []

        def filling(path, lengths):
            written.append(path)
            if len(written) > after:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            real(path, lengths)

        with monkeypatch.context() as patch:
            patch.setattr(tokenizing, "_save_lengths", filling)
            with pytest.raises(OSError, match="No space left"):
                tokenize([source], tmp_path / "out", byte_tokenizer, options)
        assert not list((tmp_path / "out").glob("*/dataset.json"))
        assert not list((tmp_path / "out").rglob("*.tmp"))
        tokenize([source], tmp_path / "out", byte_tokenizer, options)
        for split in ("train", "validation"):
            assert content(tmp_path / "out" / split) == content(tmp_path / "whole" / split)


class TestAnExistingCorpus:
    def test_without_a_holdout_the_validation_of_an_earlier_run_is_gone(
        self, tmp_path, byte_tokenizer
    ):
        source = write_jsonl(tmp_path / "in.jsonl", random_documents("d", 60, seed=9))
        out = tmp_path / "out"
        tokenize([source], out, byte_tokenizer, Options(holdout=0.3))
        (out / "validation/notes.txt").write_text("mine")
        tokenize([source], out, byte_tokenizer, Options())
        assert len(texts(out / "train")) == 60
        assert [path.name for path in (out / "validation").iterdir()] == ["notes.txt"]
        (out / "validation/notes.txt").unlink()
        tokenize([source], out, byte_tokenizer, Options())
        assert not (out / "validation").exists()

    def test_is_replaced_only_if_told(self, command, tmp_path, byte_tokenizer):
        source = write_jsonl(tmp_path / "in.jsonl", random_documents("d", 60, seed=9))
        more = write_jsonl(tmp_path / "more.jsonl", random_documents("e", 5, seed=1))
        out = tmp_path / "out"
        tokenize([source], out, byte_tokenizer, Options(holdout=0.3))
        before = content(out / "train") | content(out / "validation")
        options = ["tokenize", "encode", f"--input={more}", f"--output={out}", f"--tokenizer={byte_tokenizer}"]  # fmt: skip
        done = command(*options)
        message = f"error: --output={out} holds a corpus; name another folder, or add --overwrite"
        assert (done.returncode, done.stderr.strip()) == (2, message)
        assert content(out / "train") | content(out / "validation") == before
        done = command(*options, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert len(texts(out / "train")) == 5 and not (out / "validation").exists()

    def test_two_processes_in_one_folder_are_refused(self, tmp_path, byte_tokenizer):
        source = write_jsonl(tmp_path / "in.jsonl", {"a": "text"})
        with (
            locked(tmp_path / "out"),
            pytest.raises(UserError, match=r"--output=.*out: another process works in it"),
        ):
            tokenize([source], tmp_path / "out", byte_tokenizer, Options())
        assert not (tmp_path / "out/train").exists()


class TestDamagedCorpus:
    @pytest.fixture
    def corpus(self, tmp_path, byte_tokenizer) -> Path:
        source = write_jsonl(tmp_path / "in.jsonl", random_documents("d", 50, seed=7))
        tokenize([source], tmp_path, byte_tokenizer, Options())
        return tmp_path / "train"

    def test_damaged_bytes(self, corpus):
        shard = corpus / "shard-00000.arrayrecord"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
        shard.write_bytes(data)
        with pytest.raises(UserError, match=r"shard-00000.arrayrecord: damaged at record \d+"):
            opened = Corpus(corpus)
            for i in range(len(opened)):
                opened.document(i)

    def test_truncated_shard(self, corpus):
        shard = corpus / "shard-00000.arrayrecord"
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"shard-00000.arrayrecord: damaged"):
            Corpus(corpus).document(49)

    def test_missing_shard(self, corpus):
        (corpus / "shard-00000.arrayrecord").unlink()
        with pytest.raises(UserError, match="shard-00000.arrayrecord: shard is missing"):
            Corpus(corpus)

    def test_truncated_lengths(self, corpus):
        path = corpus / "lengths.npy"
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(UserError, match="lengths.npy"):
            Corpus(corpus)

    def test_empty(self, corpus):
        info = json.loads((corpus / DATASET_FILE).read_text())
        (corpus / DATASET_FILE).write_text(
            json.dumps(info | {"tokens": 0, "documents": 0, "shards": []})
        )
        with pytest.raises(UserError, match="the corpus is empty"):
            Corpus(corpus)

    def test_not_json(self, corpus):
        (corpus / DATASET_FILE).write_text("{")
        with pytest.raises(UserError, match="dataset.json: damaged, not JSON"):
            Corpus(corpus)
