"""Patches among others: threads with models of their own, forks, many calls, and other models of the same classes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import vlmfast
from tests.conftest import shortens_prompts
from tests.helpers.patches_models import patched
from tests.helpers.reduce_models import Talk, clone
from vlmfast.reduce import EvenTokens, VisionZip

pytestmark = pytest.mark.skipif(not shortens_prompts(), reason="prompts can be shortened from transformers 5.17 on")
METHODS = (VisionZip(dominant=0.5, contextual=0.25), EvenTokens(0.25), None, vlmfast.FastV(3, 0.5))
PROMPTS = [(0, 10, 11), (12, 1, 13, 14), (10, 2, 15, 16, 17)]
ANSWER = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
Said = tuple[list[Any], list[Any]]


def ask(talk: Talk, number: int) -> list[list[int]]:
    inputs = clone(talk.batch(PROMPTS[number % len(PROMPTS)]))
    return talk.model.generate(**inputs, **ANSWER).tolist()


def visit(talk: Talk, number: int, method: Any) -> Said:
    """Patch, answer, undo and answer again; return what was said, the report, and which columns were kept."""
    with vlmfast.patch(talk.model, reduce=method) as patch:
        answers = [ask(talk, number)]
        last = None if patch.reduction is None else patch.reduction.last
        kept = [patch.report(), *([] if last is None else last.columns.index.tolist())]
        assert patched(talk.model)
    assert not patched(talk.model)
    return [*answers, ask(talk, number)], kept


# ---- threads ----


@pytest.fixture
def often_interrupted() -> Iterator[None]:
    """Let threads take turns every few instructions of Python."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(work: Callable[[int], None], number: int) -> None:
    """Run ``work`` in threads that begin together, and raise what went wrong in one of them."""
    wrong: list[BaseException] = []
    gate = threading.Barrier(number)

    def run(index: int) -> None:
        try:
            gate.wait(60)
            work(index)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if wrong:
        raise wrong[0]


@pytest.mark.usefixtures("often_interrupted")
def test_eight_threads_with_models_of_their_own():
    """Two threads each have models of the same classes, other pictures, and other methods."""
    talks = [Talk.of(model_type, layers=4) for model_type in ("llava", "qwen3_vl", "qwen2_5_vl", "internvl")] * 2
    talks[4:] = [Talk.of(talk.model_type, layers=4) for talk in talks[4:]]
    methods = [METHODS[(index + index // 4) % len(METHODS)] for index in range(8)]
    rounds = [
        [(index + turn, method) for turn, method in enumerate((methods[index], METHODS[(index + 1) % 4]))]
        for index in range(8)
    ]
    want = [[visit(talk, *each) for each in turns] for talk, turns in zip(talks, rounds, strict=True)]
    assert len({str(said) for turns in want for said in turns}) > 8, "the threads have nothing to mistake"

    def work(index: int) -> None:
        for each, expected in zip(rounds[index], want[index], strict=True):
            assert visit(talks[index], *each) == expected, f"{talks[index].model_type}, {each}"

    at_once(work, 8)


@pytest.mark.usefixtures("often_interrupted")
def test_threads_share_a_model_whose_prompts_are_shortened():
    """Each thread has pictures of its own; `Patch.images` is that of the prompt that was shortened last."""
    talk = Talk.of("qwen3_vl")
    with vlmfast.patch(talk.model, reduce=METHODS[0]), torch.no_grad():
        want = [talk.model(**talk.batch(prompt)).logits for prompt in PROMPTS]

        def work(index: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    assert torch.equal(talk.model(**talk.batch(PROMPTS[index])).logits, want[index])

        at_once(work, len(PROMPTS))


# ---- forks ----


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("model_type", ["qwen3_vl"])
def test_a_fork_patches_and_runs(model_type: str):
    """What is said in a child is what is said here, and a patch of the child's is none of ours."""
    talk = Talk.of(model_type)
    want = visit(talk, 0, METHODS[0])
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def child() -> None:
        torch.set_num_threads(1)
        try:
            vlmfast.patch(Talk.of(model_type).model)
            results.put(visit(talk, 0, METHODS[0]))
            vlmfast.patch(talk.model)
            talk.model(**talk.batch(PROMPTS[0]), use_cache=False).logits.sum().backward()
            results.put(len(patched(talk.model)))
        except BaseException as error:
            results.put(repr(error))

    process = context.Process(target=child, daemon=True)
    process.start()
    try:
        assert results.get(timeout=60) == want
        assert results.get(timeout=60) > 10
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
    assert not patched(talk.model)
    assert all(parameter.grad is None for parameter in talk.model.parameters())


# ---- many calls ----


def memory() -> tuple[int, int]:
    """Return how many objects of Python are alive, and the bytes of this process that are in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(gc.get_objects()), pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_five_hundred_calls_leave_nothing_behind():
    """Prompts of several pictures and answers; every tenth call is of a new patch."""
    talk = Talk.of("llava")
    batches = [talk.batch(prompt) for prompt in PROMPTS]

    def calls(number: int) -> None:
        for index in range(number // 10):
            with vlmfast.patch(talk.model, reduce=METHODS[index % 2]), torch.no_grad():
                for turn in range(9):
                    talk.model(**batches[(index + turn) % len(batches)])
                talk.model.generate(**batches[index % len(batches)], **{**ANSWER, "max_new_tokens": 2})

    calls(100)
    objects, resident = memory()
    calls(500)
    more, larger = memory()
    assert more - objects < 100, "less than one object for each patch"
    assert larger - resident < 8 * 2**20


# ---- other models ----


def seen_by_all(talk: Talk) -> dict[tuple[str, str], int]:
    """Return what every model of these classes sees: the members of its classes, and the globals of their modules."""
    classes = {base for module in talk.model.modules() for base in type(module).__mro__}
    places: dict[str, dict[str, Any]] = {f"class {cls.__module__}.{cls.__qualname__}": vars(cls) for cls in classes}
    names = {cls.__module__ for cls in classes} & set(sys.modules)
    places |= {f"module {name}": vars(sys.modules[name]) for name in names}
    places["torch.nn.functional"] = vars(torch.nn.functional)
    return {(place, name): id(value) for place, members in places.items() for name, value in members.items()}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl"])
def test_a_patch_does_not_show_in_other_models(model_type: str, method: Any):
    talk, other = Talk.of(model_type, layers=4), Talk.of(model_type, layers=4)
    inputs = other.batch(*PROMPTS)

    def outcome() -> list[Tensor]:
        with torch.no_grad():
            output = other.model(**inputs, output_hidden_states=True)
        return [output.logits, *output.hidden_states]

    want, said = outcome(), ask(other, 1)
    ask(talk, 1)  # what is made at a first call is there
    before = seen_by_all(other)
    with vlmfast.patch(talk.model, reduce=method):
        assert ask(talk, 1)
        assert {key for key, value in seen_by_all(other).items() if before.get(key) != value} == set()
        assert all(map(torch.equal, outcome(), want))
        assert ask(other, 1) == said
        assert not patched(other.model)
    assert seen_by_all(other) == before
