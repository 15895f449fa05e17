"""A small case of every program, for the tests of how programs end."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import random_documents, write_jsonl

from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data import tokenizing
from llama3_jax.model import hf
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import init_params
from llama3_jax.scaling.synthetic import CHINCHILLA, isoflop_runs
from llama3_jax.training.checkpoint import save_model

TRAIN = """
from llama3_jax.recipe.config import run_config


def get_config(corpora):
    sources = {"a": dict(train=f"{corpora}/train", validation=f"{corpora}/validation")}
    model = dict(vocab_size=272, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
                 dtype="float32")
    stage = dict(name="only", tokens=8 * 256, length=32, batch_tokens=256, mix=dict(a=1.0),
                 lr=dict(shape="cosine", peak=3e-3, end=3e-4, warmup_tokens=500))
    return run_config(model=model, data=dict(sources=sources), stages=[stage],
                      checkpoint=dict(every_steps=4, keep_last=2))
"""
CURATE = """
from llama3_jax.curation.config import curation_config


def get_config(folder):
    return curation_config(
        inputs={{"web": {{"paths": (f"{{folder}}/documents.jsonl",)}}}},
        stages={{"extract": {{}}, "gopher": {{}}, "minhash": {{}}}},
        tokens={{"tokenizer": f"{{folder}}/tokenizer"}},
    )
"""
LAUNCH = """
from llama3_jax.launching.experiment import WorkUnit


def sweep():
    return [WorkUnit(name="sleep", command=("sleep", "5"))]
"""
PROSE = "The river was wide and the boats that crossed it were slow, so that people had time. "


def make_inputs(folder: Path) -> None:
    """Everything that the commands read."""
    tokenizer = tokenizers.Tokenizer({bytes([byte]): byte for byte in range(256)}, specials=16)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    made = random_documents("a", 400, 0)
    documents = {id_: f"{text}. " + PROSE * 8 for id_, text in made.items()}
    source = write_jsonl(folder / "documents.jsonl", documents)
    options = tokenizing.Options(holdout=0.1)
    tokenizing.tokenize([source], folder / "corpus", folder / "tokenizer", options)
    (folder / "rubric.txt").write_text("Good? {document}\n[yes] good\n[no] bad\n")
    (folder / "haystack.txt").write_text(PROSE * 100)

    config = ModelConfig(
        vocab_size=272, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64
    )
    for name, seed in (("model", 0), ("other", 1)):
        params = init_params(config, seed)
        save_model(folder / name, config, params, tokenizer.fingerprint)
        (folder / name / "tokenizer").mkdir()
        tokenizer.save(folder / name / "tokenizer")
    hf.save(folder / "hf", config, params, bos_token_id=256, eos_token_id=257)
    tokenizer.save_json(folder / "hf" / "tokenizer.json")

    runs = isoflop_runs(CHINCHILLA, np.geomspace(6e18, 1e21, 4), noise=0.003)
    rows = zip(runs.flops, runs.tokens, runs.loss, strict=True)
    (folder / "runs.csv").write_text(
        "flops,tokens,loss\n" + "".join(f"{f},{t},{x}\n" for f, t, x in rows)
    )
    (folder / "run").mkdir()
    record = dict(kind="train", step=1, tokens=256, stage="only", loss=1.0, grad_norm=1.0)
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    for name, text in (("train", TRAIN), ("curate", CURATE), ("launch", LAUNCH)):
        (folder / f"{name}.py").write_text(text.replace("{{", "{").replace("}}", "}"))


def commands(inputs: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Of each program a command line, given where its output goes (a name that is free)."""
    fit = [f"--data={inputs}/runs.csv", "--target_flops=1e24"]
    model, documents = f"--model={inputs}/model", f"--input={inputs}/documents.jsonl"
    tokenizer = f"--tokenizer={inputs}/tokenizer"
    return {
        "train": lambda out: [
            "train", f"--config={inputs}/train.py:{inputs}/corpus", f"--workdir={out}"],
        "curate": lambda out: [
            "curate", f"--config={inputs}/curate.py:{inputs}", f"--workdir={out}"],
        "label": lambda out: ["curate", "label", model, documents, "--limit=8",
            f"--rubric={inputs}/rubric.txt", "--max_length=128", "--batch_tokens=1024",
            f"--output={out}.parquet"],
        "tokenize train": lambda out: [
            "tokenize", "train", documents, "--base=bytes", "--new_tokens=50", f"--output={out}",
            "--workers=2"],
        "tokenize stats": lambda out: [
            "tokenize", "stats", documents, f"--tokenizers=own={inputs}/tokenizer",
            f"--output={out}", "--workers=2"],
        "tokenize export": lambda out: ["tokenize", "export", tokenizer, f"--output={out}"],
        "tokenize encode": lambda out: [
            "tokenize", "encode", tokenizer, documents, f"--output={out}", "--workers=2"],
        "plan": lambda out: [
            "plan", f"--config={inputs}/train.py:{inputs}/corpus", f"--json={out}.json"],
        "fit": lambda out: ["fit", "isoflop", *fit, f"--json={out}.json"],
        "fit plan": lambda out: ["fit", "plan", *fit, "--budget=1e20", f"--json={out}.json"],
        "evaluate": lambda out: [
            "evaluate", model, f"--haystack={inputs}/haystack.txt", "--lengths=256",
            "--depths=2", "--seeds=1", "--length=256", "--batch_tokens=1024", "--held_out_tokens=1000",
            f"--held_out=a={inputs}/corpus/validation", f"--output={out}"],
        "convert": lambda out: ["convert", f"--from={inputs}/hf", f"--to={out}"],
        "convert back": lambda out: ["convert", f"--from={inputs}/model", f"--to={out}"],
        "average": lambda out: [
            "convert", "average", f"--from={inputs}/model", f"--from={inputs}/other",
            f"--to={out}"],
        "generate": lambda out: ["generate", model, "--prompt=The river"],
        "report": lambda out: ["report", f"--workdir={inputs}/run"],
        "launch": lambda out: [
            "launch", f"--config={inputs}/launch.py", f"--root={out}", "--wait"],
    }  # fmt: skip
