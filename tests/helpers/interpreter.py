"""Repair Triton's interpreter, so that it accepts and rejects the same kernels as a GPU, and speed it up.

Three faults are repaired. The interpreter truncates float32 to bfloat16, where every GPU rounds to nearest even. It
drops device-side assertions even where a launch asks for them. It adds up the rows of a tile one after the other, with
an error that grows with their number, where a GPU adds halves to halves.

Three costs are avoided, which took most of its time: preparing all of triton.language for each call of a function
instead of once per launch; creating the types of tiles for each operator; and looking for overflows in launches that
ignore the result.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bits (uint16) of float32 values rounded to bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def sum_of_halves(values: np.ndarray, axis: int) -> np.ndarray:
    """Add up along an axis whose size is a power of two, as a GPU does: half of the numbers to the other half."""
    rows = np.moveaxis(values, axis, 0)
    while len(rows) > 1:
        first, second = np.split(rows, 2)
        rows = first + second
    return rows[0]


def _repair_sums(operations) -> None:
    add_up = operations.sum

    def add_halves(self, input):
        values, axis = input.handle.data, self.axis
        if axis is None or not np.issubdtype(values.dtype, np.floating):
            return add_up(self, input)
        found = sum_of_halves(values, axis)
        return self.to_tensor(np.expand_dims(found, axis) if self.keep_dims else found, input.dtype)

    operations.sum = add_halves


def repair() -> None:
    """Repair the interpreter in this process: exact bfloat16 and sums, assertions in debug launches, less overhead."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    execute, options = interpreter.GridExecutor.__call__, interpreter.interpreter_builder.options

    prepare, prepared = interpreter._patch_lang, set()

    def prepare_once(function):
        modules = tuple(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules in prepared:
            return interpreter._LangPatchScope()
        prepared.add(modules)
        return prepare(function)

    interpreter._patch_lang = prepare_once

    kept = functools.cache(interpreter._get_np_dtype)  # the original builds a table of all dtypes at each call
    pointers = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda kind: pointers if kind.scalar.is_ptr() else kept(kind.scalar)

    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks, shapes = {}, {}

    def block_of(self, element_ty, shape):
        key = str(element_ty), *(getattr(size, "value", size) for size in shape)
        if (made := blocks.get(key)) is None:
            make_block(self, element_ty, shape)
            blocks[key] = self.__dict__
        else:
            self.__dict__.update(made)

    def tensor_of(self, handle, type):
        if (made := shapes.get(sizes := tuple(type.shape) if type.is_block() else ())) is None:
            make_tensor(self, handle, type)
            shapes[sizes] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = made

    tl.block_type.__init__, tl.tensor.__init__ = block_of, tensor_of
    broadcast, cast = TritonSemantic.broadcast_impl_value, TritonSemantic.cast

    def broadcast_others(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def cast_others(self, x, kind, *rest):
        return x if kind is x.dtype else cast(self, x, kind, *rest)

    TritonSemantic.broadcast_impl_value, TritonSemantic.cast = broadcast_others, cast_others

    def with_options(self, *args, **kwargs):
        prepared.clear()
        asked = {name: kwargs[name] for name in ("debug", "sanitize_overflow") if name in kwargs}
        launch = dataclasses.replace(options, **asked)
        heeded = launch.debug and launch.sanitize_overflow  # overflows are reported by assertions, so only in debug
        interpreter.interpreter_builder.options = dataclasses.replace(launch, sanitize_overflow=heeded)
        try:
            return execute(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            raise RuntimeError(str(error)) from error  # torch's type for a failed device-side assertion

    interpreter.GridExecutor.__call__ = with_options

    _repair_sums(interpreter.ReduceOps)
    convert = interpreter._convert_float

    def exact(values, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            return round_to_bfloat16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return values.astype(np.uint32) << np.uint32(16)
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = exact
