"""Text tables: alignment, gaps and short rows."""

from modse_jax.evaluation import text_table
from modse_jax.evaluation.text_table import Column


def test_rows_are_aligned_by_their_columns():
    columns = (Column(4, "left", gap=0), Column(5), Column(0, "left", gap=3))
    rows = [["name", "value", "note"], ["a", "1"], ["longer", "22", "x"]]
    assert text_table.text_table(columns, rows) == (
        "name value   note\na        1\nlonger    22   x"
    )
