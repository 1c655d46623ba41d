"""Placement of images and videos and DeepStack in common models: upstream's results, without waiting for a device."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vlmfast
from tests.helpers.patches_models import COMMON, DTYPES, METHODS, cast, logits, sites_of, tiny
from tests.helpers.tiny_models import IMAGE, VIDEO, VISION_END, VISION_START
from vlmfast.ops.masked_rows import row_index
from vlmfast.patches import masked_rows
from vlmfast.patches.masked_rows import PlaceholderMask, deepstack_process

NORMS = "*Norm*.forward"
ATTENTION = "*Attention.forward"  # changes the memory layout, so that torch sums gradients of norms in another order
VISUAL = ("pixel_values", "image_grid_thw", "image_sizes")


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


# ---- prompts ----


def batch(inputs: dict[str, Any], rows: list[list[int]], **visual: Tensor) -> dict[str, Any]:
    """Make the inputs of prompts with these ids, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    prompts = {"input_ids": ids, "attention_mask": (ids != 0).long(), **visual}
    if "mm_token_type_ids" in inputs:
        prompts["mm_token_type_ids"] = ((ids == IMAGE) + 2 * (ids == VIDEO)).int()
    return prompts


def takes_wide_masks(cls: type) -> bool:
    return hasattr(cls, "_deepstack_process") and "visual_pos_masks[..., 0]" in inspect.getsource(
        cls._deepstack_process
    )


def each_prompt(model: nn.Module, inputs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield named prompts of every kind, made from the two images of a tiny model."""
    image = [VISION_START, *[IMAGE] * int((inputs["input_ids"][0] == IMAGE).sum()), VISION_END]
    visual = {name: inputs[name] for name in VISUAL if name in inputs}
    yield "padded", batch(inputs, [[1, 10, *image, 11], [1, 12, 13, 14, *image, 15, 16, 17]], **visual)
    pixels = inputs["pixel_values"]
    of_one_prompt = {"pixel_values": pixels.transpose(0, 1) if pixels.shape[1] == 1 else pixels}
    yield "two images in one", batch(inputs, [[1, *image, 10, *image, 11]], **{**visual, **of_one_prompt})
    yield "no image", batch(inputs, [[1, 10, 11], [1, 12, 13, 14, 15]])
    parameters = inspect.signature(model.forward).parameters
    if "pixel_values_videos" not in parameters:
        return
    if "image_grid_thw" in inputs:  # two camera frames are one temporal patch: as large as an image
        video, half = image, len(pixels) // 2
        videos = {"pixel_values_videos": -pixels, "video_grid_thw": inputs["image_grid_thw"]}
        if "video_second_per_grid" in parameters:
            videos["video_second_per_grid"] = torch.ones(2)
    else:  # two frames of 2 x 2 pooled patches; LLaVA-OneVision puts a newline behind them
        newline = model.config.model_type == "llava_onevision"
        video, half = [VISION_START, *[VIDEO] * (8 + newline), VISION_END], 1
        videos = {"pixel_values_videos": -pixels[:, :2]}
    video = [VIDEO if token == IMAGE else token for token in video]
    yield "videos", batch(inputs, [[1, *video, 11], [1, 12, 13, *video, 14]], **videos)
    if any(takes_wide_masks(type(module)) for module in model.modules()):
        return  # transformers 4.57 cannot join images and videos in Qwen3-Omni
    first = {name: value[: half if name.startswith("pixel") else 1] for name, value in {**visual, **videos}.items()}
    yield "image and video", batch(inputs, [[1, 10, *image, 11], [1, *video, 12]], **first)
    yield "video before image", batch(inputs, [[1, *video, 10, *image, 11]], **first)


# ---- the same outputs ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", COMMON)
def test_each_prompt_gives_the_logits_of_upstream(model_type: str, dtype: torch.dtype):
    model, inputs = tiny(model_type, dtype)
    seen = []
    for name, prompts in each_prompt(model, inputs):
        prompts = {key: cast(value, dtype) for key, value in prompts.items()}
        want = logits(model, prompts)
        with vlmfast.patch(model, exclude=NORMS):
            got = logits(model, prompts)
        assert torch.equal(got, want), name
        assert all(not torch.equal(want, other) for other in seen)
        seen.append(want)
    assert len(seen) in (3, 4, 6)


@pytest.mark.parametrize("model_type", COMMON)
def test_each_prompt_generates_the_same_ids(model_type: str):
    model, inputs = tiny(model_type)
    for name, prompts in itertools.islice(each_prompt(model, inputs), 4):
        want = model.generate(**prompts, max_new_tokens=3, do_sample=False)
        with vlmfast.patch(model, exclude=NORMS):
            assert torch.equal(model.generate(**prompts, max_new_tokens=3, do_sample=False), want), name


@pytest.mark.parametrize("model_type", COMMON)
def test_embeddings_in_place_of_ids(model_type: str):
    model, inputs = tiny(model_type)
    prompts = dict(next(each_prompt(model, inputs))[1])
    table = model.get_input_embeddings()
    table.weight.data[10, 0] = table.weight.data[IMAGE, 0]  # one equal channel does not make a token a placeholder
    prompts["inputs_embeds"] = table(prompts.pop("input_ids")).detach()
    try:
        want = logits(model, prompts)
    except (TypeError, ValueError, AttributeError) as error:
        pytest.skip(f"upstream: {error}")
    assert not torch.equal(want, logits(model, {**prompts, "pixel_values": -prompts["pixel_values"]}))
    with vlmfast.patch(model, exclude=NORMS):
        assert torch.equal(logits(model, prompts), want)


def gradients(model: nn.Module, prompts: dict[str, Any]) -> dict[str, Tensor]:
    output = model(**prompts, use_cache=False).logits
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("model_type", COMMON)
def test_gradients_are_those_of_upstream(model_type: str):
    model, inputs = tiny(model_type)
    prompts = dict(each_prompt(model, inputs))
    exclude = (NORMS,) if model_type == "llama4" else (NORMS, ATTENTION)  # the attention of Llama 4 is not replaced
    for name in ("padded", "image and video"):
        if name in prompts:
            want = gradients(model, prompts[name])
            with vlmfast.patch(model, exclude=exclude):
                got = gradients(model, prompts[name])
            assert got.keys() == want.keys()
            assert any("vis" in parameter for parameter in want), "the image has gradients"
            for parameter, grad in want.items():
                assert torch.equal(got[parameter], grad), (name, parameter)


# ---- DeepStack ----


DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe", "granite_docling")


@pytest.mark.parametrize("model_type", DEEPSTACK)
def test_deepstack_process(model_type: str):
    (module,) = [m for m in tiny(model_type)[0].modules() if hasattr(m, "_deepstack_process")]
    mask = torch.rand(2, 7) < 0.5
    hidden, embeds = torch.randn(2, 7, 8, dtype=torch.bfloat16), torch.randn(int(mask.sum()), 8)
    if takes_wide_masks(type(module)):
        mask = mask[..., None].expand(2, 7, 8)
    before = hidden.clone()
    want = module._deepstack_process(hidden.clone(), mask, embeds)
    with vlmfast.patch(module, only="*_deepstack_process"):
        got = module._deepstack_process(hidden, mask, embeds)
    assert torch.equal(hidden, before), "out of place"
    assert torch.equal(got, want)
    assert not torch.equal(got, hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", DEEPSTACK)
def test_gradients_of_deepstack_process(model_type: str, dtype: torch.dtype):
    (module,) = [m for m in tiny(model_type)[0].modules() if hasattr(m, "_deepstack_process")]
    mask = torch.rand(2, 7) < 0.5
    leaves = [torch.randn(2, 7, 8, dtype=dtype), torch.randn(int(mask.sum()), 8, dtype=dtype)]
    if takes_wide_masks(type(module)):
        mask = mask[..., None].expand(2, 7, 8)

    def gradients() -> tuple[Tensor, ...]:
        hidden, embeds = (leaf.clone().requires_grad_() for leaf in leaves)
        output = module._deepstack_process(hidden * 1, mask, embeds)  # a copy, since upstream may write to it
        grad = torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype)
        return torch.autograd.grad(output, [hidden, embeds], grad)

    want = gradients()
    with vlmfast.patch(module, only="*_deepstack_process"):
        assert all(map(torch.equal, gradients(), want))


def calls_of_row_index(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    calls: list[Tensor] = []

    def counting(mask: Tensor) -> Tensor:
        calls.append(mask)
        return row_index(mask)

    monkeypatch.setattr(masked_rows, "row_index", counting)
    return calls


def test_layers_share_the_row_index(monkeypatch):
    calls = calls_of_row_index(monkeypatch)
    hidden, embeds = torch.zeros(2, 3, 8, device="meta"), torch.zeros(4, 8, device="meta")
    mask, other = (torch.ones(2, 3, dtype=torch.bool, device="meta") for _ in range(2))
    for changed, expected in ((None, 1), (other, 2), (mask, 3), (other, 3), (None, 3)):
        if changed is mask:
            mask.logical_not_()
        used = other if changed is other else mask
        for _ in range(3):
            deepstack_process(None, hidden, used, embeds)
        assert len(calls) == expected
        assert calls[-1] is used or changed is not mask


def test_no_row_index_is_kept_where_it_could_grow_old(monkeypatch):
    calls = calls_of_row_index(monkeypatch)
    mask = torch.ones(2, 3, dtype=torch.bool, device="meta")
    with torch.inference_mode():
        unversioned = mask.clone()
    assert masked_rows._shared_row_index(unversioned) is None
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)  # noqa: B023
        on_gpu = mask.as_subclass(type("OnGpu", (Tensor,), {"is_cuda": True}))
        assert (masked_rows._shared_row_index(on_gpu) is None) == capturing
    assert len(calls) == 1


def test_cpu_needs_no_row_index(monkeypatch):
    calls = calls_of_row_index(monkeypatch)
    deepstack_process(None, torch.zeros(1, 2, 8), torch.tensor([[True, False]]), torch.ones(1, 8))
    assert not calls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_of_a_prefill_do_not_wait(monkeypatch):
    calls = calls_of_row_index(monkeypatch)
    mask = torch.rand(2, 7) < 0.5
    hidden, embeds = torch.randn(2, 7, 64), torch.randn(int(mask.sum()), 64)
    want = [deepstack_process(None, hidden, m, embeds) for m in (mask, mask, mask.flip(1))]
    masks, hidden, embeds = (mask.cuda(), mask.flip(1).cuda()), hidden.cuda(), embeds.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with vlmfast.use("triton"):
            got = [deepstack_process(None, hidden, m, embeds) for m in (masks[0], masks[0], masks[1])]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 2
    assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


# ---- nothing waits ----

ATEN = torch.ops.aten
WAITING = {ATEN.nonzero, ATEN._local_scalar_dense, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero, ATEN.masked_scatter}
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}


class Waiting(TorchDispatchMode):
    """Records the operators, of upstream or this package, that would make the host wait for a GPU.

    An op of this package counts as one operator, and a placement as the ``masked_scatter`` that it replaces.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        indices = args[1] if packet in INDEXING else ()
        if packet in WAITING or any(index is not None and index.dtype == torch.bool for index in indices):
            self.found += [f"{packet} in {caller}" for caller in self.callers(packet)]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def callers(packet) -> Iterator[str]:
        frame, package = sys._getframe(2), str(Path(vlmfast.__file__).parent)
        while frame is not None:
            code = frame.f_code
            if code.co_name in METHODS or code.co_filename.startswith(package) or packet is ATEN.masked_scatter:
                yield code.co_name
                return
            frame = frame.f_back


def waiting(model: nn.Module, prompts: dict[str, Any]) -> list[str]:
    with Waiting() as mode:
        logits(model, prompts)
    return mode.found


@pytest.mark.parametrize("model_type", COMMON)
def test_nothing_that_was_replaced_waits_for_the_device(model_type: str):
    model, inputs = tiny(model_type)
    for name, prompts in each_prompt(model, inputs):
        before = waiting(model, prompts)
        assert bool(before) == (name != "no image"), name
        with vlmfast.patch(model, only=sites_of(model, masked_rows)):
            assert waiting(model, prompts) == [], name


# ---- torch.compile ----


@pytest.fixture
def graphs() -> Iterator[tuple[Callable[..., Any], list[str]]]:
    """Yield a backend of torch.compile that runs graphs unchanged, and the list of our ops in these graphs."""
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, example_inputs: list) -> Callable[..., Any]:
        seen.extend(node.target.name() for node in module.graph.nodes if "vlmfast" in str(node.target))
        return module.forward

    torch._dynamo.reset()
    yield backend, seen
    torch._dynamo.reset()


@pytest.mark.thorough
def test_placement_compiles(graphs):
    backend, seen = graphs
    model, inputs = tiny("llava")
    prompts = next(each_prompt(model, inputs))[1]
    want = logits(model, prompts)
    vlmfast.patch(model, exclude=NORMS)
    assert torch.equal(logits(torch.compile(model, backend=backend), prompts), want)
    assert seen == ["vlmfast::place_embeddings"]


def test_number_of_images_that_the_tracer_does_not_know(graphs):
    """Idefics3 drops images that are padding, so their number depends on data."""
    backend, seen = graphs
    mask = torch.tensor([[False, True, True, False]])[..., None]
    x, features, real = torch.randn(1, 4, 8), torch.randn(3, 8), torch.tensor([True, False, True])

    def place(x: Tensor) -> Tensor:
        return x.masked_scatter(mask.as_subclass(PlaceholderMask), features[real])

    want = x.masked_scatter(mask, features[real])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(torch.compile(place, backend=backend, fullgraph=True)(x), want)
    assert seen == ["vlmfast::place_embeddings"]


def test_deepstack_compiles_into_one_graph(graphs):
    backend, seen = graphs
    model = tiny("qwen3_vl")[0].get_submodule("model.language_model")
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    prompts = {"inputs_embeds": torch.randn(2, 4, 64), "visual_pos_masks": mask, "use_cache": False}
    prompts["deepstack_visual_embeds"] = list(torch.randn(2, 3, 64))
    with torch.no_grad():
        want = model(**prompts).last_hidden_state
        vlmfast.patch(model, exclude=NORMS)
        assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(**prompts).last_hidden_state, want)
    assert seen == ["vlmfast::deepstack_add"] * 2
