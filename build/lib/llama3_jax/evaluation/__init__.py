"""Losses on held-out text and the baselines beside them."""
