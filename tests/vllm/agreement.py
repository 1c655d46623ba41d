"""vLLM with reduced models against Hugging Face's, patched: ids and log-probabilities of greedy answers."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.video_utils import VideoMetadata
from vllm import LLM, SamplingParams

import vlmfast.vllm
from tests.helpers.written_models import picture, placeholder
from tests.vllm import gated_delta
from vlmfast.reduce.spelling import parse
from vlmfast.vllm import KEY

STEPS = 16
TOLERANCE = 1e-5  # of log-probabilities, in float32
gated_delta.install()


@dataclass(frozen=True)
class Request:
    """A prompt with images and videos, and perhaps a method of its own."""

    text: str
    images: tuple[Image.Image, ...] = ()
    method: str | None = None
    videos: tuple[np.ndarray, ...] = ()
    fps: float = 2.0

    @property
    def prompt(self) -> dict[str, Any]:
        """As `vllm.LLM` takes it."""
        prompt: dict[str, Any] = {"prompt": self.text}
        frames = {"do_sample_frames": False, "video_backend": "opencv"}
        videos = [(video, details(video, self.fps) | frames) for video in self.videos]
        shown = {"image": list(self.images), "video": videos}
        if any(shown.values()):
            prompt["multi_modal_data"] = {kind: items for kind, items in shown.items() if items}
        if self.method:
            prompt["mm_processor_kwargs"] = {KEY: self.method}
        return prompt


@dataclass(frozen=True)
class Answer:
    """Greedy ids, and the log-probability of each."""

    ids: list[int]
    logprobs: list[float]
    prompt: int  # tokens


def rounds(name: str, other: str | None = None) -> list[list[Request]]:
    """Return requests of no to two images of three sizes, and then others that find prefixes in the cache.

    With ``other``, a method that some of them ask for.
    """
    image = placeholder(name)
    scale = 4 if "qwen" in name else 1
    pictures = (
        picture(0, 90 * scale, 70 * scale),
        picture(1, 64 * scale, 120 * scale),
        picture(2, 200 * scale, 56 * scale),
    )
    one, two = f"user : {image} what is in this image ?", f"user : {image} and {image} what is the"
    first = [
        Request(one, pictures[:1]),
        Request(one, pictures[1:2]),
        Request(one, pictures[2:], other),
        Request(f"{two} w9 ?", (pictures[2], pictures[0])),
        Request("user : what is w7 ?"),
        Request(one, pictures[:1], other),
    ]
    second = [
        Request(f"{one} w3 w5 w7", pictures[:1]),
        Request(f"{one} w11", pictures[1:2], other),
        Request(f"{one} w12 w13", pictures[2:], other),
        Request(f"{two} w10 ?", (pictures[2], pictures[0])),
        Request(f"{two} w10 ?", (pictures[2], pictures[1])),
        Request(f"{one} w3 w5 w7", pictures[:1], other),
    ]
    return [first, second]


def hugging_face(folder: Path, method: str, requests: Sequence[Request]) -> list[Answer]:
    """Answer with transformers' model, patched."""
    model, processor = loaded(folder)
    found = []
    for request in requests:
        inputs = processor(
            text=[request.text], images=list(request.images) or None, return_tensors="pt", **_clips(request)
        )
        with vlmfast.patch(model, reduce=parse(request.method or method, kind=None, trusted=True)):
            found.append(answered(model, inputs))
    return found


def _clips(request: Request) -> dict[str, Any]:
    if not request.videos:
        return {}
    metadata = [VideoMetadata(**details(video, request.fps)) for video in request.videos]
    return {"videos": list(request.videos), "video_metadata": metadata, "do_sample_frames": False}


def clip(seed: int, frames: int, width: int, height: int) -> np.ndarray:
    """Make a video of noise that changes within its areas."""
    return np.stack([np.asarray(picture(seed + number // 3, width, height)) for number in range(frames)])


def details(video: np.ndarray, fps: float) -> dict[str, Any]:
    """Describe a video of so many frames a second."""
    count = len(video)
    return {"fps": fps, "duration": count / fps, "total_num_frames": count, "frames_indices": list(range(count))}


def answered(model: Any, inputs: Mapping[str, Any]) -> Answer:
    """Answer with a model of transformers."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    rows = torch.stack([logits[0] for logits in out.logits]).float().log_softmax(-1)
    kept = out.past_key_values.get_seq_length() - STEPS + 1
    return Answer(ids, rows[range(STEPS), ids].tolist(), kept)


@contextmanager
def engine(folder: Path, method: str | None, **settings: Any) -> Iterator[LLM]:
    """Run vLLM with the reduced model, and clear away after it."""
    from vllm.distributed import cleanup_dist_env_and_memory

    model, processor = loaded(folder)
    architecture = model.config.architectures[0]
    reduction = vlmfast.vllm.reduced(method, architecture) if method else {}
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8, "block_size": 32}
    limits = {"image": 2, "video": 0} if hasattr(processor, "video_processor") else {"image": 2}
    llm = LLM(str(folder), **defaults | {"limit_mm_per_prompt": limits} | reduction | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def ask(llm: LLM, requests: Sequence[Request]) -> list[Answer]:
    """Answer all requests at once."""
    return answers(llm, [request.prompt for request in requests])


def answers(llm: LLM, prompts: Sequence[Any]) -> list[Answer]:
    """Answer prompts as vLLM takes them, all at once."""
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=0)
    found = []
    for out in llm.generate(list(prompts), sampling, use_tqdm=False):
        (answer,) = out.outputs
        ids = list(answer.token_ids)
        logprobs = [row[token].logprob for row, token in zip(answer.logprobs, ids, strict=True)]
        found.append(Answer(ids, logprobs, len(out.prompt_token_ids)))
    return found


def differences(found: Sequence[Answer], expected: Sequence[Answer]) -> list[float]:
    """Return how far each answer is off: infinitely for other ids or another length of the prompt."""
    return [
        max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
        if (one.ids, one.prompt) == (other.ids, other.prompt)
        else float("inf")
        for one, other in zip(found, expected, strict=True)
    ]


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)
