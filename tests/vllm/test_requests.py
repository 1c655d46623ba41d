"""What is refused and by what sentence, how many tokens are asked for, and where they stand: without an engine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import PlaceholderRange

import vlmfast.vllm
from tests.helpers import written_models
from tests.helpers.written_models import picture, placeholder
from tests.vllm.agreement import clip, details
from tests.vllm.own_methods import Last
from tests.vllm.test_videos import VIDEOS
from vlmfast.reduce import EVS, CDPruner, DivPrune, FastV, PyramidDrop, VisionZip
from vlmfast.vllm import KEY, encoding, llava_next, naming, positions, processing, qwen, registration

LLAVA, NEXT, ONEVISION, QWEN = (
    f"{name}ForConditionalGeneration" for name in ("Llava", "LlavaNext", "LlavaOnevision", "Qwen3VL")
)


def config(models: Path, name: str, method: str, **settings: Any) -> Any:
    folder = written_models.write(name, models)
    return EngineArgs(str(folder), **vlmfast.vllm.reduced(method, str(folder)) | settings).create_engine_config()


def ids(processor: Any, prompt: str, images: list[Any], **options: Any) -> list[int]:
    """Return the ids of a prompt as the engine gets them."""
    info = processor.info
    tokens = info.get_tokenizer().encode(prompt, add_special_tokens=False)
    items = info.parse_mm_data({"image": images})
    result = processor(tokens, items, hf_processor_mm_kwargs=options)
    return list(result["prompt_token_ids"])


# ---- methods and models ----


def test_arguments_are_the_same_for_a_server(models: Path):
    folder = str(written_models.write("llava", models))
    given = vlmfast.vllm.reduced(DivPrune(64, centered=True), folder)
    overrides = {"architectures": [f"Vlmfast{LLAVA}"], KEY: "DivPrune(keep=64, centered=True)"}
    assert given == {"hf_overrides": overrides} == vlmfast.vllm.reduced("DivPrune(64, True)", LLAVA) | given
    flag, text = vlmfast.vllm.server_arguments(DivPrune(64, centered=True), LLAVA)
    assert flag == "--hf-overrides"
    assert json.loads(text) == overrides


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (FastV(2, 0.5), LLAVA, "FastV.* cuts between layers"),
        (CDPruner(8), LLAVA, "CDPruner.* chooses by the question"),
        ("pyramiddrop:8:0.5", QWEN, "PyramidDrop.* cuts between layers"),
        (PyramidDrop(2, 0.5), QWEN, "cuts between layers"),
        (EVS(0.5), LLAVA, "EVS.* reduces videos, and Llava.* takes none"),
        (
            EVS(0.5),
            QWEN,
            "EVS.* chooses how many tokens each frame .* keeps, and Qwen3VL.* has text before each frame",
        ),
        (
            "vcast:0.5",
            "InternVLForConditionalGeneration",
            "VCAST.* reduces videos, and InternVL.* takes frames as tiles of images: use a method for images",
        ),
        (DivPrune(64), NEXT, "DivPrune.*depends on the picture"),
        (VisionZip(27, 5, packing="model"), NEXT, "depends on the picture.* packing='published' or 'whole'"),
        (VisionZip(27, 5), ONEVISION, "depends on the picture where LlavaOnevision.* packing='whole'"),
        ("divprune:64", ONEVISION, "DivPrune.*depends on the picture"),
        ("visionzip:54", LLAVA, "visionzip is written visionzip:DOMINANT:CONTEXTUAL"),
    ],
)
def test_methods_that_cannot_be_served_are_refused_by_name(method: Any, model: str, message: str):
    with pytest.raises(ValueError, match=message):
        vlmfast.vllm.reduced(method, model)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("internvl", {"vision_feature_layer": -2}, "vLLM takes the features of InternVL from the last layer"),
        ("llava_onevision", {"vision_aspect_ratio": "anyres_max_4"}, "vision_aspect_ratio must be 'anyres_max_9'"),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "must be the patches of the crops"),
    ],
)
def test_configurations_that_vllm_does_not_follow_are_refused(name: str, changed: Any, message: str, models: Path):
    made = config(models, name, "VisionZip(dominant=9, contextual=4, packing='whole')")
    made.model_config.hf_config.update(changed)
    (architecture,) = made.model_config.hf_config.architectures
    with pytest.raises(ValueError, match=message):
        getattr(vlmfast.vllm, architecture)(vllm_config=made)


def test_what_is_no_method_is_refused():
    with pytest.raises(TypeError, match="got the class VisionZip, without its arguments"):
        vlmfast.vllm.reduced(VisionZip, LLAVA)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"), [("fastv:2:0.5", "cuts between layers"), (None, "hf_overrides must have")]
)
def test_engines_refuse_them_when_they_start(text: str | None, message: str, models: Path):
    overrides = {"architectures": [f"Vlmfast{LLAVA}"]} | ({KEY: text} if text else {})
    with pytest.raises(ValueError, match=message):
        config(models, "llava", "even:8", hf_overrides=overrides)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3_vl", {"mm_encoder_tp_mode": "data"}, "mm_encoder_tp_mode=data is not possible"),
        ("qwen3_vl", {"video_pruning_rate": 0.5}, "video_pruning_rate is not possible"),
        ("qwen3_vl", {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline_parallel_size > 1"),
        ("llava", {"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder is not possible"),
        ("qwen3_vl", {"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder is not possible"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(name: str, settings: Any, message: str, models: Path):
    with pytest.raises(ValueError, match=message):
        config(models, name, "even:8", **settings)


def test_drafters_and_adapters_of_the_tower_are_refused():
    drafting = SimpleNamespace(method="eagle3")
    plain = SimpleNamespace(compile_mm_encoder=False, cudagraph_mm_encoder=False)
    images = SimpleNamespace(mm_encoder_tp_mode="weights", is_multimodal_pruning_enabled=lambda: False)
    parallel = SimpleNamespace(use_ubatching=False, pipeline_parallel_size=1)
    made = SimpleNamespace(
        speculative_config=drafting,
        lora_config=SimpleNamespace(enable_tower_connector_lora=True),
        compilation_config=plain,
        parallel_config=parallel,
        model_config=SimpleNamespace(multimodal_config=images),
    )
    wrong = [setting for setting, is_wrong, _ in registration._refused(LLAVA, made) if is_wrong]
    assert wrong == ["speculative_config with method eagle3", "enable_tower_connector_lora"]


# ---- another vLLM ----


def test_another_vllm_is_a_warning_and_then_a_sentence(monkeypatch: pytest.MonkeyPatch, models: Path):
    monkeypatch.setattr(registration, "SUPPORTED", ("0.16",))
    said: list[str] = []
    monkeypatch.setattr(registration.logger, "warning", lambda text, *values: said.append(text % values))
    registration.register()
    assert said == [
        "vlmfast's reduced models were tested with vLLM 0.16, and this is 0.32.0: all that they override is there"
    ]
    monkeypatch.setattr(registration, "missing", lambda module: "it has no embed_multimodal")
    with pytest.raises(registration.UnsupportedVllmError, match="it has no embed_multimodal"):
        vlmfast.vllm.VlmfastLlavaForConditionalGeneration  # noqa: B018
    with pytest.raises(Exception, match="it has no embed_multimodal"):
        config(models, "llava", "even:8")


def test_a_method_that_vllm_no_longer_has_is_named():
    other = type("Other", (torch.nn.Module,), {})
    with pytest.raises(registration.UnsupportedVllmError, match="Other has no embed_multimodal"):
        type("Reduced", (encoding.ReducedEncoder, other), {})


# ---- requests ----


def test_placeholders_of_requests(models: Path):
    processor = MULTIMODAL_REGISTRY.create_processor(config(models, "llava", "visionzip:14+4").model_config)
    image = processor.info.get_tokenizer().convert_tokens_to_ids("<image>")
    counts = {None: 18, "even:8": 8, "even:1.0": 64, "even:1000": 64, "visionzip:60+30": 64}
    prompt = "user : <image> what"
    for text, count in counts.items():
        options = {KEY: text} if text else {}
        assert ids(processor, prompt, [picture(0, 90, 70)], **options).count(image) == count, text
    for text, message in (
        ("fastv:2:0.5", "cuts between layers"),
        ("tests.vllm.own_methods.Last(keep=3)", "must name one of"),
        (3, "must be the text of a method"),
        ("even:0", "leaves none of the 64 tokens of an image, a video or a frame, and vLLM needs at least one"),
        ("even:" + "0" * 200 + "8", "at most 128 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            ids(processor, prompt, [picture(0, 90, 70)], **{KEY: text})


@pytest.mark.parametrize(
    ("name", "method", "counts"),
    [  # of pictures with one tile, three and four
        ("internvl", "visionzip:8+3", [11, 33, 44]),
        ("internvl", "even:1.0", [16, 48, 64]),
        ("llava_next", "VisionZip(dominant=9, contextual=4, packing='published')", [65, 65, 39]),
        ("llava_next", "VisionZip(dominant=9, contextual=4, packing='whole')", [65 + 12, 65 + 16, 39 + 4]),
    ],
)
def test_placeholders_of_crops(name: str, method: str, counts: list[int], models: Path):
    """A budget counts for each; what stands around the placeholders of an image stays."""
    processor = MULTIMODAL_REGISTRY.create_processor(config(models, name, method).model_config)
    tokenizer = processor.info.get_tokenizer()
    token, *around = tokenizer.encode(f"{placeholder(name)} w3 w5", add_special_tokens=False)
    sizes = [(90, 70), (64, 120), (200, 56)]
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        found = ids(processor, f"{placeholder(name)} w3 w5", [picture(number, *size)])
        assert found.count(token) == count
        assert found[-2:] == around
        if name == "internvl":
            assert tokenizer.convert_ids_to_tokens([found[0], found[-3]]) == ["<img>", "</img>"]


@pytest.mark.parametrize(
    ("name", "method", "count"),  # that leaves this share of each frame, and the placeholders of one token for each
    [
        ("qwen2_5_vl", "even:{}", 2),
        ("qwen3_vl", "even:{}", 2),
        ("internvl", "even:{}", 4),
        ("llava_onevision", "VisionZip(dominant={}, contextual=0, packing='whole')", 4 + 1),  # and the end of the video
    ],
)
def test_placeholders_of_frames_that_keep_one_token_or_none(name: str, method: str, count: int, models: Path):
    """The smallest share is a token of each frame."""
    processor = MULTIMODAL_REGISTRY.create_processor(config(models, name, method.format(1.0)).model_config)
    tokenizer = processor.info.get_tokenizer()
    video = VIDEOS.get(name, placeholder(name).replace("image", "video"))
    tokens = tokenizer.encode(f"user : {video} what", add_special_tokens=False)
    shown = clip(1, 4, 112, 56)
    given = (shown, details(shown, 2.0) | {"do_sample_frames": False, "video_backend": "opencv"})
    items = processor.info.parse_mm_data({"video": [given]})
    found = processor(tokens, items, hf_processor_mm_kwargs={KEY: method.format(0.01)})["prompt_token_ids"]
    assert tokenizer.convert_ids_to_tokens(found).count(re.search(r"<(video|.video_pad.)>", video)[0]) == count
    with pytest.raises(ValueError, match=r"leaves none of the \d+ tokens of an image, a video or a frame"):
        processor(tokens, items, hf_processor_mm_kwargs={KEY: method.format(0)})


def test_identities_say_the_method(models: Path):
    processor = MULTIMODAL_REGISTRY.create_processor(config(models, "llava", "even:8").model_config)
    info = processor.info
    seen = {}
    for text in (None, "even:8", "EvenTokens(keep=8)", "even:9", "random:8"):
        items = info.parse_mm_data({"image": [picture(0, 90, 70)]})
        tokens = info.get_tokenizer().encode("<image>", add_special_tokens=False)
        result = processor(tokens, items, hf_processor_mm_kwargs={KEY: text} if text else {})
        seen[text] = result["mm_hashes"]["image"][0]
    assert seen[None] == seen["even:8"] == seen["EvenTokens(keep=8)"]
    assert len(set(seen.values())) == 3


def test_a_users_method_comes_from_the_configuration(models: Path):
    text = "tests.vllm.own_methods.Last(keep=3)"
    assert vlmfast.vllm.reduced(Last(3), LLAVA)["hf_overrides"][KEY] == text
    processor = MULTIMODAL_REGISTRY.create_processor(config(models, "llava", text).model_config)
    assert processor.method == Last(3)


@pytest.mark.parametrize(
    ("name", "kind", "items"),
    [
        ("llava", "image", [torch.zeros(64, 128)]),
        ("qwen2_5_vl", "video", {"video_embeds": torch.zeros(4, 128), "video_grid_thw": torch.tensor([[1, 4, 4]])}),
    ],
)
def test_embeddings_are_refused(name: str, kind: str, items: Any, models: Path):
    made = config(models, name, "even:8", enable_mm_embeds=True)
    processor = MULTIMODAL_REGISTRY.create_processor(made.model_config)
    with pytest.raises(ValueError, match=f"embeddings of {kind}s cannot be reduced"):
        processor([5], processor.info.parse_mm_data({kind: items}), hf_processor_mm_kwargs={})


# ---- calls of the encoder ----


def test_calls_of_the_encoder_are_as_large_as_without_reduction():
    encoder = SimpleNamespace(_most_tokens=10)
    cut = encoding.ReducedEncoder.pieces(encoder, [4, 6, 1, 12, 3, 3, 3, 3])  # type: ignore[arg-type]
    assert [(piece.start, piece.stop) for piece in cut] == [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)]
    assert [(piece.start, piece.stop) for piece in encoding.ReducedEncoder.pieces(encoder, [20])] == [(0, 1)]  # type: ignore[arg-type]


def test_videos_of_llava_onevision_are_counted_by_pooled_tokens_and_a_newline():
    counted: list[int] = []
    vision = SimpleNamespace(image_size=384, patch_size=14)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision),
        methods_of=lambda count, kind: [None] * count,
        pieces=lambda tokens: counted.extend(tokens) or [],
    )
    given = {"pixel_values_videos": [torch.zeros(2, 3, 1, 1), torch.zeros(5, 3, 1, 1)]}
    cls = llava_next.VlmfastLlavaOnevisionForConditionalGeneration
    assert cls._process_video_pixels(model, given) == []  # type: ignore[arg-type]
    assert counted == [2 * 196 + 1, 5 * 196 + 1]


# ---- positions ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_places_beyond_256_are_exact(dtype: torch.dtype):
    most = positions.MOST
    places = torch.tensor([[0, 1, 2], [255, 256, 0], [257, 511, 1], [1023, 4097, 3], [most, most - 1, most]])
    wide = positions.with_places(torch.zeros(5, 8, dtype=dtype), places)
    assert wide.dtype == dtype
    assert wide.shape == (5, 14)
    assert positions.places_of(wide).equal(places)


def test_times_of_long_videos_end_at_the_largest_place():
    found = qwen.places_in((3, 2, 2), torch.tensor([1, 4, 11]), 65535.5)
    assert found.tolist() == [[0, 0, 1], [65535, 0, 0], [65535, 1, 1]]
    assert qwen.places_in((3, 2, 2), torch.tensor([11]), 0.0).tolist() == [[0, 1, 1]]


def test_frames_without_a_time_are_a_second_apart():
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(tokens_per_second=2.0)))
    for seconds, steps in ((None, [2.0, 2.0]), (torch.tensor([1.5, 0.5]), [3.0, 1.0])):
        given = {"video_grid_thw": torch.ones(2, 3), "second_per_grid_ts": seconds}
        assert qwen.VlmfastQwen2_5_VLForConditionalGeneration.time_steps(model, given) == steps  # type: ignore[arg-type]


class Upstream:
    """Stands for a model of vLLM: of the full prompt, it numbers text, and gives an image its grid."""

    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))

    def get_mrope_input_positions(self, tokens: list[int], features: list[Any]) -> tuple[torch.Tensor, int]:
        found, following = [], 0
        starts = {feature.mm_position.offset: feature for feature in features}
        number = 0
        while number < len(tokens):
            feature = starts.get(number)
            if feature is None:
                found.append(torch.full((3, 1), following))
                following, number = following + 1, number + 1
                continue
            height, width = (size // 2 for size in feature.data["image_grid_thw"].data.tolist()[1:])
            grid = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).T
            found.append(grid + following)
            following, number = following + max(height, width), number + height * width
        positions_ = torch.cat(found, 1)
        return positions_, int(positions_.max()) + 1 - len(tokens)


class Placed(positions.PlacedTokens, Upstream):
    def __init__(self) -> None:
        pass


def test_text_has_the_positions_of_the_full_prompt():
    @dataclass(frozen=True)
    class Feature:
        mm_position: PlaceholderRange
        data: Any
        modality: str = "image"

    def image(offset: int, length: int, height: int, width: int) -> Feature:
        grid = SimpleNamespace(data=torch.tensor([1, height * 2, width * 2]))
        return Feature(PlaceholderRange(offset, length), {"image_grid_thw": grid})

    tokens = [1, 9, 9, 2, 3, 9, 4]
    features = [image(5, 1, 2, 2), image(1, 2, 3, 4)]  # in any order
    found, delta = Placed().get_mrope_input_positions(tokens, features)
    assert found[0].tolist() == [0, 1, 1, 5, 6, 7, 9]
    assert found.equal(found[:1].expand(3, -1))
    assert delta == 10 - len(tokens)


def test_texts_travel_beside_images():
    text = "VisionZip(dominant=0.3, contextual=0.1, merge='mean', packing='published')"
    assert processing.decode_text(processing.encode_text(text)) == text
    assert naming.requested_method(QWEN, text) == VisionZip(0.3, 0.1, merge="mean")
    assert placeholder("llava") == "<image>"
