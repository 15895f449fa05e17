"""lm-eval on our model gives the numbers of our own evaluation."""

import os

import jax
import numpy as np
import pytest
from lm_eval_case import MODEL, TOKENIZER, make_task, run_lm_eval

from llama3_jax.evaluation import tasks
from llama3_jax.evaluation.metrics import answer
from llama3_jax.evaluation.scoring import Scorer
from llama3_jax.model.definition import init_params
from llama3_jax.parallel.mesh import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    params = jax.jit(lambda: init_params(MODEL, 5))()
    return Scorer(MODEL, params, make_mesh(MeshConfig(), jax.devices()[:1]), 512)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    monkeypatch.setitem(os.environ, "HF_HOME", str(tmp_path / "hf"))


def test_lm_eval_gives_our_numbers(offline, scorer, tmp_path):
    from llama3_jax.evaluation.lm_eval_adapter import LlamaForLmEval

    path = make_task(tmp_path)
    theirs = run_lm_eval(LlamaForLmEval(scorer, TOKENIZER, length=64), tmp_path)
    answers = answer(scorer, TOKENIZER, tasks.load("ours", str(path)), 64)
    ours = {name: metric.value for name, metric in answers.metrics().items()}
    assert [theirs["acc"], theirs["acc_norm"]] == [ours["acc"], ours["acc_norm"]]
    np.testing.assert_allclose(theirs["logprobs"], answers.logprobs, rtol=1e-6)


def test_whole_texts_are_scored_in_windows_that_each_predict_other_tokens(offline, scorer):
    from lm_eval.api.instance import Instance

    from llama3_jax.evaluation.lm_eval_adapter import LlamaForLmEval

    text = "the cat sat on the mat and the dog sat on the log"
    instance = Instance("loglikelihood_rolling", {}, (text,), 0)
    (whole,) = LlamaForLmEval(scorer, TOKENIZER, length=64).loglikelihood_rolling([instance])
    request = tasks.encode(TOKENIZER, "", text)
    (expected,) = scorer.score([request], 64)
    assert whole == pytest.approx(-expected.nll, rel=1e-5)
    (cut,) = LlamaForLmEval(scorer, TOKENIZER, length=16).loglikelihood_rolling([instance])
    assert cut != pytest.approx(whole, rel=1e-3) and np.isfinite(cut)


def test_generation_stops_where_it_is_told(offline, scorer):
    from lm_eval.api.instance import Instance

    from llama3_jax.evaluation.lm_eval_adapter import LlamaForLmEval

    model = LlamaForLmEval(scorer, TOKENIZER, length=64)
    free = Instance("generate_until", {}, ("abc", {"until": [], "max_gen_toks": 12}), 0)
    (text,) = model.generate_until([free])
    stop = text[3:5]
    until = Instance("generate_until", {}, ("abc", {"until": [stop], "max_gen_toks": 12}), 0)
    assert model.generate_until([until]) == [text[: text.index(stop)]]
