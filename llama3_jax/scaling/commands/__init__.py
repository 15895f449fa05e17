"""The commands of `python -m llama3_jax.fit`, one a file: flags, tables on the console, files."""

from types import ModuleType

from llama3_jax.scaling.commands import downstream, isoflop, mix, plan, probe

COMMANDS: dict[str, ModuleType] = {
    "isoflop": isoflop,
    "downstream": downstream,
    "mix": mix,
    "probe": probe,
    "plan": plan,
}
