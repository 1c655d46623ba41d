"""The modes of a model: eager, compiled, and as a CUDA graph; each is prepared once, then timed answer by answer."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vlmfast.benchmarks.forwards import STEPS, Decoding, twin
from vlmfast.benchmarks.timing import synchronizer, wall_seconds
from vlmfast.console import one_line

MODES = ("eager", "compile", "graph")
# Largest error of the logits, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Largest error of a patched model on a CPU, in roundings: it is bit-equal except for half-precision projections.
ROUNDINGS = 16
GRAPHS = 64  # torch.compile's limit of graphs per function: each variant has two
NOT_RUN = "not run: an earlier capture in this process failed"
median = statistics.median


class CaptureError(Exception):
    """A capture failed, which leaves this process in a state that cannot be repaired."""


class Variant:
    """A model, or a patched copy that shares its weights, in one mode; `prepare` makes it ready.

    Attributes:
        error: why it has no time, in one line, or None.
        spoils: its capture failed, so that nothing else can be measured in this process.
        facts: what is known without timing, such as the bytes of the cache, the peak memory and the prompt's length.
        times: for each round, the seconds of the prefill and of one step.
        eager: its logits in eager mode, and the tokens between them; None where eager mode failed.
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
        """Record an exception in the block as this variant's error."""
        try:
            yield
        except Exception as error:
            self.error, self.spoils = one_line(error), isinstance(error, CaptureError)

    @torch.no_grad()
    def time(self) -> None:
        """Answer the prompt once and record the seconds of the prefill and of one step, or the error."""
        synchronize = synchronizer(self.device.type)
        with self.noted():
            self.times.append((wall_seconds(self.prefill, 1, synchronize), wall_seconds(self.step, STEPS, synchronize)))


@torch.no_grad()
def prepare(variant: Variant, mode: str, original: Variant | None = None) -> None:
    """Warm up a variant and check its answer: in eager mode first, then compiled or captured.

    An exception becomes its ``error``. All variants of a process must be created before the first one is compiled,
    because a patch resets torch.compile, and a timed call would then compile again. ``original`` is the variant whose
    answer must be the same; None where there is none.
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
        answer = Decoding(model, inputs, length)  # replaces the first one, whose memory is freed
        variant.prefill, variant.step = answer.prefill, answer.step
        answer.prefill()  # not compiled yet: it allocates the cache, which a compiled one cannot do
        if mode == "compile":
            torch._dynamo.config.recompile_limit = GRAPHS
            # Only the language model is compiled, which all families have. In the vision tower and the reduction of a
            # prompt, shapes depend on values.
            model.get_decoder().compile(dynamic=False)
            _say(variant, answer, variant)
            if variant.device.type == "cpu":
                return  # the further answer below only measures the peak memory
        # A graph allocates its memory during the capture, so that the capture is part of its peak.
        with _peak(variant, before):
            if mode == "graph":
                _capture(variant, answer)
            _say(variant, answer, variant)


@contextlib.contextmanager
def _peak(variant: Variant, before: int) -> Iterator[None]:
    """Record the peak memory of the block, without what was allocated before the preparation (``before`` bytes)."""
    if variant.device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    yield
    variant.facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before


def _say(variant: Variant, answer: Decoding, like: Variant | None) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of one answer and the tokens between them, and check the logits against those of ``like``.

    The tokens are those of ``like``: where two tokens are about equally likely, the variant might choose the other one,
    and all later logits would differ.
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
        if like is not variant and variant.device.type == "cpu":  # the tolerance of the tests of patches
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
        for _ in range(2):  # first calls allocate workspaces and choose kernels, which must not happen in the capture
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
    """Run the call outside a capture and raise the error that would make its capture fail, which cannot be repaired.

    The call takes the path that it will take in the capture: transformers and vlmfast ask whether there is a capture,
    and read the values of masks only where there is none.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _graph(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture the call as a CUDA graph, and return a function that replays it and returns the same tensor each time."""
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
