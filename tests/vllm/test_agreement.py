"""vLLM answers as Hugging Face's patched model does: with prefixes cached, chunks within images, ranks, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import written_models
from tests.vllm.agreement import (
    TOLERANCE,
    ask,
    differences,
    engine,
    hugging_face,
    rounds,
)
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


# ---- processes, which find the plugin by its entry point ----

PROCESS = """
import os, sys
import tests.vllm.conftest
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
from pathlib import Path
from tests.vllm import {module}
if __name__ == "__main__":
    name, models, ranks, *methods = sys.argv[1:]
    if int(ranks) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(int(ranks))))
    settings = {"tensor_parallel_size": int(ranks), "max_num_batched_tokens": 40}
    found = {module}.off(name, Path(models), *methods, **settings)
    print("OFF", max(map(max, found)))
"""


def off_in_processes(module: str, name: str, ranks: int, models: Path, folder: Path, *methods: str) -> float:
    """Return how far the answers of an engine in processes of its own are off, those that a module of tests asks."""
    written_models.write(name, models)
    script = folder / "process.py"
    script.write_text(PROCESS.replace("{module}", module))
    command = [sys.executable, str(script), name, str(models), str(ranks), *methods]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert "OFF" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    return float(done.stdout.split("OFF")[1])


@pytest.mark.parametrize(("name", "ranks"), [("llava", 1), *((name, 2) for name in CASES)])
def test_engines_in_processes_of_their_own(name: str, ranks: int, models: Path, tmp_path: Path):
    assert off_in_processes("test_agreement", name, ranks, models, tmp_path, *CASES[name]) < TOLERANCE


# ---- faults that these tests are meant to catch ----


def test_ranks_that_score_alone_are_noticed(models: Path, tmp_path: Path):
    method = "tests.vllm.ranks_alone.Alone(dominant=14, contextual=4)"
    assert off_in_processes("test_agreement", "llava", 2, models, tmp_path, method) > TOLERANCE


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl"])
def test_other_scores_are_noticed(name: str, models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        encoding.EncodedByRank, "scores", lambda encoded: -super(encoding.EncodedByRank, encoded).scores()
    )
    found = off(name, models, CASES[name][0])
    assert sum(value > TOLERANCE for value in found[0] + found[1]) >= 8, found


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5"])
def test_places_that_are_lost_are_noticed(name: str, models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(positions, "places_of", lambda rows: torch.zeros(len(rows), 3, dtype=torch.int64))
    found = off(name, models, SHARES)
    assert sum(value > TOLERANCE for value in found[0] + found[1]) >= 8, found


def test_hashes_without_the_method_are_noticed(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processing, "_digest", lambda value, spelled: value)
    found = off("llava", models, ZIP, "visionzip:10+8")  # of as many tokens
    assert max(map(max, found)) > TOLERANCE, found
