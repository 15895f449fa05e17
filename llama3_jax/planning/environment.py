"""Import before jax: a process that compiles for H100s, and runs on none.

The GPU plugin must not look for CUDA's libraries, and all that is not compiled ahead runs on the
CPU.
"""

import os

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's warnings tell of rematerialisation that it tried; what came out is in the tables.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
