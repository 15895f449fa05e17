"""Triton kernels for NVIDIA GPUs, and their gradients. Importing a file of this room needs triton.

What each computes is defined by the plain-JAX reference of the same name one floor up.
"""
