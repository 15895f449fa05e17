"""A model of ours as one of lm-eval's (pip install -e '.[eval]'), offline.

    lm = LlamaForLmEval(scorer, tokenizer, length=2048)
    lm_eval.simple_evaluate(model=lm, tasks=[…], task_manager=TaskManager(include_path=…))

Its numbers are those of `evaluation/metrics.py`, for both score the same tokens. As lm-eval's Hugging
Face backend with `add_bos_token=True`, but that no request is cut: a long one takes a longer row.
"""

from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.evaluation.scoring import Request, Scorer
from llama3_jax.evaluation.tasks import encode
from llama3_jax.model.decoding import generate

_MAX_NEW_TOKENS = 256


class LlamaForLmEval(TemplateLM):
    """`length`: of rows, and of the windows in which whole documents are scored."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, length: int):
        super().__init__()
        self._scorer, self._tokenizer, self._length = scorer, tokenizer, length

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        tokens = self._tokenizer.encode(string)
        return tokens if add_special_tokens is False else [self._tokenizer.bos, *tokens]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        request = encode(self._tokenizer, context, continuation)
        return request.context.tolist(), request.continuation.tolist()

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        pairs = [Request(np.array(context), np.array(target)) for _, context, target in requests]
        return [(-s.nll, s.greedy) for s in self._scorer.score(pairs, self._length)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm=False) -> list[float]:
        """The log-likelihood of whole texts, in windows that each predict other tokens."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id,
                max_seq_len=self._length, context_len=1,
            )  # fmt: skip
            pairs = [Request(*map(np.array, make_disjoint_window(pair))) for pair in found]
            windows += pairs
            counts.append(len(pairs))
        scores = iter(self._scorer.score(windows, self._length))
        return [-sum(next(scores).nll for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm=False) -> list[str]:
        if self._scorer.layout.config.devices > 1:
            raise UserError("lm-eval's generation tasks run on one device: mesh of 1")
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
        (tokens,) = generate(
            self._scorer.model,
            self._scorer.params,
            [self.tok_encode(context)],
            max_new_tokens=options.get("max_gen_toks", _MAX_NEW_TOKENS),
            temperature=temperature,
            stop_tokens=(self.eot_token_id,),
        )
        text = self._tokenizer.decode(tokens)
        return text[: min((text.find(u) for u in until if u and u in text), default=len(text))]
