"""Kernels of other projects that compute what an op of ours does, timed where they are installed.

A peer is prepared from the op's arguments like those in `Cases.peers`, in its fastest documented way of being called,
and imports its package there: what an import or a call raises becomes a row of the table. All of them are forward only.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmfast.cases import Preparation
from vlmfast.registry import Op

Call = Callable[[], Any]


def _norms(prepare: Preparation) -> dict[str, Preparation]:
    """Return the preparations of both norms, from one that takes a residual or None."""
    return {"rms_norm": lambda x, *rest: prepare(x, None, *rest), "add_rms_norm": prepare}


def _liger(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, variant: str = "llama") -> Call:
    from liger_kernel.ops import fused_add_rms_norm, rms_norm

    rest = weight, eps, float(variant == "gemma"), variant, False
    if residual is None:
        return functools.partial(rms_norm.LigerRMSNormFunction.apply, x, *rest)
    return functools.partial(fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply, x, residual, *rest)


def _quack(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, variant: str = "llama") -> Call:
    from quack.rmsnorm import rmsnorm

    norm = functools.partial(rmsnorm, x, weight, eps=eps, weight_offset=float(variant == "gemma"))
    return norm if residual is None else functools.partial(norm, residual=residual, prenorm=True)


def _flashinfer(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, variant: str = "llama") -> Call:
    from flashinfer.norm import fused_add_rmsnorm, rmsnorm

    if variant != "llama":
        raise ValueError(f"flashinfer has no call for the variant {variant} here")
    if residual is None:
        return functools.partial(rmsnorm, x, weight, eps)

    def run() -> tuple[Tensor, Tensor]:
        y, hidden = x.clone(), residual.clone()  # it writes over both; a call that keeps them copies them first
        fused_add_rmsnorm(y, hidden, weight, eps)
        return y, hidden

    return run


# Project -> (the package to import, op -> preparation).
PROJECTS: dict[str, tuple[str, dict[str, Preparation]]] = {
    "liger": ("liger_kernel", _norms(_liger)),
    "quack": ("quack", _norms(_quack)),
    "flashinfer": ("flashinfer", _norms(_flashinfer)),
}
# transformers: the module that the op replaces. torch: other ways that the op's table lists, such as F.rms_norm.
KINDS = ("transformers", "torch", "compile", *PROJECTS)


def installed() -> tuple[str, ...]:
    """Return the kinds of peers that can be asked for here."""
    return tuple(k for k in KINDS if k not in PROJECTS or importlib.util.find_spec(PROJECTS[k][0]) is not None)


def of(op: Op, kinds: tuple[str, ...]) -> Iterator[tuple[str, Preparation]]:
    """Yield name and preparation of each peer of the op among the kinds."""
    if "transformers" in kinds and op.cases.upstream is not None:
        yield "transformers", op.cases.upstream
    if "torch" in kinds:
        yield from op.cases.peers.items()
    if "compile" in kinds:
        yield "torch.compile", lambda *args: _compiled(op, args)
    for project, (_, ops) in PROJECTS.items():
        if project in kinds and op.name in ops:
            yield project, ops[op.name]


def _compiled(op: Op, args: tuple[Any, ...]) -> Call:
    torch._dynamo.reset()
    return functools.partial(torch.compile(op.reference, dynamic=False), *args)


def functional_rms_norm(device: str) -> str:
    """Name the implementation of `F.rms_norm`: torch may replace its own by a vendored quack."""
    if device == "cpu" or os.environ.get("TORCH_DISABLE_NATIVE_JIT") == "1":
        return "ATen"
    try:
        from torch._native import cutedsl_utils

        active = cutedsl_utils.runtime_available() and cutedsl_utils._version_is_ok()
    except (ImportError, AttributeError):  # a torch that has no such override, or a later one that keeps it elsewhere
        return "ATen, as far as this torch tells"
    return "torch's native JIT override" if active else "ATen (torch's native JIT override is inactive)"
