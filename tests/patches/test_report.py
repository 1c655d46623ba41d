"""`Patch.report` says what the model runs now: replacements by others, before or after the patch, and new modules."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers.patches_models import logits, patched, rms_norms, tiny

LLAMA = "llama.LlamaRMSNorm.forward"
ATTENTION = "llama.LlamaAttention.forward"


@pytest.fixture(autouse=True)
def on_the_definition() -> Iterator[None]:
    with vlmfast.use("torch"):
        yield


def rows(patch: vlmfast.Patch) -> dict[str, str]:
    """Map each site to its text in the report."""
    return {site: " ".join(text) for site, *text in map(str.split, patch.report().splitlines()[1:])}


def other_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return hidden_states


class LigerRMSNorm(nn.Module):
    """A norm whose function is in another package, so that its body cannot be read."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(hidden_states, self.weight)  # noqa: F821


# ---- replaced after the patch ----


def on_instances(model: nn.Module, norms: list[nn.Module]) -> None:
    """Replace the forward on the instances, as kernelize and Liger do."""
    for norm in norms:
        norm.forward = MethodType(other_forward, norm)


def in_the_class(model: nn.Module, norms: list[nn.Module]) -> None:
    for norm in norms:
        type(norm).forward = other_forward


def by_a_subclass(model: nn.Module, norms: list[nn.Module]) -> None:
    for norm in norms:
        norm.__class__ = type("Fast", (type(norm),), {"forward": other_forward})


def with_hooks_that_call_another(model: nn.Module, norms: list[nn.Module]) -> None:
    """Wrap another forward on the instances, as accelerate's hooks do where it was replaced before."""
    for norm in norms:
        norm.forward, norm._old_forward, norm._hf_hook = MethodType(other_forward, norm), other_forward, object()


@pytest.mark.parametrize(
    "replace", [on_instances, in_the_class, by_a_subclass, with_hooks_that_call_another], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("number", [1, 5])
def test_replaced_again_is_not_counted(replace: Callable, number: int):
    model, _ = tiny("llava")
    patch = vlmfast.patch(model)
    total = len(rms_norms(model))
    assert rows(patch)[LLAMA] == f"{total} modules"
    if replace is in_the_class:  # all norms share the class
        number = total
    replace(model, rms_norms(model)[:number])
    left = total - number
    expected = f"{left} module{'' if left == 1 else 's'}; {number} not: replaced again or new since the patch"
    assert rows(patch)[LLAMA] == expected
    assert patch.replaced[LLAMA] == total


def test_what_only_wraps_the_replacement_is_counted():
    accelerate = pytest.importorskip("accelerate")
    model, _ = tiny("llava")
    patch = vlmfast.patch(model)
    before = rows(patch)
    layers = before.pop("llama.LlamaDecoderLayer.forward")
    for norm in rms_norms(model):
        accelerate.hooks.add_hook_to_module(norm, accelerate.hooks.ModelHook())
    rms_norms(model)[0].__class__ = type("FSDPLlamaRMSNorm", (type(rms_norms(model)[0]),), {})
    after = rows(patch)
    assert after.pop("llama.LlamaDecoderLayer.forward").startswith(f"{layers}; additions apart from their norm: ")
    assert after == before


def test_modules_that_come_and_go():
    model, _ = tiny("llama")
    patch = vlmfast.patch(model)
    total = len(rms_norms(model))
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))  # adds two patched norms
    assert rows(patch)[LLAMA] == f"{total + 2} modules"
    model.model.layers.append(tiny("llama")[0].model.layers[0])  # adds two norms that are not patched
    assert rows(patch)[LLAMA] == f"{total + 2} modules; 2 not: replaced again or new since the patch"
    model.model.norm = LigerRMSNorm()
    model.model.layers = model.model.layers[:-1]
    told = rows(patch)
    assert told.pop(LLAMA) == f"{total + 1} modules"
    assert told.pop(ATTENTION) == "3 modules"
    (name, text), *more = ((site, text) for site, text in told.items() if not site.startswith("llama."))
    assert name == f"{__name__}.LigerRMSNorm.forward"
    assert text.startswith("skipped: its body is not one")
    assert not more
    model.model.norm = rms_norms(tiny("qwen2_vl")[0])[0]
    ((name, text),) = ((name, text) for name, text in rows(patch).items() if not name.startswith("llama."))
    assert (name.rpartition(".")[2], text) == ("forward", "skipped: it came after the patch")


def test_an_undone_patch_reports_what_it_had_replaced():
    model, inputs = tiny("llama")
    with vlmfast.patch(model) as patch:
        logits(model, inputs)
        before = rows(patch)
    assert rows(patch) == before
    assert "undone" in patch.report()


def test_taken_out_behind_its_back():
    model, _ = tiny("llama")
    patch = vlmfast.patch(model)
    before = rows(patch)
    vlmfast.unpatch(model)
    assert "undone" in patch.report()
    assert rows(patch) == before


@pytest.mark.filterwarnings("error:.* is not patched")
def test_of_a_project_alone():
    """The report of a project's patch does not list the other methods of the model."""

    class ModalityProjector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale_factor, self.proj, self.norm = 2, nn.Linear(4, 4), rms_norms(tiny("llama")[0])[0]

        def pixel_shuffle(self, x: Tensor) -> Tensor:
            bsz, seq, embed_dim = x.size()
            x = x.view(bsz, int(seq**0.5), self.scale_factor, embed_dim).permute(0, 1, 2, 3).contiguous()
            return x.reshape(bsz, seq, embed_dim)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.pixel_shuffle(x))

    patch = vlmfast.compat.nanovlm.patch(ModalityProjector())
    assert set(rows(patch)) == {"ModalityProjector.forward", "ModalityProjector.pixel_shuffle"}


# ---- replaced before the patch ----


class Silent(nn.Module):
    """A norm by its body, but not by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (4,), self.weight)


class Holding(nn.Module):
    """Calls a norm that it holds; that norm is reported as its own site."""

    def __init__(self) -> None:
        super().__init__()
        self.rms_norm = rms_norms(tiny("llama")[0])[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.rms_norm(x)


PartialRMSNorm = type("PartialRMSNorm", (nn.Module,), {"forward": functools.partial(other_forward)})


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (LigerRMSNorm, "its body is not one that this version of vlmfast was written for"),
        (Silent, "its body is not one that this version of vlmfast was written for"),
        (PartialRMSNorm, "it is not the code of a model, but functools.partial"),
        (functools.partial(nn.RMSNorm, 4), "it is not the code of a model, but torch.nn.modules.normalization.RMSNorm"),
    ],
    ids=["Liger", "function", "partial", "torch"],
)
def test_norms_that_nothing_covers_are_named(norm: Callable[[], nn.Module], reason: str):
    model, _ = tiny("llama")
    model.model.norm = norm()
    with pytest.warns(UserWarning, match=f"is not patched: {reason}"):
        patch = vlmfast.patch(model)
    assert model.model.norm not in patched(model)
    (text,) = (text for site, text in rows(patch).items() if not site.startswith("llama."))
    assert text.startswith(f"skipped: {reason}")


@pytest.mark.parametrize("forward", [LigerRMSNorm.forward, functools.partial(other_forward)], ids=["Liger", "partial"])
def test_norms_replaced_at_class_level_are_named(forward: Callable, monkeypatch: pytest.MonkeyPatch):
    model, _ = tiny("llava")
    monkeypatch.setattr(type(rms_norms(model)[0]), "forward", forward)
    with pytest.warns(UserWarning, match=f"{LLAMA} is not patched: it"):
        patch = vlmfast.patch(model)
    assert rows(patch)[LLAMA].startswith("skipped: it")
    assert not set(rms_norms(model)) & set(patched(model))


def test_what_only_holds_a_norm_is_not_one():
    patch = vlmfast.patch(nn.ModuleList([Holding()]))
    assert list(rows(patch)) == [LLAMA]
