"""Repairs of Triton's interpreter, without which a kernel that is right on a GPU fails here, or a wrong one passes.

It truncates float32 to bfloat16, where every GPU rounds to nearest even, and it drops device-side assertions, also
where a launch asks for them. What took most of its time is left out: preparing all of triton.language for each call of
a function, where once per launch will do, and looking for overflows in launches that drop what is found.
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


def repair() -> None:
    """Convert to and from bfloat16 exactly, heed the debug mode of a launch, and be quicker, in this process."""
    import triton.language as tl
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

    kept = functools.cache(interpreter._get_np_dtype)  # which makes a table of all dtypes for each question
    pointers = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda kind: pointers if kind.scalar.is_ptr() else kept(kind.scalar)

    def with_options(self, *args, **kwargs):
        prepared.clear()
        asked = {name: kwargs[name] for name in ("debug", "sanitize_overflow") if name in kwargs}
        launch = dataclasses.replace(options, **asked)
        heeded = launch.debug and launch.sanitize_overflow  # an overflow is an assertion, and dropped without debug
        interpreter.interpreter_builder.options = dataclasses.replace(launch, sanitize_overflow=heeded)
        try:
            return execute(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            raise RuntimeError(str(error)) from error  # what torch raises where an assertion on a device fails

    interpreter.GridExecutor.__call__ = with_options

    convert = interpreter._convert_float

    def exact(values, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            return round_to_bfloat16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return values.astype(np.uint32) << np.uint32(16)
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = exact
