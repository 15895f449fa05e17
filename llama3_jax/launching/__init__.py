"""Experiments of many work units: declared in a config file, run here, by Slurm or by XManager."""
