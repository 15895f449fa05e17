"""The Llama 3 pre-training recipe in JAX: model, data, training, one timeline."""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m llama3_jax.…`: a program starts, and this comes first
    from llama3_jax import exits

    exits.listen()
