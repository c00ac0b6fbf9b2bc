"""Text tables for the screen."""

from collections.abc import Sequence
from typing import Any


def format_table(rows: Sequence[Sequence[Any]], align: str = "<") -> str:
    """Return rows of cells as lines of aligned columns, two spaces between them.

    Args:
        rows: Rows of equal length, the heading first if there is one; a cell is shown as `str` has it.
        align: "<" for left or ">" for right, a character per column; the last one serves all further columns.

    Returns:
        One line per row, without trailing spaces; empty if there are no rows.

    Raises:
        ValueError: rows of different lengths, or another character in `align`.

    Example:
        >>> print(format_table([("alpha", "loss"), (1, "0.5"), (100, "0.25")], "<>"))
        alpha  loss
        1       0.5
        100    0.25
    """
    if not align or set(align) - set("<>"):
        msg = f'align must hold "<" or ">" for each column, got {align!r}.'
        raise ValueError(msg)
    cells = [[str(cell) for cell in row] for row in rows]
    lengths = {len(row) for row in cells}
    if len(lengths) > 1:
        msg = f"rows must have equal lengths, got lengths {sorted(lengths)}; fill missing cells with empty texts."
        raise ValueError(msg)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = align + align[-1] * (len(widths) - len(align))
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
