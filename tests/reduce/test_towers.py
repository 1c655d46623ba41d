"""The scores and the metric of a tower, against its own attention maps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers.patches_models import tiny
from tests.helpers.reduce_models import Talk
from vlmfast.reduce.methods import EvenTokens, VisionZip
from vlmfast.reduce.towers import encode, has_cls, recorded

TOWERS = {"llava": True, "vipllava": True, "llava_onevision": False, "internvl": True}


def tower_of(model_type: str) -> tuple[nn.Module, Tensor, list[int]]:
    model, inputs = tiny(model_type)
    layer = getattr(model.config, "vision_feature_layer", None) or model.config.vision_feature_layers
    pixels = inputs["pixel_values"].reshape(-1, *inputs["pixel_values"].shape[-3:])
    return model.model.vision_tower, pixels, [layer] if isinstance(layer, int) else list(layer)


@pytest.mark.parametrize("model_type", TOWERS)
def test_scores_and_metric_are_those_of_the_layer(model_type: str):
    tower, pixels, layers = tower_of(model_type)
    got = encode(tower, pixels, layers)
    assert not any(module._forward_hooks for name, module in tower.named_modules() if name.endswith(("proj", "norm")))
    tower.set_attn_implementation("eager")
    want = tower(pixels, output_attentions=True, output_hidden_states=True)
    states = len(want.hidden_states)
    number = max(layer % states for layer in layers) - 1
    maps = [want.attentions[index] for index in range(states - 1)]
    scores = [weights[:, :, 0, 1:].sum(1) if TOWERS[model_type] else weights.mean(1).sum(1) for weights in maps]
    torch.testing.assert_close(got.scores(), scores[number], rtol=1e-4, atol=1e-5)
    assert (got.scores() - scores[number - 1]).abs().max() > 1e-3, "another layer would do as well"
    hidden = torch.cat([want.hidden_states[layer] for layer in layers], -1)
    torch.testing.assert_close(got.hidden, hidden, rtol=1e-4, atol=1e-4)
    assert got.has_cls == has_cls(tower) == TOWERS[model_type]
    layer = next(child for child in tower.encoder.children() if isinstance(child, nn.ModuleList))[number]
    attention = getattr(layer, "self_attn", None) or layer.attention
    inputs: list[Tensor] = []
    (getattr(attention, "k_norm", None) or attention.k_proj).register_forward_hook(
        lambda _, args, output: inputs.append(output)
    )
    tower(pixels)
    heads = inputs[0].unflatten(-1, (attention.num_heads, -1)).mean(2)[:, int(TOWERS[model_type]) :]
    torch.testing.assert_close(got.metric(), heads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", TOWERS)
def test_images_of_a_batch_are_apart(model_type: str):
    tower, pixels, layers = tower_of(model_type)
    together = encode(tower, pixels, layers)
    alone = encode(tower, pixels[:1], layers)
    torch.testing.assert_close(together.scores()[:1], alone.scores(), rtol=1e-4, atol=1e-5)


def test_cls_token_stands_in_front_where_it_is_kept():
    tower, pixels, layers = tower_of("llava")
    images = encode(tower, pixels, layers)
    tokens = images.visual_tokens(lambda: images.patches, images.has_cls, 16)
    selection = VisionZip(dominant=5, contextual=3).select(tokens)
    rows = images.reduce(selection)
    assert rows.shape == (2, 8, 32)
    assert torch.equal(rows[:, 0], images.hidden[:, 0])
    for image in range(2):
        assert torch.equal(rows[image, 1:5], images.hidden[image, 1 + selection.kept[image]])
    even = EvenTokens(4).select(tokens)
    assert torch.equal(images.reduce(even), images.hidden[:, 1::4])
    some = VisionZip(dominant=5, contextual=3).select(tokens.take([1], 16))
    assert torch.equal(images.reduce(some, [1]), rows[1:])


def test_refusals():
    tower, pixels, _ = tower_of("llava")
    for layer in (0, -3, 3, -4, [-1, 0]):
        with pytest.raises(ValueError, match="vision_feature_layer must name outputs of the 2 layers"):
            encode(tower, pixels, layer)
    with pytest.raises(ValueError, match="must be of the kind of CLIP, SigLIP or InternVL, got Linear"):
        encode(nn.Linear(2, 2), pixels, -1)
    tower.encoder.layers[-1].self_attn.k_proj = None
    del tower.encoder.layers[-1].self_attn.scale
    with pytest.raises(ValueError, match="must project queries and keys by themselves, got CLIPAttention"):
        encode(tower, pixels, -1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model_type", "parts"),
    [
        ("llava", "vision_tower.encoder.layers.*"),
        ("llava", "vision_tower.encoder"),
        ("llava", "vision_tower"),
        ("qwen2_5_vl", "visual.blocks.*"),
    ],
)
def test_parts_that_are_compiled_by_themselves(model_type: str, parts: str):
    """Compiled layers share the graph of the first one, which has no hooks; the scored layer does."""
    torch._dynamo.reset()
    talk = Talk.of(model_type)
    talk.model.config.vision_feature_layer = -1
    inputs = talk.batch((10, 0, 11, 12))
    for name, part in talk.model.base_model.named_modules():
        if fnmatchcase(name, parts) and name.count(".") == parts.count("."):
            part.compile(backend="eager")
    with vlmfast.patch(talk.model, reduce=VisionZip(4, 2)):
        with pytest.raises(RuntimeError, match="as it does where it or its layers are compiled by themselves"):
            talk.model(**inputs)
    torch._dynamo.reset()


@pytest.mark.parametrize("times", [0, 2])
def test_modules_are_recorded_that_are_called_once(times: int):
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)

    def run() -> None:
        with recorded(module=module, other=other) as calls:
            other(torch.ones(2))
            for _ in range(times):
                module(torch.ones(2))
            assert len(calls) == 1 + bool(times)

    with pytest.raises(RuntimeError, match="the vision tower passed its hooks by"):
        run()
    assert not module._forward_hooks


def test_another_thread_that_torch_has_call_the_hook_half_registered():
    """torch marks a hook as taking keyword arguments after it adds it, and unmarks it before it removes it.

    Another thread may call the hook in between, without keyword arguments.
    """
    module = nn.Linear(2, 2)

    def run_half_registered() -> None:
        taken, module._forward_hooks_with_kwargs = module._forward_hooks_with_kwargs, {}
        module(torch.ones(2))
        module._forward_hooks_with_kwargs = taken

    with recorded(module=module) as calls, ThreadPoolExecutor(1) as pool:
        pool.submit(run_half_registered).result()
        assert not calls
        output = module(torch.ones(2))
    assert calls["module"].output is output
