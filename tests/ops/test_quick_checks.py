"""The quick path of a check passes good calls on one device only, and says truly that they are on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.ops.rms_norm import definition as norms
from vlmfast.ops.rope import definition as rope
from vlmfast.ops.silu_mul import definition as gates
from vlmfast.registry import OPS

QUICK = ("rms_norm", "add_rms_norm", "silu_mul", "qk_norm_rope")
Make = Callable[..., Tensor]


def arguments(op: str, make: Make = torch.randn) -> list[Any]:
    """Return the arguments of a call for one token: its tensors first."""
    row, rows = make(1, 1, 64), make(1, 1, 64)
    angles = make(1, 1, 16)
    return {
        "rms_norm": [row, make(64), 1e-6, "llama"],
        "add_rms_norm": [row, rows, make(64), 1e-6, "llama"],
        "silu_mul": [row, rows, "silu"],
        "qk_norm_rope": [
            make(1, 1, 4, 16),
            make(1, 1, 2, 16),
            make(16),
            make(16),
            angles,
            make(1, 1, 16),
            1e-6,
            "llama",
        ],
    }[op]


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cpu, is_cuda, index = False, True, 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    __torch_function__ = torch._C._disabled_torch_function_impl


def on_gpu(*shape: int, index: int = 0) -> Tensor:
    found = torch.randn(shape).as_subclass(OnGpu)
    found.index = index
    return found


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the arguments that are checked one by one; tensors of `OnGpu` count as plain."""
    names: list[str] = []
    check = checks.tensor

    def watched(name: str, *rest: Any, **more: Any) -> None:
        names.append(name)
        check(name, *rest, **more)

    monkeypatch.setattr(checks, "tensor", watched)
    for module in (norms, rope, gates):
        monkeypatch.setattr(module, "PLAIN", (*module.PLAIN, OnGpu))
    return names


@pytest.mark.parametrize("make", [torch.randn, on_gpu], ids=["cpu", "cuda"])
@pytest.mark.parametrize("op", QUICK)
def test_good_calls_are_quick(op: str, make: Make, slow: list[str]):
    found = OPS[op].check(*arguments(op, make))
    assert found is (make is torch.randn)
    assert not slow


@pytest.mark.parametrize("place", ["another GPU", "the CPU", "a GPU"])
@pytest.mark.parametrize("op", QUICK)
def test_each_tensor_elsewhere_is_refused(op: str, place: str, slow: list[str]):
    good = arguments(op, torch.randn if place == "a GPU" else on_gpu)
    for at in [at for at, value in enumerate(good) if isinstance(value, Tensor)]:
        bad = list(good)
        bad[at] = on_gpu(*good[at].shape, index=1) if "GPU" in place else torch.randn(good[at].shape)
        with pytest.raises(ValueError, match="must be on the device of"):
            OPS[op].check(*bad)


@pytest.mark.parametrize("op", QUICK)
def test_what_it_says_is_on_the_cpu_is_taken(op: str):
    """Each tensor of another dtype, or of a class of its own, makes the backends look at the call."""

    class Marked(Tensor):
        pass

    native, good = OPS[op].backend("native"), arguments(op)
    if native.absent:
        pytest.skip(native.absent)
    assert OPS[op].check(*good) is True
    assert native.takes_cpu
    assert native.unsupported(*good) is None
    for at in [at for at, value in enumerate(good) if isinstance(value, Tensor)]:
        for other in (good[at].half(), good[at].as_subclass(Marked)):
            call = [*good[:at], other, *good[at + 1 :]]
            with contextlib.suppress(TypeError):  # some of these dtypes are refused
                assert OPS[op].check(*call) is False
