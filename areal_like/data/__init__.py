"""Rows of data sets (JSON lines, parquet, the Hugging Face hub) for tasks, SFT and statistics.

Imports no torch. `rows.py` opens sources, `row_format.py` reads prompts and reference answers from rows,
`mixture.py` orders several data sets by weights.
"""

from areal_like.data.row_format import ConversationRow, RowFormat
from areal_like.data.rows import Rows, open_rows

__all__ = ["ConversationRow", "RowFormat", "Rows", "open_rows"]
