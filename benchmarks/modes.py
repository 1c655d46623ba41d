"""The ways to run a model: eagerly, compiled, and as a CUDA graph; each prepared once, then timed answer by answer."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vlmfast.benchmarks.forwards import STEPS, Decoding, twin
from vlmfast.benchmarks.timing import wall_seconds
from vlmfast.console import one_line

MODES = ("eager", "compile", "graph")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of the largest logit, after all layers
ROUNDINGS = 16  # between a patched model and the original on a CPU: bit-equal but for half-precision projections
GRAPHS = 64  # that torch.compile may keep of one function: each variant has two
NOT_RUN = "not run: an earlier capture in this process failed"
median = statistics.median


class CaptureError(Exception):
    """A capture was begun and not ended: nothing mends what it leaves in this process."""


class Variant:
    """A model as it is, or a patched twin that shares its weights, in one mode; `prepare` makes it ready.

    Attributes:
        error: why it has no time, in one line, or None.
        spoils: its capture failed, and with it whatever else would be measured in this process.
        facts: what is known without timing: bytes of the cache and at the peak, columns of the prompt, ...
        times: seconds of the prefill and of one step, of each round.
        eager: its logits in eager mode, and the tokens between them; None where even that failed.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], patch: dict[str, Any] | None) -> None:
        self.inputs, self.patch = inputs, patch
        self.device = inputs["input_ids"].device
        self.error: str | None = None
        self.spoils = False
        self.facts: dict[str, Any] = {}
        self.times: list[tuple[float, float]] = []
        self.eager: tuple[Tensor, list[Tensor]] | None = None
        self.prefill: Callable[[], Any] = lambda: None
        self.step: Callable[[], Any] = lambda: None
        self.model: Any = None
        with self.noted():
            self.model = twin(model, patch)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Have what goes wrong in the block be this variant's error."""
        try:
            yield
        except Exception as error:
            self.error, self.spoils = one_line(error), isinstance(error, CaptureError)

    @torch.no_grad()
    def time(self) -> None:
        """Answer the prompt once and note the seconds of the prefill and of one step, or what went wrong."""
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        with self.noted():
            self.times.append((wall_seconds(self.prefill, 1, synchronize), wall_seconds(self.step, STEPS, synchronize)))


@torch.no_grad()
def prepare(variant: Variant, mode: str, original: Variant | None = None) -> None:
    """Warm a variant: compared with the original in eager mode, then compiled or captured and compared.

    What goes wrong is its ``error``. Every variant of a process has to be there before the first one is compiled: a
    patch has torch.compile forget what it has compiled, which a timed call would then compile again. ``original`` is
    the variant that must give the same answer; None where no other does.
    """
    if variant.error is not None:
        return
    with variant.noted():
        before = torch.cuda.memory_allocated() if variant.device.type == "cuda" else 0
        model, inputs = variant.model, variant.inputs
        answer = Decoding(model, inputs)
        variant.prefill, variant.step = answer.prefill, answer.step
        with _peak(variant, before):
            variant.eager = _say(variant, answer, original)
        length = answer.cached()
        variant.facts |= {"cached_tokens": length, "cache_bytes": answer.cache_bytes()}
        if mode == "eager":
            return
        answer = Decoding(model, inputs, length)  # in the place of the first, whose memory is free again
        variant.prefill, variant.step = answer.prefill, answer.step
        answer.prefill()  # as it is: it allocates the cache, which a compiled one cannot
        if mode == "compile":
            torch._dynamo.config.recompile_limit = GRAPHS
            # The language model, which is what all families share; the vision tower and the reduction of a prompt,
            # whose shapes depend on values, stay as they are.
            model.get_decoder().compile(dynamic=False)
            _say(variant, answer, variant)
            if variant.device.type == "cpu":
                return  # an answer more is there for its peak alone
        # What a graph needs is taken when it is captured, so that this is a part of its peak.
        with _peak(variant, before):
            if mode == "graph":
                _capture(variant, answer)
            _say(variant, answer, variant)


@contextlib.contextmanager
def _peak(variant: Variant, before: int) -> Iterator[None]:
    """Note the most memory that is taken in the block, beside what was there before the preparation."""
    if variant.device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    yield
    variant.facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before


def _say(variant: Variant, answer: Decoding, like: Variant | None) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of one answer and the tokens between them: those of ``like``, whose logits must be the same.

    A token of its own might be another one where two are about as likely, and every logit after it with it.
    """
    wanted: Tensor | None = None
    tokens: list[Tensor] = []
    if like is not None:
        if like.eager is None:
            raise RuntimeError(f"nothing to compare with: {like.error}")
        wanted, tokens = like.eager
    logits, said = [variant.prefill().clone()], []
    for index in range(STEPS):
        if tokens:
            answer.token.copy_(tokens[index])
        said.append(answer.token.clone())
        logits.append(variant.step().clone())
    got = torch.cat(logits, 1)
    if wanted is not None:
        key = "difference" if like is variant else "from_original"
        variant.facts[key] = difference = float((got - wanted).abs().max() / wanted.abs().max())
        allowed = TOLERANCE[wanted.dtype]
        if like is not variant and variant.device.type == "cpu":  # as the tests of patches have it
            allowed = min(allowed, ROUNDINGS * torch.finfo(wanted.dtype).eps)
        if not difference <= allowed:
            whose = "its own in eager mode" if like is variant else "those of the original"
            raise RuntimeError(f"no speed: its logits differ from {whose} by {difference:.2g} of the largest")
    return got, said


def _capture(variant: Variant, answer: Decoding) -> None:
    """Replace the step by its CUDA graph, and the prefill by its own where the host never waits in it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is allocated or chosen at a first call must not be captured
            answer.step()
    torch.cuda.current_stream().wait_stream(stream)
    _without_waiting(answer.step)
    variant.step = _graph(answer.step)
    try:
        _without_waiting(answer.prefill)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        variant.facts["prefill_graph"] = f"none: {one_line(error)}"
        return
    variant.prefill = _graph(answer.prefill)
    variant.facts["prefill_graph"] = "captured"


def _without_waiting(call: Callable[[], Tensor]) -> None:
    """Raise what keeps the call from being captured before a capture is begun, which would break for good.

    It goes the way that it will go in the capture: transformers and vlmfast ask whether there is one, and look at masks
    only where there is none.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _graph(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture the call as a CUDA graph, which returns the same tensor each time."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = call()
    except Exception as error:
        raise CaptureError(one_line(error)) from error

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
