"""Small pictures for the notebooks: matrices as SVG, which is short enough to keep in a file."""

from collections.abc import Sequence

import numpy as np
from IPython.display import SVG

COLOURS = ("#3b82f6", "#d97706", "#059669", "#db2777", "#8b5cf6", "#0891b2", "#dc2626", "#65a30d")


def classes(matrix: np.ndarray, size: int = 6, title: str = "") -> SVG:
    """Whole numbers as colours, 0 and less as nothing; neighbours of one colour are one rectangle."""
    return _picture(matrix, size, title, lambda v: COLOURS[(v - 1) % len(COLOURS)] if v > 0 else "")


def shares(matrix: np.ndarray, size: int = 24, title: str = "") -> SVG:
    """Numbers from 0 (red) to 1 (green)."""
    return _picture(matrix, size, title, lambda v: f"hsl({120 * v:.0f},60%,50%)")


def _picture(matrix: np.ndarray, size: int, title: str, colour) -> SVG:
    rows, columns = matrix.shape
    parts = [
        f'<text x="0" y="12" font-family="sans-serif" font-size="12" fill="#808691">{title}</text>'
    ]
    for y, row in enumerate(matrix):
        for x, width in _runs(row.tolist()):
            if fill := colour(row[x]):
                parts.append(f'<rect x="{x * size}" y="{y * size + 18}" width="{width * size}" '
                             f'height="{size}" fill="{fill}"/>')  # fmt: skip
    parts.append(f'<rect x="0" y="18" width="{columns * size}" height="{rows * size}" fill="none" '
                 'stroke="#808691"/>')  # fmt: skip
    wide, high = max(columns * size, 8 * len(title)), rows * size + 20
    return SVG(f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}">'
               + "".join(parts) + "</svg>")  # fmt: skip


def _runs(row: Sequence) -> list[tuple[int, int]]:
    """(start, length) of each stretch of equal values."""
    starts = [0, *(i for i in range(1, len(row)) if row[i] != row[i - 1])]
    return [(a, b - a) for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
