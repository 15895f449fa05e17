import json

import numpy as np
import pytest
import sentencepiece
from conftest import write_jsonl

from llama3_jax.data import bpe, tokenizer_stats
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.data.tokenizer_training import BYTES
from llama3_jax.errors import UserError
from llama3_jax.reporting import tokenizers as reporting

ROWS = [
    {"lang": "en", "text": "the cat the hat"},
    {"lang": "ru", "text": "да да"},
    {"lang": "en", "text": "the"},
]


@pytest.fixture
def files(tmp_path):
    """Two tokenizers and two sources."""
    (tmp_path / "bytes").mkdir()
    Tokenizer(BYTES, 2).save(tmp_path / "bytes")
    (tmp_path / "some").mkdir()
    ranks = bpe.extend(BYTES, {"the": 2, " the": 1, "да": 1}, 4)
    Tokenizer(ranks, 2).save(tmp_path / "some")
    inputs = []
    for name, rows in (("web", ROWS), ("books", ROWS[:1])):
        inputs.append(tmp_path / f"{name}.jsonl")
        inputs[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return inputs, {name: str(tmp_path / name) for name in ("bytes", "some")}


def test_measures_by_source_and_language(files):
    inputs, paths = files
    stats, usage = tokenizer_stats.measure(inputs, paths)
    cells = {(text["source"], text["language"]): text for text in stats["texts"]}
    assert list(cells) == [("books", "en"), ("web", "en"), ("web", "ru")]
    english = cells["web", "en"]
    assert (english["documents"], english["characters"], english["words"]) == (2, 18, 5)
    assert english["tokens"]["bytes"] == english["bytes"] == 18
    some = 18 - 3 * 2 - 1  # "the" and " the" are one token
    assert english["tokens"]["some"] == some
    assert english["characters_per_token"]["some"] == pytest.approx(18 / some)
    assert english["tokens_per_word"]["some"] == pytest.approx(some / 5)
    russian = cells["web", "ru"]
    assert (russian["characters"], russian["bytes"]) == (5, 9)
    assert russian["bytes_per_token"]["bytes"] == 1
    assert stats["all"]["tokens"]["bytes"] == 18 + 15 + 9 == usage["bytes"].sum()

    use = stats["tokenizers"]["bytes"]
    assert (use["vocab_size"], use["used"]) == (258, len(set(b"the cat hat")) + 3)
    assert use["most_used"][0] == {
        "id": ord("t"), "text": "t", "share": pytest.approx(usage["bytes"].max() / 42)
    }  # fmt: skip
    assert stats["tokenizers"]["some"]["longest"][0]["text"] == " the"


def test_processes_change_nothing(files):
    inputs, paths = files
    one, two = (tokenizer_stats.measure(inputs, paths, workers=n) for n in (1, 2))
    assert one[0] == two[0]
    assert all((one[1][name] == two[1][name]).all() for name in paths)


def test_sentencepiece_models(tmp_path):
    texts = {str(i): f"token number {i} of the text" for i in range(200)}
    (tmp_path / "text").write_text("\n".join(texts.values()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "llama2"), vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    path = str(tmp_path / "llama2.model")
    encoder = tokenizer_stats.load_encoder(path)
    text = "number 17 中 text"
    ids = encoder.encode(text)
    assert b"".join(encoder.tokens[i] for i in ids).decode() == " " + text
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    stats, _ = tokenizer_stats.measure([source], {"llama2": path})
    expected = sum(len(encoder.encode(text)) for text in texts.values())
    assert stats["all"]["tokens"]["llama2"] == expected
    (tmp_path / "damaged.model").write_bytes(b"\n\x07broken")
    with pytest.raises(UserError, match="damaged SentencePiece model"):
        tokenizer_stats.load_encoder(str(tmp_path / "damaged.model"))


def test_no_text_and_no_tokenizer(files, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no document with text"):
        tokenizer_stats.measure([tmp_path / "empty.jsonl"], files[1])
    with pytest.raises(UserError, match="no tokenizer"):
        tokenizer_stats.measure(files[0], {})


class TestPresented:
    @pytest.fixture
    def saved(self, files, tmp_path):
        stats, usage = tokenizer_stats.measure(*files)
        tokenizer_stats.save(stats, usage, tmp_path / reporting.FOLDER)
        return stats, usage

    def test_what_was_saved_is_read(self, saved, tmp_path):
        stats, usage = reporting.read(tmp_path / reporting.FOLDER)
        assert stats == json.loads(json.dumps(saved[0]))
        assert all((usage[name] == saved[1][name]).all() for name in usage)

    def test_section_of_a_report(self, saved, tmp_path):
        (section,) = reporting.sections(tmp_path)
        stats = saved[0]
        for text in stats["texts"]:
            assert f"{text['characters_per_token']['some']:.3f}" in section.html
        assert section.html.count("plotly-graph-div") == 2
        assert reporting.sections(tmp_path / "elsewhere") == []

    def test_plots_hold_the_measures(self, saved):
        stats, usage = saved
        bars = reporting.compression_figure(stats).data
        assert [bar.name for bar in bars] == ["bytes", "some"]
        expected = [text["characters_per_token"]["some"] for text in stats["texts"]]
        assert list(bars[1].y) == expected
        for line, counts in zip(reporting.use_figure(usage).data, usage.values(), strict=True):
            assert line.y[0] == counts.max() / counts.sum()
            assert line.x[-1] == (counts > 0).sum()
            assert (np.diff(line.y) <= 0).all()

    def test_damaged_statistics(self, saved, tmp_path):
        (tmp_path / reporting.FOLDER / "usage_some.npy").write_bytes(b"no")
        with pytest.raises(UserError, match="damaged statistics"):
            reporting.sections(tmp_path)

    def test_program(self, command, files, tmp_path):
        inputs, paths = files
        names = ",".join(f"{name}={path}" for name, path in paths.items())
        options = [f"--input={path}" for path in inputs] + [f"--tokenizers={names}"]
        result = command("tokenize", "stats", *options, f"--output={tmp_path}/out")
        assert result.returncode == 0, result.stderr
        assert "Characters per token" in result.stdout and "books en" in result.stdout
        page = (tmp_path / "out/stats.html").read_text()
        assert "tokenizer-compression" in page and "https://" not in page.split("<body>")[1]
        result = command("tokenize", "stats", *options[:2], "--tokenizers=a", "--output=x")
        assert result.stderr == "error: --tokenizers=a: must look like name=value\n"
