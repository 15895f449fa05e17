"""The Llama 3 pre-training recipe in JAX: model, data, training, one timeline."""

import os
import sys

if sys.argv[:1] == ["-m"]:  # `python -m llama3_jax.…`: a program starts, and this comes first
    from llama3_jax import exits

    exits.listen()
elif (
    os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.dirname(os.path.abspath(__file__))
    and "multiprocessing.spawn" in sys.modules
):  # a worker of such a program, which ends it
    from llama3_jax import exits

    exits.ignore()
