"""The ways to run a model: eagerly, compiled, and as a CUDA graph; each prepared once, then timed answer by answer."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.benchmarks.forwards import STEPS, Answer, twin
from vlmfast.console import one_line

MODES = ("eager", "compile", "graph")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of the largest logit, after all layers
GRAPHS = 64  # that torch.compile may keep of one function: each variant has two
median = statistics.median


class Contender:
    """One variant of a model in one mode.

    Attributes:
        error: why it has no time, in one line, or None.
        facts: what is known without timing: bytes of the cache and at the peak, columns of the prompt, ...
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.error: str | None = None
        self.facts: dict[str, Any] = {}
        self.prefill: Callable[[], Any] = lambda: None
        self.step: Callable[[], Any] = lambda: None

    @torch.no_grad()
    def time(self, times: list[tuple[float, float]]) -> None:
        """Answer the prompt once and note the seconds of the prefill and of one step."""
        prefill = self._seconds(self.prefill)
        steps = self._seconds(lambda: [self.step() for _ in range(STEPS)])
        times.append((prefill, steps / STEPS))

    def _seconds(self, call: Callable[[], Any]) -> float:
        _synchronize(self.device)
        start = time.perf_counter()
        call()
        _synchronize(self.device)
        return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(model: nn.Module, inputs: dict[str, Tensor], patch: dict[str, Any] | None, mode: str) -> Contender:
    """A variant of the model, warm: compiled, captured, and compared with what it answers eagerly.

    Args:
        model: as published; it is left as it is, and its weights are shared.
        inputs: of the prompt.
        patch: the arguments of ``vlmfast.patch``, or None for the model as it is.
        mode: one of `MODES`.

    Returns:
        The contender; whatever goes wrong in compiling or capturing is its ``error``.
    """
    contender = Contender(inputs["input_ids"].device)
    with torch.no_grad(), _peak(contender):
        try:
            _prepare(contender, twin(model, patch), inputs, mode)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            contender.error = one_line(error)
    return contender


@contextlib.contextmanager
def _peak(contender: Contender) -> Iterator[None]:
    """Note the most memory that is taken in the block beside what was there before."""
    if contender.device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    contender.facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before


def _prepare(contender: Contender, model: Any, inputs: dict[str, Tensor], mode: str) -> None:
    eager = Answer(model, inputs)
    eager.prefill()
    length = eager.cached()
    contender.facts |= {"cached_tokens": length, "cache_bytes": eager.cache_bytes()}
    wanted = [eager.step() for _ in range(STEPS)][-1]
    if mode == "eager":
        contender.prefill, contender.step = eager.prefill, eager.step
        return
    answer = Answer(model, inputs, length=length + STEPS)
    answer.prefill()  # as it is: it allocates the cache, which a compiled one cannot
    contender.prefill, contender.step = answer.prefill, answer.step
    if mode == "compile":
        torch._dynamo.config.recompile_limit = GRAPHS
        # The language model, which is what all families share; the vision tower and the reduction of a prompt, whose
        # shapes depend on values, stay as they are.
        model.get_decoder().compile(dynamic=False)
    else:
        _capture(contender, answer)
    for _ in range(2):
        contender.prefill()
        steps = [contender.step() for _ in range(STEPS)]
    got = steps[-1]
    contender.facts["difference"] = difference = float((got - wanted).abs().max() / wanted.abs().max())
    if not difference <= TOLERANCE[wanted.dtype]:
        raise RuntimeError(f"after {STEPS} steps the logits differ from eager ones by {difference:.2g} of the largest")


def _capture(contender: Contender, answer: Answer) -> None:
    """Replace the step by its CUDA graph, and the prefill by its own where the host never waits in it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is allocated or chosen at a first call must not be captured
            answer.step()
    torch.cuda.current_stream().wait_stream(stream)
    answer.prefill()
    contender.step = _graph(answer.step)
    try:
        torch.cuda.set_sync_debug_mode("error")
        answer.prefill()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a capture that fails would leave the random generator unusable
        contender.facts["prefill_graph"] = f"none: {one_line(error)}"
        return
    finally:
        torch.cuda.set_sync_debug_mode("default")
    contender.prefill = _graph(answer.prefill)
    contender.facts["prefill_graph"] = "captured"


def _graph(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph, which returns the same tensor each time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
