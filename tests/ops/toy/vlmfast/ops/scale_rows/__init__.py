"""Multiplication of each row by its own factor."""

from vlmfast.ops.scale_rows.definition import scale_rows

__all__ = ["scale_rows"]
