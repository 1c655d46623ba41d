"""Rows, each times a number of its own."""

from vlmfast.ops.scale_rows.definition import scale_rows

__all__ = ["scale_rows"]
