"""A reduction waits for the device twice: for the number of placeholders and for the length of the short prompt."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import vlmfast
from tests.helpers import qwen_models, video_models
from tests.helpers.patches_models import tiny
from tests.helpers.thorough import first_of
from vlmfast.benchmarks import counting

EVEN, ZIP = vlmfast.EvenTokens(0.5), vlmfast.VisionZip(dominant=2, contextual=1)
GREEDY = (vlmfast.DivPrune(0.5), vlmfast.DivPrune(0.5, centered=True), vlmfast.SCOPE(0.5), vlmfast.SCOPE(0.5, 2.0))
OF_VIDEOS = vlmfast.EVS(0.4), vlmfast.VCAST(0.3), vlmfast.FlashVID(0.3)
EACH = [
    (name, method)
    for name in ("llava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    for method in (EVEN, ZIP, *(GREEDY if name in ("llava", "qwen2_5_vl") else ()))
]
EACH += [(f"{name} video", method) for name in ("qwen2_5_vl", "qwen3_vl") for method in OF_VIDEOS]


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """Build a tiny model and a prompt; that of Qwen-VL has images of two sizes, or videos."""
    if name.endswith("video"):
        model = qwen_models.model_of(name.removesuffix(" video"))
        return model, video_models.inputs_of(model, (10, video_models.LONG, video_models.TALL, 11))
    if name.startswith("qwen"):
        model = qwen_models.model_of(name)
        return model, qwen_models.inputs_of(model, ((1, 8, 12), (1, 6, 14)))
    model, inputs = tiny(name)
    if not hasattr(model, "_prepare_position_ids_for_generation"):
        pytest.skip("visual tokens are reduced from transformers 5.17 on")
    return model, inputs


@pytest.mark.filterwarnings("ignore:.* is not patched")
@pytest.mark.parametrize("masked", first_of([True, False]), ids=["mask", "no mask"])
@pytest.mark.parametrize(("name", "method"), [*EACH, ("llava_next", ZIP)])  # other methods leave crops of several sizes
def test_reduction_waits_twice(name: str, method: vlmfast.reduce.Method, masked: bool):
    found: dict[str, Counter[str]] = {}
    for variant, arguments in (("patched", {}), ("reduced", {"reduce": method})):
        model, inputs = built(name)
        if not masked:
            del inputs["attention_mask"]
        counting.move(model)
        vlmfast.patch(model, **arguments)
        on_device = {key: counting.put(value) for key, value in inputs.items()}
        with counting.count() as count:
            model(**on_device)
        found[variant] = Counter(
            {place: n for place, n in count.waits.items() if not place.startswith(("masking_utils", "cache_utils"))}
        )
    more = found["reduced"] - found["patched"]
    assert sum(more.values()) == 2, more


def test_padding_is_known_without_asking():
    """Also after prompts were concatenated, and for a selection of samples."""
    from tests.reduce.test_columns import image
    from vlmfast.reduce.columns import Columns, drop_columns

    mask = torch.ones(2, 4, dtype=torch.bool)
    is_image = torch.tensor([[False, True, True, False]] * 2)
    even = drop_columns(mask, (is_image, [image([0], 2), image([1], 2)]))
    uneven = drop_columns(mask, (is_image, [image([0], 2), image([0, 1], 2)]))
    for columns, padded in ((even, False), (uneven, True), (even.then(even), False), (even.then(uneven), True)):
        assert columns.padded == padded == (not columns.valid.all())
        assert columns.select([0, 1]).padded == padded
    assert not Columns.all(mask).padded
