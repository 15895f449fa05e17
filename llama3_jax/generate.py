"""Continues prompts with a trained model.

    python -m llama3_jax.generate --model=runs/demo --prompt='To be' --prompt='def main' \\
        --max_new_tokens=100 --temperature=0.8 --top_p=0.95

--model is a run's workdir (its newest checkpoint), one checkpoint, converted weights, or a Hugging
Face directory; where there is no tokenizer beside it, give one by --tokenizer.
"""

from pathlib import Path

from absl import flags

from llama3_jax import cli, xla
from llama3_jax.errors import UserError
from llama3_jax.model.decoding import generate
from llama3_jax.training.loading import load_with_tokenizer

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "model", None, "Run, checkpoint, model folder or Hugging Face weights.", required=True
    )
    flags.DEFINE_string("tokenizer", None, "A .tiktoken file or folder; default: the run's.")
    flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
    flags.DEFINE_integer("max_new_tokens", 64, "Tokens to add at most.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
    flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of tokens of this probability.")
    # jax.random.key takes other numbers for one of these.
    flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, upper_bound=2**32 - 1)


def main(_) -> None:
    if not FLAGS.prompt:
        raise UserError("--prompt is required: the text to continue")
    xla.start()
    loaded, tokenizer = load_with_tokenizer(Path(FLAGS.model), FLAGS.tokenizer)
    continuations = generate(
        loaded.config,
        loaded.params,
        [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in FLAGS.prompt],
        max_new_tokens=FLAGS.max_new_tokens,
        temperature=FLAGS.temperature,
        top_p=FLAGS.top_p,
        seed=FLAGS.seed,
        stop_tokens=(tokenizer.eos,),
    )
    for prompt, tokens in zip(FLAGS.prompt, continuations, strict=True):
        print(prompt + tokenizer.decode(tokens))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
