"""Peers, which compute the same as an op: modules of transformers, functions of torch, and other projects."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlmfast.cases import Preparation
from vlmfast.registry import Op

Call = Callable[[], Any]


# Project -> name of the package to import.
PROJECTS = {"liger": "liger_kernel", "quack": "quack", "flashinfer": "flashinfer"}
# "transformers" is the module that the op replaces; "torch" the other peers of the op's cases, such as F.rms_norm.
KINDS = ("transformers", "torch", "compile", *PROJECTS)


def installed() -> tuple[str, ...]:
    """Return the kinds of peers that are available in this environment."""
    return tuple(k for k in KINDS if k not in PROJECTS or importlib.util.find_spec(PROJECTS[k]) is not None)


def of(op: Op, kinds: tuple[str, ...]) -> Iterator[tuple[str, Preparation]]:
    """Yield name and preparation of each peer of the op that is of one of the kinds."""
    if "transformers" in kinds and op.cases.upstream is not None:
        yield "transformers", op.cases.upstream
    if "torch" in kinds:
        yield from op.cases.peers.items()
    if "compile" in kinds:
        yield "torch.compile", lambda *args: _compiled(op, args)
    for project, prepare in op.cases.projects.items():
        if project in kinds:
            yield project, prepare


def _compiled(op: Op, args: tuple[Any, ...]) -> Call:
    torch._dynamo.reset()
    return functools.partial(torch.compile(op.reference, dynamic=False), *args)


def functional_rms_norm(device: str) -> str:
    """Name the implementation behind `F.rms_norm`: torch may replace its own by a vendored copy of quack."""
    if device == "cpu" or os.environ.get("TORCH_DISABLE_NATIVE_JIT") == "1":
        return "ATen"
    try:
        from torch._native import cutedsl_utils

        active = cutedsl_utils.runtime_available() and cutedsl_utils._version_is_ok()
    except (ImportError, AttributeError):  # this torch has no such override, or keeps it elsewhere
        return "ATen, as far as this torch tells"
    return "torch's native JIT override" if active else "ATen (torch's native JIT override is inactive)"
