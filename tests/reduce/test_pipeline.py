"""Reduced prompts in transformers' pipeline, and with the decoding steps that `generate` compiles itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch._dynamo.utils import counters

import vlmfast
from tests.helpers.patches_models import llava_processor, tiny
from tests.helpers.reduce_models import METHODS, Talk
from tests.reduce.test_generate import PROMPTS, assert_same, by_hand, generate

METHOD, STEPS = METHODS[0], 5
TEXTS = ["describe this <image> word1", "<image> word2"]
OPTIONS = {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": list(range(7))}


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


def pictures() -> list[Image.Image]:
    return [Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L").convert("RGB")]


@contextmanager
def logits_of_steps(model: Any) -> Iterator[list[Tensor]]:
    """Record the (B, V) logits of each step in the block; tokens of a random model repeat and prove little."""
    found: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, output: found.append(output[:, -1]))
    yield found
    hook.remove()


@torch.no_grad()
def answers(model: Any, processor: Any) -> tuple[list[list[str]], Tensor]:
    """Return the unpatched model's answers to each prompt alone, shortened beforehand, and its (B, S, V) logits."""
    words, logits = [], []
    for text, picture in zip(TEXTS, pictures(), strict=True):
        inputs = processor(images=picture, text=text, return_tensors="pt")
        short = vlmfast.compress_inputs(model, inputs, METHOD)
        with logits_of_steps(model) as steps:
            words.append(processor.decode(model.generate(**short, **OPTIONS)[0, -STEPS:]).split())
        logits.append(torch.cat(steps))
    return words, torch.stack(logits)


def test_pipeline():
    model, processor = tiny("llava")[0], llava_processor()
    want, want_logits = answers(model, processor)
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)

    def ask(**options: Any) -> tuple[list[list[str]], Tensor]:
        images = [[picture] for picture in pictures()]
        with logits_of_steps(model) as steps:
            rows = pipe(images=images, text=TEXTS, generate_kwargs=OPTIONS, **options)
        return [row["generated_text"].split() for row in rows], torch.stack(steps, 1)

    _, whole = ask()
    with vlmfast.patch(model, reduce=METHOD):
        words, logits = ask(return_full_text=False)
        assert words == want
        assert ask()[0] == [[*text.split(), *answer] for text, answer in zip(TEXTS, want, strict=True)]
        (row,) = pipe(images=pictures()[0], text=TEXTS[0], generate_kwargs=OPTIONS, return_tensors=True)
        full = processor(images=pictures()[0], text=TEXTS[0])["input_ids"][0]
        assert row["generated_token_ids"][:-STEPS].tolist() == list(full)
    torch.testing.assert_close(logits, want_logits, rtol=1e-5, atol=2e-5)
    assert ((whole - logits)[:, 0].abs().amax(1) > 1e-3).all(), "what is reduced does not show"
    assert torch.equal(ask()[1], whole)


def test_steps_that_generate_compiles():
    """As with a static cache on a GPU, one graph is compiled and used for every step."""
    talk = Talk.of("qwen2_5_vl")
    want, inputs = by_hand(talk), talk.batch(*PROMPTS)
    config = transformers.CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    with vlmfast.patch(talk.model, reduce=METHOD):
        out = generate(talk.model, **inputs, cache_implementation="static", compile_config=config)
    assert_same(out, inputs["input_ids"], want)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()
