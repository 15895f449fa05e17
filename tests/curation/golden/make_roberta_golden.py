"""Records a tiny random RoBERTa of transformers, its tokens and its logits for tests/curation/test_roberta.py.

    pip install -e .[parity]
    python tests/curation/golden/make_roberta_golden.py

Weights are larger than an initialisation's, norms are not 1: logits of order 1 show what is wrong.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizerFast

HERE = Path(__file__).parent / "roberta"
TEXTS = [
    "The classifier reads the first tokens of a document.",
    "",
    "Ein Satz mit Umlauten: größer, schöner. 日本語の文 и по-русски.\n\n\tdef f(x):\n    return x",
    "a long document " * 40,
    "the end </s> of <pad> it",
]


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(TEXTS, vocab_size=300, special_tokens=specials)
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(HERE / "tokenizer.json"))

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=80, max_position_embeddings=98,
        type_vocab_size=1, layer_norm_eps=1e-5, num_labels=3,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(HERE)
    model = RobertaForSequenceClassification.from_pretrained(HERE).eval()

    theirs = RobertaTokenizerFast(tokenizer_file=str(HERE / "tokenizer.json"))
    texts = TEXTS[:4]  # the last names specials, which theirs parses and ours takes as text
    batch = theirs(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits.numpy()
    golden = dict(tokens=batch["input_ids"].numpy().astype(np.int32), logits=logits)
    np.savez_compressed(HERE / "golden.npz", **golden)
    (HERE / "texts.json").write_text(json.dumps(TEXTS, ensure_ascii=False, indent=1) + "\n")
    print("logits up to", float(np.abs(logits).max()), "tokens", golden["tokens"].shape)


if __name__ == "__main__":
    main()
