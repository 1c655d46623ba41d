"""A `Patch` after it was pickled, copied, or followed by another patch."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import vlmfast
from tests.helpers.patches_models import logits, patched, replaceable, tiny

# ---- the patch itself ----


def test_a_loaded_patch_says_that_it_is_undone():
    model, inputs = tiny("llama")
    patch = vlmfast.patch(model)
    told = pickle.dumps(patch)
    assert len(told) < 4096, "without the model"
    loaded = pickle.loads(told)
    assert repr(loaded) == "<Patch of llama: undone, 4 sites>"
    assert loaded.report().splitlines()[1:] == patch.report().splitlines()[1:]
    loaded.undo()
    assert patched(model)
    file = io.BytesIO()
    torch.save({"model": model, "patch": patch}, file)
    file.seek(0)
    both = torch.load(file, weights_only=False)
    assert not patched(both["model"])
    assert "undone" in repr(both["patch"])
    patch.undo()
    assert torch.equal(logits(both["model"], inputs), logits(model, inputs))


def test_copies_of_a_patch():
    model, _ = tiny("llama")
    patch = vlmfast.patch(model)
    twin, twin_patch = copy.deepcopy((model, patch))
    assert repr(twin_patch) == repr(patch)
    twin_patch.undo()
    assert not patched(twin)
    assert patched(model)
    handle = copy.copy(patch)
    handle.undo()
    assert not patched(model)
    assert repr(patch) == repr(handle) == "<Patch of llama: undone, 4 sites>"
    patch.undo()


def test_an_earlier_patch_leaves_a_later_one_alone():
    model, _ = tiny("llama")
    first = vlmfast.patch(model)
    vlmfast.unpatch(model)
    assert "undone" in repr(first)
    second = vlmfast.patch(model)
    first.undo()
    assert repr(second) == f"<Patch of llama: {len(replaceable(model))} modules, 4 sites>"
    second.undo()
    assert not patched(model)


def test_unpatch_refuses_a_class_changed_since():
    model, _ = tiny("llama")
    vlmfast.patch(model)
    module = model.model.norm
    module.__class__ = type("FSDPLlamaRMSNorm", (type(module),), {})
    with pytest.raises(RuntimeError, match=r"given another class after the patch \(FSDPLlamaRMSNorm\)"):
        vlmfast.unpatch(model)
    assert len(patched(model)) == len(replaceable(model)), "all or nothing"
