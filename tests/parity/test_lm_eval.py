"""lm-eval on its Hugging Face backend and on ours, with the same weights: the same numbers."""

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="make test-parity installs it")

from lm_eval_case import MODEL, TOKENIZER, make_task, run_lm_eval

from llama3_jax.evaluation.lm_eval_adapter import LlamaForLmEval
from llama3_jax.evaluation.scoring import Scorer
from llama3_jax.model import hf
from llama3_jax.model.definition import init_params
from llama3_jax.parallel.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.parity


def test_the_hugging_face_backend_gives_our_numbers(tmp_path, monkeypatch):
    import transformers
    from lm_eval.models.huggingface import HFLM

    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    params = jax.jit(lambda: init_params(MODEL, 7))()
    folder = tmp_path / "model"
    ids = dict(bos_token_id=TOKENIZER.bos, eos_token_id=TOKENIZER.eos)
    hf.save(folder, MODEL, params, "float32", max_length=512, **ids)
    TOKENIZER.save_json(folder / "tokenizer.json")
    names = {number: name for name, number in TOKENIZER.special_ids.items()}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=names[TOKENIZER.bos], eos_token=names[TOKENIZER.eos],
        pad_token=names[TOKENIZER.eos],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    theirs = HFLM(
        pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, add_bos_token=True
    )
    make_task(tmp_path)
    layout = make_mesh(MeshConfig(), jax.devices()[:1])
    ours = LlamaForLmEval(Scorer(MODEL, params, layout, 512), TOKENIZER, length=64)
    expected, found = run_lm_eval(theirs, tmp_path), run_lm_eval(ours, tmp_path)
    np.testing.assert_allclose(found["logprobs"], expected["logprobs"], rtol=1e-4, atol=1e-4)
    assert [found["acc"], found["acc_norm"]] == [expected["acc"], expected["acc_norm"]]
