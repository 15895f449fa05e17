"""A tiny model and a task of random questions, for lm-eval."""

import json
from pathlib import Path

import numpy as np

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=272, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
    dtype="float32", init_std=0.2,
)  # fmt: skip
TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)}, specials=16)
TASK = """
task: ours
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def make_task(folder: Path) -> Path:
    """A task of random questions, as lm-eval reads it; returns its questions' file."""
    random = np.random.default_rng()
    letters = "abcdefgh ."
    draw = lambda n: "".join(random.choice(list(letters), n))  # noqa: E731
    lines = []
    for _ in range(12):
        # Without a space in front, so that characters are counted alike.
        choices = [f"x{draw(random.integers(1, 12))}y" for _ in range(3)]
        context = f"q{draw(random.integers(1, 30))}:"
        lines.append(dict(context=context, choices=choices, answer=int(random.integers(3))))
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "ours.yaml").write_text(TASK.replace("FILE", str(path)))
    return path


def run_lm_eval(model, folder) -> dict[str, float]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=["ours"], task_manager=manager, bootstrap_iters=0, cache_requests=False,
    )  # fmt: skip
    scores = found["results"]["ours"]
    samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
    logprobs = [[float(r[0][0]) for r in sample["resps"]] for sample in samples]
    return {"acc": scores["acc,none"], "acc_norm": scores["acc_norm,none"], "logprobs": logprobs}
