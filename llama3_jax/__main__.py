"""`python -m llama3_jax` lists the programs."""

import ast
from pathlib import Path


def programs() -> dict[str, str]:
    """Name and the first line of its docstring, of each program; none is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__"' in text and path.stem != "__main__":
            found[path.stem] = ast.get_docstring(ast.parse(text)).splitlines()[0]
    return found


if __name__ == "__main__":
    for name, line in programs().items():
        print(f"  python -m llama3_jax.{name:10} {line}")
    print("\nEach lists its options with --help.")
