"""Several prompts, compressed or reported at the same time, do not affect one another."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.reduce_models import EACH_TYPE, METHODS, Talk
from tests.helpers.turns import OPTIONS, prefilled
from vlmfast.reduce.prompt import takes_features

METHOD = METHODS[0]


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_5"])
@torch.no_grad()
def test_inputs_of_two_prompts_are_compressed_before_the_first_one_runs(model_type: str):
    talk = Talk.of(model_type)
    mine, other = talk.batch((10, 0, 11)), talk.batch((10, 2, 11), (12, 1, 13))
    if not takes_features(type(talk.model.base_model)):
        pytest.skip("this transformers is told at once: each prompt has to run before the next is compressed")

    def steps(short: dict[str, Any]) -> Tensor:
        cache = talk.model(**short, use_cache=True).past_key_values
        return talk.model(input_ids=torch.tensor([[12, 13]]), past_key_values=cache).logits

    want = steps(vlmfast.compress_inputs(talk.model, mine, METHOD))
    # accelerate's hooks rebuild the mapping when they move it to a device.
    moved = pytest.importorskip("accelerate").utils.send_to_device
    short = copy.deepcopy(moved(vlmfast.compress_inputs(talk.model, mine, METHOD), "cpu"))
    vlmfast.compress_inputs(talk.model, other, METHOD)
    talk.model(**other)
    assert torch.equal(steps(short), want)
    with vlmfast.patch(talk.model, reduce=METHOD):
        cache = prefilled(talk, mine)
        assert torch.equal(talk.model(input_ids=torch.tensor([[12, 13]]), past_key_values=cache).logits, want)


@pytest.mark.parametrize("model_type", EACH_TYPE)
@torch.no_grad()
def test_compressed_inputs_are_pickled(model_type: str):
    talk = Talk.of(model_type)
    if not talk.compressible:
        pytest.skip("inputs of this model cannot be shortened beforehand")
    short = vlmfast.compress_inputs(talk.model, talk.batch((10, 0, 11)), METHOD)
    want = talk.model(**short).logits
    file = io.BytesIO()
    torch.save(short, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(short)), torch.load(file, weights_only=False)):
        told = loaded.get("mm_encoder_outputs")
        if not hasattr(told, "rope_deltas"):
            assert torch.equal(talk.model(**loaded).logits, want)
            continue
        assert torch.equal(told.rope_deltas, short["mm_encoder_outputs"].rope_deltas)
        with pytest.warns(UserWarning, match="before generate, set rope_deltas of the base model"):
            assert torch.equal(talk.model(**copy.deepcopy(loaded)).logits, want)


def test_prompts_of_a_copy_are_not_reported():
    talk = Talk.of("llava")
    with vlmfast.patch(talk.model, reduce=METHOD) as patch:
        twin = copy.deepcopy(talk.model)
        twin(**talk.batch((10, 0, 1, 11)))
        assert patch.images == []
        assert "no prompt with images yet" in patch.report()
        talk.model(**talk.batch((10, 0, 11)))
        twin(**talk.batch((10, 0, 1, 11)))
        assert len(patch.images) == 1


@pytest.mark.parametrize("patch_first", [False, True])
def test_a_patch_reports_of_its_own_model(patch_first: bool):
    """Also after its configuration was changed; a copy of patch and model reports of the copied model."""
    talk = Talk.of("llava")
    one, two = talk.batch((10, 0, 11)), talk.batch((10, 0, 1, 11))
    with vlmfast.patch(talk.model, reduce=METHOD) as patch:
        if patch_first:
            twin_patch, twin = copy.deepcopy((patch, talk.model))
        else:
            twin, twin_patch = copy.deepcopy((talk.model, patch))
        talk.model.config = copy.deepcopy(talk.model.config)
        for run in (lambda model, inputs: model(**inputs), lambda model, inputs: model.generate(**inputs, **OPTIONS)):
            run(talk.model, one)
            assert len(patch.images) == 1
            run(twin, two)
            assert (len(patch.images), len(twin_patch.images)) == (1, 2)
            run(talk.model, two)
            run(twin, one)
            assert (len(patch.images), len(twin_patch.images)) == (2, 1)
        loaded = pickle.loads(pickle.dumps(twin_patch))
        assert loaded.report().splitlines()[1:] == twin_patch.report().splitlines()[1:]
        twin_patch.undo()
        assert len(twin_patch.images) == 1


def test_a_masked_image_behind_the_text_changes_nothing():
    """Trainers add such an image to a batch of text, so that every process runs the tower."""
    talk = Talk.of("llava")
    inputs = talk.batch((10, 11, 12, 0), (13, 14), side="right")
    inputs["attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["attention_mask"][0, :3] = inputs["attention_mask"][1, :2] = 1
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        want = talk.model(**inputs, labels=labels).loss
        with vlmfast.patch(talk.model, reduce=METHOD):
            torch.testing.assert_close(talk.model(**inputs, labels=labels).loss, want)
