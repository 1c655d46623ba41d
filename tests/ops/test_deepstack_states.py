"""Hidden states that a model records under `vlmfast.deepstack` equal those of DeepStack's own code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import vlmfast
from tests.helpers import tiny_models as tiny

PROMPT = torch.tensor([[1, 3, 3, 9, 3, 8], [0, 0, 3, 7, 3, 3]])
LAYERS = 5
Built = tuple[nn.Module, Sequence[nn.Module], dict[str, Tensor], Tensor]


def llama() -> Built:
    model = tiny.model("llama", **tiny.text(num_hidden_layers=LAYERS))
    return model, model.model.layers, {"input_ids": PROMPT}, PROMPT == tiny.IMAGE


def clip() -> Built:
    model = CLIPVisionModel(CLIPVisionConfig(**tiny.vision(num_hidden_layers=LAYERS))).eval()
    positions = torch.ones(1, 17, dtype=torch.bool)
    positions[:, 0] = False
    layers = getattr(model, "vision_model", model).encoder.layers  # one module less in transformers 5.23
    return model, layers, {"pixel_values": torch.randn(1, 3, 28, 28)}, positions


@contextlib.contextmanager
def of_the_paper(layers: Sequence[nn.Module], levels: Tensor, positions: Tensor, start: int) -> Iterator[None]:
    """Add in place, as both classes of DeepStack-VL do, so that states recorded before include the level."""

    def adding(level: Tensor):
        def hook(layer: nn.Module, args: tuple) -> None:
            args[0][positions] += level

        return hook

    handles = [layers[start + k].register_forward_pre_hook(adding(level)) for k, level in enumerate(levels)]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="records without hooks")
@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("recorded_before", [False, True], ids=["", "recorded before"])
@pytest.mark.parametrize("build", [llama, clip])
@torch.no_grad()
def test_recorded_hidden_states(build, recorded_before: bool, start: int):
    """Also where the model registered its own hooks first."""
    model, layers, inputs, positions = build()
    levels = torch.randn(2, int(positions.sum()), model.config.hidden_size)

    def states() -> tuple[Tensor, ...]:
        return model(**inputs, output_hidden_states=True).hidden_states

    plain = states() if recorded_before else None
    with vlmfast.deepstack(layers, levels, positions, start=start):
        got = states()
    with of_the_paper(layers, levels, positions, start):
        want = states()
    assert [len(got), len(want)] == [LAYERS + 1] * 2
    for number, (state, expected) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(state, expected), number
    assert not torch.equal(got[start], (plain or states())[start])
