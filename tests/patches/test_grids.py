"""Values that depend only on image sizes: bit-equal to upstream's, with a single wait for the device."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers import qwen_models
from tests.helpers import tiny_models as parts
from tests.helpers.patches_models import tiny
from vlmfast.benchmarks import counting
from vlmfast.patches import grids
from vlmfast.patches.plan import find_sites

TOWERS = (*qwen_models.NAMES, "qwen2_5_omni", "qwen3_omni_moe")
EACH = {
    "an image": [(1, 8, 12)],
    "windows": [(1, 16, 16)],
    "odd": [(1, 6, 14), (1, 10, 6), (1, 2, 2)],
    "alike": [(1, 6, 14), (1, 6, 14)],
    "a video": [(3, 4, 6)],
    "videos and images": [(2, 6, 10), (1, 6, 10), (4, 2, 6)],
    **{
        f"drawn {n}": [
            tuple(itertools.starmap(random.Random(f"{n} {i}").randrange, [(1, 4), (2, 20, 2), (2, 20, 2)]))
            for i in range(1 + n)
        ]
        for n in range(4)
    },
}


def tower_of(name: str) -> Any:
    model = tiny(name)[0]
    owner = getattr(model, "model", model)
    return getattr(owner, "visual", None) or model.visual


def needs(site_of: Any, function: str) -> None:
    """Skip the test where this transformers has another body."""
    named = {site.body.function.__name__ for site in find_sites(site_of) if site.body and site.body.function}
    if function not in named:
        pytest.skip("its body is another one in this transformers")


def leaves(output: Any) -> list[Tensor]:
    """Return the tensors in the output of a tower."""
    values = [output] if isinstance(output, Tensor) else output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for value in values for leaf in ([value] if isinstance(value, Tensor) else leaves(value))]


@torch.no_grad()
@pytest.mark.parametrize("sizes", EACH.values(), ids=EACH)
@pytest.mark.parametrize("name", TOWERS)
def test_tower_sees_what_upstream_computes(name: str, sizes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch):
    tower = tower_of(name)
    needs(tower, "encode")
    grid, pixels = torch.tensor(sizes), parts.pixels(sum(map(math.prod, sizes)), 3 * 2 * 4 * 4)
    told: list[set[str]] = []
    tower.blocks[0].register_forward_pre_hook(lambda _, args, given: told.append(set(given)), with_kwargs=True)
    want = leaves(tower(pixels, grid))
    computed: list[dict[str, Any]] = []
    of_grid = grids._of_grid

    def watched(*args: Any) -> dict[str, Any]:
        computed.append(of_grid(*args))
        return computed[-1]

    monkeypatch.setattr(grids, "_is_on_one_device", lambda *_: True)  # take the path of a GPU
    monkeypatch.setattr(grids, "_of_grid", watched)
    with vlmfast.patch(tower, only="*.forward", exclude="*Merger*"), vlmfast.use("torch"):
        got = leaves(tower(pixels, grid))
        assert len(computed) == 1
    assert told[0] == told[1], "the blocks are given what upstream gives them"
    assert len(got) == len(want) >= 2
    assert all(map(torch.equal, got, want))


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_what_the_caller_has_computed_is_taken(name: str, monkeypatch: pytest.MonkeyPatch):
    tower = tower_of(name)
    needs(tower, "encode")
    grid, pixels = torch.tensor([[1, 4, 8]]), parts.pixels(32, 3 * 2 * 4 * 4)
    given = {"cu_seqlens": torch.tensor([0, 8, 32], dtype=torch.int32)}
    want = leaves(tower(pixels, grid, **given))
    monkeypatch.setattr(grids, "_is_on_one_device", lambda *_: True)
    with vlmfast.patch(tower, only="*.forward", exclude="*Merger*"), vlmfast.use("torch"):
        assert all(map(torch.equal, leaves(tower(pixels, grid, **given)), want))
        assert not torch.equal(leaves(tower(pixels, grid))[0], want[0])


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_on_two_devices_computes_as_upstream_does(name: str):
    tower = tower_of(name).to("meta")
    needs(tower, "encode")
    pixels = torch.empty(4, 8, device="meta")
    assert grids._is_on_one_device(tower, pixels)
    for block in (tower.patch_embed, tower.blocks[-1], tower.merger):
        block.to_empty(device="cpu")
        assert not grids._is_on_one_device(tower, pixels)
        block.to("meta")


# ---- waits ----


def counted(name: str, *rows: tuple[Any, ...], video: Any = None) -> dict[str, counting.Count]:
    """Count launches and waits of a prefill, unpatched and patched."""
    found = {}
    for variant in ("original", "patched"):
        model = qwen_models.model_of(name)
        inputs = qwen_models.inputs_of(model, *rows, video=video)
        counting.move(model)
        on_device = {key: counting.put(value) for key, value in inputs.items()}
        if variant == "patched":
            vlmfast.patch(model)
        with counting.count() as found[variant]:
            model(**on_device)
    return found


@pytest.mark.filterwarnings("ignore:.* is not patched")
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_prefill_waits_for_few_values(name: str):
    needs(qwen_models.model_of(name), "encode")
    found = counted(name, ((1, 8, 12), (1, 6, 14)), ((1, 10, 6),))
    assert found["original"].waits.total() > 12
    # Every model of upstream reads the padding mask, with or without images.
    waits = [place for place in found["patched"].waits.elements() if not place.startswith("masking_utils")]
    assert len(waits) <= 3, "the sizes of the images, the number of tokens of each, and what positions are made of"
    assert found["patched"].launches.total() < found["original"].launches.total()


# ---- positions ----


def drawn(seed: int) -> list[tuple[tuple[int, int, int], ...]]:
    """Draw the image grids of one to three prompts, which are padded on the left."""
    draw = random.Random(seed)
    return [
        tuple((1, draw.randrange(2, 16, 2), draw.randrange(2, 16, 2)) for _ in range(draw.randrange(4)))
        for _ in range(draw.randrange(1, 4))
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", qwen_models.NAMES)
def test_positions_are_those_of_upstream(name: str, seed: int):
    """For images that are not square, videos, and several prompts with padding on the left."""
    model = qwen_models.model_of(name).model
    needs(model, "index_timed_positions" if name == "qwen2_5_vl" else "index_positions")
    video = (1 + seed % 3, 2 * (1 + seed % 4), 6) if seed % 2 else None
    inputs = qwen_models.inputs_of(qwen_models.model_of(name), *drawn(seed), video=video)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    given = {key: inputs[key] for key in names if key in inputs}
    if video is not None and name == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([1.5])
    if seed == 3:
        del given["attention_mask"]
    want = model.get_rope_index(**given)
    on_device = {key: counting.put(value) for key, value in given.items()}
    with vlmfast.patch(model, only="*.get_rope_index"), counting.count() as found:
        got = model.get_rope_index(**on_device)
        again = model.get_rope_index(**on_device)
    for mine, second, theirs in zip(got, again, want, strict=True):
        assert counting.is_put(mine)
        assert torch.equal(counting.values(mine), theirs)
        assert torch.equal(counting.values(second), theirs)
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
    kinds = sum(key.endswith("grid_thw") for key in given)
    assert found.waits.total() == kinds + 2, "the sizes once, the rest at each call"


def test_sizes_that_were_changed_are_asked_for_again():
    model = qwen_models.model_of("qwen3_vl").model
    needs(model, "index_positions")
    inputs = qwen_models.inputs_of(qwen_models.model_of("qwen3_vl"), ((1, 8, 12),))
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    on_device = {key: counting.put(inputs[key].clone()) for key in names}
    others = counting.put(torch.tensor([[1, 12, 8]]))
    with vlmfast.patch(model, only="*.get_rope_index"), counting.count():
        model.get_rope_index(**on_device)
        on_device["image_grid_thw"].copy_(others)
        got = model.get_rope_index(**on_device)[0]
    want = model.get_rope_index(**{**{key: inputs[key] for key in names}, "image_grid_thw": torch.tensor([[1, 12, 8]])})
    assert torch.equal(counting.values(got), want[0])
