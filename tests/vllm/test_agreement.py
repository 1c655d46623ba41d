"""vLLM answers as Hugging Face's patched model does: with prefixes cached, chunks within images, ranks, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

import vlmfast
from tests.helpers import written_models
from tests.vllm.agreement import (
    TOLERANCE,
    answered,
    answers,
    ask,
    differences,
    engine,
    hugging_face,
    loaded,
    rounds,
)
from tests.vllm.own_methods import Last
from vlmfast.vllm import encoding, positions, processing

ZIP, SHARES = "visionzip:14+4", "visionzip:0.3+0.1"
DIVERSE = "DivPrune(keep=8, centered=True)"
CASES = {  # the method of the engine, and one that requests ask for
    "llava": (ZIP, DIVERSE),
    "llava_next": (
        "VisionZip(dominant=14, contextual=4, merge='mean')",
        "VisionZip(dominant=0.3, contextual=0.1, packing='whole')",
    ),
    "llava_onevision": (
        "VisionZip(dominant=0.3, contextual=0.1, packing='whole')",
        "VisionZip(dominant=9, contextual=4, merge='mean', packing='whole')",
    ),
    "internvl": ("visionzip:8+3", "DivPrune(keep=7, centered=True)"),
    "qwen2_5_vl": (SHARES, DIVERSE),
    "qwen3_vl": (SHARES, "scope:9"),
    "qwen3_vl_moe": (SHARES, "scope:9"),
    "qwen3_5": (SHARES, "scope:9"),
    "qwen3_5_moe": (SHARES, DIVERSE),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def off(name: str, models: Path, method: str, other: str | None = None, **settings: object) -> list[list[float]]:
    """Return how far the answers are off, those of two rounds of requests."""
    folder = written_models.write(name, models)
    found = []
    expected = [hugging_face(folder, method, requests) for requests in rounds(name, other)]
    with engine(folder, method, **settings) as llm:
        for requests, wanted in zip(rounds(name, other), expected, strict=True):
            found.append(differences(ask(llm, requests), wanted))
    return found


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_hugging_face(name: str, models: Path):
    """Chunks of 40 tokens end within images, and the second round finds prefixes and images in the caches."""
    found = off(name, models, *CASES[name], max_num_batched_tokens=40)
    assert max(map(max, found)) < TOLERANCE, found


@pytest.mark.parametrize("method", ["even:9", "random:0.3"])
def test_methods_that_ask_for_no_attention(method: str, models: Path):
    # a random choice is told by the pixels, which vLLM would otherwise normalise on the device
    found = off("qwen3_vl", models, method, mm_device_do_normalize=False)
    assert max(map(max, found)) < TOLERANCE, found


@pytest.mark.parametrize("name", CASES)
def test_images_of_many_requests_in_one_call_and_without_caches(name: str, models: Path):
    """Images of several sizes and two methods are encoded at once."""
    together = {"max_num_batched_tokens": 8192, "enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    found = off(name, models, *CASES[name], **together)
    assert max(map(max, found)) < TOLERANCE, found


def test_videos_stay_as_they_are_beside_images_that_are_reduced(models: Path):
    """In the order video, image and image, video; the text behind both is at the positions of the full prompt."""
    method = "tests.vllm.own_methods.Last(keep=0.2)"
    folder = written_models.write("qwen2_5_vl", models)
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    frames = np.stack([np.asarray(written_models.picture(seed, 112, 84)) for seed in range(4)])
    details = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    picture = written_models.picture(9, 280, 168)
    texts = [f"user : {video} and {image} what is w5 ?", f"user : {image} and {video} what is w6 ?"]
    model, processor = loaded(folder)
    expected, found = [], []
    for text in texts:
        metadata = [VideoMetadata(**details)]
        inputs = processor(
            text=[text],
            images=[picture],
            videos=[frames],
            video_metadata=metadata,
            do_sample_frames=False,
            return_tensors="pt",
        )
        with vlmfast.patch(model, reduce=Last(0.2)):
            expected.append(answered(model, inputs))
    with engine(folder, method, limit_mm_per_prompt={"image": 1, "video": 1}) as llm:
        videos = [(frames, details | {"do_sample_frames": False, "video_backend": "opencv"})]
        data = {"image": [picture], "video": videos}
        found = answers(llm, [{"prompt": text, "multi_modal_data": data} for text in texts])
    assert max(differences(found, expected)) < TOLERANCE, (found, expected)


@pytest.mark.parametrize(("name", "video"), [("llava_onevision", "<|video_pad|>"), ("internvl", "<video>")])
def test_videos_are_those_of_vllm(name: str, video: str, models: Path):
    """Where Hugging Face's model would reduce them: also beside images that are reduced."""
    folder = written_models.write(name, models)
    frames = np.stack([np.asarray(written_models.picture(seed, 56, 56)) for seed in range(3)])
    details = {"fps": 2.0, "duration": 1.5, "total_num_frames": 3, "frames_indices": [0, 1, 2]}
    data = {"video": [(frames, details | {"do_sample_frames": False, "video_backend": "opencv"})]}
    image = written_models.placeholder(name)
    both = data | {"image": [written_models.picture(9, 90, 70)]}
    prompts = [
        {"prompt": f"user : {video} what is w5 ?", "multi_modal_data": data},
        {"prompt": f"user : {image} and {video} what is w6 ?", "multi_modal_data": both},
    ]
    found = []
    for method in (None, CASES[name][0]):
        with engine(folder, method, limit_mm_per_prompt={"image": 1, "video": 1}) as llm:
            found.append(answers(llm, prompts))
    (video_alone, beside), (same, reduced) = found
    assert max(differences([same], [video_alone])) < TOLERANCE
    assert reduced.prompt < beside.prompt


# ---- processes, which find the plugin by its entry point ----

PROCESS = """
import os, sys
import tests.vllm.conftest
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
from pathlib import Path
from tests.vllm.test_agreement import CASES, off
if __name__ == "__main__":
    name, models, ranks = sys.argv[1:]
    if int(ranks) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(int(ranks))))
    found = off(name, Path(models), *CASES[name], tensor_parallel_size=int(ranks), max_num_batched_tokens=40)
    print("OFF", max(map(max, found)))
"""


@pytest.mark.parametrize(("name", "ranks"), [("llava", 1), *((name, 2) for name in CASES)])
def test_engines_in_processes_of_their_own(name: str, ranks: int, models: Path, tmp_path: Path):
    written_models.write(name, models)
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    command = [sys.executable, str(script), name, str(models), str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert "OFF" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert float(done.stdout.split("OFF")[1]) < TOLERANCE, done.stdout


# ---- faults that these tests are meant to catch ----


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl"])
def test_other_scores_are_noticed(name: str, models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        encoding.EncodedByRank, "scores", lambda encoded: -super(encoding.EncodedByRank, encoded).scores()
    )
    found = off(name, models, CASES[name][0])
    assert sum(value > TOLERANCE for value in found[0] + found[1]) >= 8, found


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5"])
def test_places_that_are_lost_are_noticed(name: str, models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(positions, "places_of", lambda rows: torch.zeros(len(rows), 2, dtype=torch.int64))
    found = off(name, models, SHARES)
    assert sum(value > TOLERANCE for value in found[0] + found[1]) >= 8, found


def test_hashes_without_the_method_are_noticed(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processing, "_digest", lambda value, spelled: value)
    found = off("llava", models, ZIP, "visionzip:10+8")  # of as many tokens
    assert max(map(max, found)) > TOLERANCE, found
