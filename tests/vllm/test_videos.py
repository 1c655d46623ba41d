"""Videos in vLLM, whose tokens are reduced as Hugging Face's patched model reduces them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import written_models
from tests.helpers.written_models import picture, placeholder
from tests.vllm.agreement import TOLERANCE, Request, ask, clip, differences, engine, hugging_face
from tests.vllm.test_agreement import off_in_processes
from vlmfast.vllm import positions

VIDEOS = {"internvl": "<video>", "llava_onevision": "<|video_pad|>"}  # of others, see `rounds`
LIMITS = {"image": 1, "video": 2}
EVS = "evs:0.25", "evs:1.0"
SHARES, LAST = "visionzip:0.3+0.1", "tests.vllm.own_methods.Last(keep=0.2)"
CASES = [  # the method of the engine, and one that a request asks for
    ("qwen2_5_vl", SHARES, "evs:0.4"),
    ("qwen2_5_vl", "flashvid:0.3", "vcast:0.4"),
    ("qwen2_5_vl", LAST, None),  # of images alone
    ("qwen3_vl", SHARES, "scope:3"),
    ("qwen3_vl_moe", SHARES, "DivPrune(keep=3, centered=True)"),
    ("qwen3_5", SHARES, "DivPrune(keep=3, centered=True)"),
    ("internvl", "visionzip:4+2", "scope:3"),
    ("internvl", LAST, None),
    ("llava_onevision", "VisionZip(dominant=0.3, contextual=0.1, packing='whole')", "evs:0.4"),
    ("llava_onevision", "vcast:0.3", "flashvid:0.4"),
]
RANKS = [  # those that choose by what each rank has a part of
    ("qwen2_5_vl", SHARES, "vcast:0.4"),
    ("qwen3_vl", SHARES, "scope:3"),
    ("internvl", "visionzip:4+2", "scope:3"),
    ("llava_onevision", "VisionZip(dominant=0.3, contextual=0.1, packing='whole')", "flashvid:0.4"),
]


def rounds(name: str, other: str | None) -> list[list[Request]]:
    """Return requests with videos of several sizes and lengths, and then others that find prefixes in the cache.

    Wide ones: where the time goes on beyond rows and columns, the text behind a video of Qwen2.5-VL stands elsewhere in
    vLLM, whatever is reduced; and so do its frames where they are no whole seconds apart.
    """
    short, long, tall = clip(1, 4, 112, 96), clip(5, 6, 400, 64), clip(8, 6, 64, 300)
    image = placeholder(name)
    video = VIDEOS.get(name, image.replace("image", "video"))
    shown = (picture(9, 280, 168),)
    one = f"user : {video} what is in"
    first = [
        Request(f"{video} and {image} what is w5 ?", shown, videos=(short,)),
        Request(f"{image} and {video} what is w6 ?", shown, videos=(long,)),
    ]
    if name.startswith("qwen3"):  # 0.15 seconds, 0.75 and 1.35, which are written with one digit
        first.append(Request(one, videos=(long,), fps=10 / 3))
    if not other:
        return [first]
    first += [Request(one, videos=(long,)), Request(one, method=other, videos=(long,))]
    second = [
        Request(f"{one} w3 w5 w7", videos=(long,)),
        Request(f"{one} w3 w5 w7", method=other, videos=(long,)),
        Request(f"{one} {video} w9 ?", videos=(tall, long)),
    ]
    return [first, second]


def off(name: str, models: Path, method: str, other: str | None, **settings: object) -> list[list[float]]:
    """Return how far the answers are off, in chunks of 40 tokens that end within videos."""
    folder = written_models.write(name, models)
    found = []
    settings = {"limit_mm_per_prompt": LIMITS, "max_num_batched_tokens": 40} | settings
    expected = [hugging_face(folder, method, requests) for requests in rounds(name, other)]
    with engine(folder, method, **settings) as llm:
        for requests, wanted in zip(rounds(name, other), expected, strict=True):
            found.append(differences(ask(llm, requests), wanted))
    return found


@pytest.mark.parametrize(("name", "method", "other"), CASES)
def test_videos_are_reduced_as_those_of_hugging_face(name: str, method: str, other: str | None, models: Path):
    found = off(name, models, method, other)
    assert max(map(max, found)) < TOLERANCE, found


@pytest.mark.parametrize(("name", "method", "other"), RANKS)
def test_videos_on_two_ranks(name: str, method: str, other: str, models: Path, tmp_path: Path):
    assert off_in_processes("test_videos", name, 2, models, tmp_path, method, other) < TOLERANCE


def test_frames_that_keep_none(models: Path):
    """EVS keeps the first frame whole, which is all where a quarter of four is kept."""
    video = placeholder("qwen2_5_vl").replace("image", "video")
    requests = [Request(f"user : {video} what is", method=method, videos=(clip(3, 8, 280, 56),)) for method in EVS]
    folder = written_models.write("qwen2_5_vl", models)
    expected = hugging_face(folder, SHARES, requests)
    with engine(folder, SHARES, limit_mm_per_prompt=LIMITS) as llm:
        found = ask(llm, requests)
    first, whole = (answer.prompt - 6 for answer in found)
    assert whole == 4 * first, "of the video, without the words"
    assert max(differences(found, expected)) < TOLERANCE


def test_times_between_whole_seconds_are_those_of_vllm(models: Path):
    """With all tokens kept, Qwen2.5-VL answers as vLLM's own model, where Hugging Face's rounds times down to seconds.

    The second video goes on beyond its rows and columns.
    """
    folder = written_models.write("qwen2_5_vl", models)
    one = f"user : {placeholder('qwen2_5_vl').replace('image', 'video')} what is in"
    requests = [
        Request(one, method="even:1.0", videos=(clip(5, 6, 400, 64),), fps=1.3),
        Request(one, method="even:1.0", videos=(clip(1, 12, 112, 96),), fps=1.3),
    ]
    with engine(folder, None, limit_mm_per_prompt=LIMITS) as llm:
        expected = ask(llm, [replace(request, method=None) for request in requests])
    with engine(folder, SHARES, limit_mm_per_prompt=LIMITS, max_num_batched_tokens=40) as llm:
        found = ask(llm, requests)
    assert max(differences(found, expected)) < TOLERANCE


# ---- a fault that these tests are meant to catch ----


def test_times_that_are_lost_are_noticed(models: Path, monkeypatch: pytest.MonkeyPatch):
    real = positions.places_of
    monkeypatch.setattr(positions, "places_of", lambda rows: real(rows) * torch.tensor([0, 1, 1]))
    found = off("qwen2_5_vl", models, SHARES, "evs:0.4")
    assert min(map(min, found)) > TOLERANCE, found
