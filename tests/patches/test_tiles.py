"""The crops of LLaVA-NeXT: packing is bit-equal to upstream's, and the image sizes are read from the device once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.patches_models import tiny
from tests.patches.test_grids import needs
from vlmfast.benchmarks import counting
from vlmfast.patches import tiles

NAMES = ("llava_next", "llava_next_video")
SIZES = {  # (height, width); the tiny models have grids of 1 x 2 and 2 x 1 crops of 4 x 4 patches
    "wide": [(28, 56)],
    "tall": [(56, 28)],
    "padded": [(20, 56), (56, 10)],
    "one crop": [(28, 56), (0, 0)],
    "several": [(28, 56), (17, 33), (40, 31), (3, 50)],
    **{f"drawn {n}": [(random.Random(n).randrange(1, 99), random.Random(-n).randrange(1, 99))] for n in range(1, 6)},
}


def model_of(name: str) -> Any:
    model = tiny(name)[0].model
    needs(model, "pack_tiles")
    return model


def features_of(sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Make the features of an overview and two crops, or of an image that is not cropped."""
    torch.manual_seed(0)
    return [torch.randn(3 if any(size) else 1, 16, 64, dtype=dtype, requires_grad=True) for size in sizes]


def results(model: Any, features: list[Tensor], sizes: Tensor, newline: Tensor | None) -> list[Tensor]:
    """Return the packed images, their lengths, and the gradients of features and newline."""
    packed, lengths = model.pack_image_features(features, sizes, "default", image_newline=newline)
    whole = torch.cat(packed)
    grad = torch.linspace(-1, 1, whole.numel(), dtype=whole.dtype).view_as(whole)
    inputs = features if newline is None else [*features, newline]
    return [*packed, lengths, *torch.autograd.grad(whole, inputs, grad)]


@pytest.mark.parametrize("with_newline", [True, False], ids=["newline", "no newline"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_packed_as_upstream(
    name: str, sizes: list[tuple[int, int]], with_newline: bool, monkeypatch: pytest.MonkeyPatch
):
    model, features, given = model_of(name), features_of(sizes), torch.tensor(sizes)
    newline = torch.randn(64, requires_grad=True) if with_newline else None
    want = results(model, features, given, newline)
    monkeypatch.setattr(tiles, "asks_the_host", lambda _: False)  # take the path of a GPU
    with vlmfast.patch(model, only="*.pack_image_features"):
        got = results(model, features, given, newline)
    assert len(got) == len(want)
    last = [got.pop(), want.pop()] if with_newline else []
    assert all(map(torch.equal, got, want))
    torch.testing.assert_close(*(last or [got, want]))  # the newline's gradient sums over rows in another order


def test_error_of_the_newline_is_no_worse(monkeypatch: pytest.MonkeyPatch):
    """The gradient of the newline is a sum over rows of all images."""
    sizes = SIZES["several"]
    model, given, newline = model_of("llava_next"), torch.tensor(sizes), torch.randn(64)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = newline.to(torch.bfloat16).to(dtype).requires_grad_()
        return results(model, features_of(sizes, dtype), given, leaf)[-1]

    true, theirs = gradient(torch.float64), gradient(torch.bfloat16)
    monkeypatch.setattr(tiles, "asks_the_host", lambda _: False)
    with vlmfast.patch(model, only="*.pack_image_features"):
        mine = gradient(torch.bfloat16)
    assert (mine - true).norm() <= 1.05 * (theirs - true).norm() + torch.finfo(torch.bfloat16).eps / 2 * true.norm()


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_asked_for_once(name: str):
    model, inputs = tiny(name)
    needs(model, "pack_tiles")
    needs(model, "encode_tiles")
    found = {}
    for variant in ("original", "patched"):
        model, inputs = tiny(name)
        counting.move(model)
        on_device = {key: counting.put(value) for key, value in inputs.items()}
        if variant == "patched":
            vlmfast.patch(model)
        with counting.count() as found[variant]:
            model(**on_device)
    assert found["original"].waits.total() > 4
    waits = [
        place for place in found["patched"].waits.elements() if not place.startswith(("masking_utils", "cache_utils"))
    ]
    assert len(waits) == 1
    assert found["patched"].launches.total() < found["original"].launches.total()


def test_features_that_do_not_fit_are_refused_as_upstream_does(monkeypatch: pytest.MonkeyPatch):
    model, sizes = model_of("llava_next"), torch.tensor([[28, 56]])
    wrong = {"patches": torch.randn(3, 15, 64), "crops": torch.randn(4, 16, 64)}
    for name, features in wrong.items():
        with pytest.raises(RuntimeError):
            model.pack_image_features([features], sizes, "default")
        with vlmfast.patch(model, only="*.pack_image_features"), monkeypatch.context() as context:
            context.setattr(tiles, "asks_the_host", lambda _: False)
            with pytest.raises(RuntimeError):
                model.pack_image_features([features], sizes, "default")
        assert name
