"""Text tables."""

import pytest

from lazyjax._core.tables import format_table

ROWS = [("name", "value", "note"), ("a", 10, ""), ("longer", "0.5", "x")]


@pytest.mark.parametrize(
    ("align", "lines"),
    [
        ("<", ["name    value  note", "a       10", "longer  0.5    x"]),
        (">", ["  name  value  note", "     a     10", "longer    0.5     x"]),
        ("<><", ["name    value  note", "a          10", "longer    0.5  x"]),
        ("<>", ["name    value  note", "a          10", "longer    0.5     x"]),
    ],
)
def test_columns_are_aligned_and_lines_end_with_their_last_character(align, lines):
    assert format_table(ROWS, align).split("\n") == lines


def test_no_rows_make_no_lines():
    assert format_table([]) == ""


def test_rows_of_different_lengths_and_other_alignments_are_refused():
    with pytest.raises(ValueError, match=r"equal lengths, got lengths \[1, 3\]"):
        format_table([*ROWS, ("a",)])
    with pytest.raises(ValueError, match=r'align must hold "<" or ">" .*\^'):
        format_table(ROWS, "^")
