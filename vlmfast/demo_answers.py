"""Answers of ``generate`` by the unpatched and the patched model, singly or in pairs, with their times."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.console import CommandError
from vlmfast.demo_model import Subject
from vlmfast.patches import Patch, patch
from vlmfast.reduce import ReducedImage


class Clock:
    """A streamer of ``generate`` that notes the time of the prompt, which comes first, and of each new token."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.arrivals: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Note the time; the tokens are already on the host."""
        self.arrivals.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing after the last token."""

    @property
    def first(self) -> float:
        """Seconds from the call to the first token: vision tower, prefill, choice of the token."""
        return self.arrivals[1] - self.started

    @property
    def following(self) -> list[float]:
        """Seconds from each token to the next."""
        return [after - before for before, after in itertools.pairwise(self.arrivals[1:])]


@dataclass(frozen=True)
class Answer:
    """The output of one ``generate``, and its times."""

    tokens: list[int]
    logits: Tensor  # (new tokens, vocabulary) float32, on the CPU
    cache: Any
    images: list[ReducedImage]
    clock: Clock
    report: str = ""  # of the reduction of visual tokens


@contextmanager
def patched(model: Any, **options: Any) -> Iterator[Patch]:
    """Patch the model for a block, with these arguments of `patch`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report has the skipped sites
            applied = patch(model, **options)
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"{'--reduce: ' if options else ''}{error}") from error
    with applied:
        yield applied


@torch.inference_mode()
def answer(subject: Subject, new_tokens: int, options: dict[str, Any] | None) -> Answer:
    """Answer the prompt greedily, by the model as it is (None) or patched with these options."""
    with nullcontext() if options is None else patched(subject.model, **options) as applied:
        clock = Clock()
        output = subject.model.generate(
            **subject.inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            streamer=clock,
        )
        images = [] if applied is None else applied.images
        reduction = None if applied is None else applied.reduction
        report = "" if reduction is None else reduction.report()
    tokens = output.sequences[0, subject.inputs["input_ids"].shape[1] :].tolist()
    logits = torch.stack(output.logits)[:, 0].float().cpu()
    return Answer(tokens, logits, output.past_key_values, images, clock, report)


def clocks(
    subject: Subject, new_tokens: int, repeats: int, *variants: dict[str, Any] | None
) -> list[tuple[Clock, Clock]]:
    """Time two variants, one right after the other, in alternating order."""
    pairs = []
    for turn in range(repeats):
        times = {which: answer(subject, new_tokens, variants[which]).clock for which in (turn % 2, 1 - turn % 2)}
        pairs.append((times[0], times[1]))
    return pairs


def compare(seconds: list[tuple[float, float]]) -> tuple[str, str, str]:
    """Format both columns of times and the ratio, by pairs, whose two runs met the machine in the same state.

    One pair gives no ratio: it could be noise.
    """

    def spread(values: list[float], unit: str) -> str:
        typical = f"{statistics.median(values):.2f}{unit}"
        return typical if len(values) == 1 else f"{typical} ({min(values):.2f} to {max(values):.2f})"

    before, after = ([1e3 * value for value in column] for column in zip(*seconds, strict=True))
    ratios = [one / other for one, other in seconds]
    return spread(before, " ms"), spread(after, " ms"), spread(ratios, "x") if len(seconds) > 1 else "not known"
