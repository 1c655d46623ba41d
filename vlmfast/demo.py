"""``python -m vlmfast demo``: one image and one prompt, answered before and after `patch`."""

from __future__ import annotations

import itertools
import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmfast import demo_compare, demo_reduce
from vlmfast.backends import LOADERS, Backend
from vlmfast.console import CommandError, console, cpu_capabilities, facts, one_line, table, usable_device
from vlmfast.demo_answers import Answer, Clock, answer, clocks, compare, patched
from vlmfast.demo_model import Subject, checkpoint, open_image, random_qwen3_vl
from vlmfast.registry import OPS, Op, override


def run(options: Namespace) -> int:
    """Print the comparison; 0 if patched and original generate the same tokens, 1 if not."""
    out = console()
    device = usable_device(options.device)
    path = options.overlay or Path("reduced.png" if options.compare is None else "compared.png")
    _check(options, path)
    picture = open_image(options.image)
    subject = _load(options, device, picture)
    if options.reduce is not None:
        with patched(subject.model, reduce=options.reduce):
            pass  # patching refuses bad arguments now, before the run
    _describe(out, subject, options)
    if options.compare is not None:
        demo_compare.compare(out, subject, options.compare, picture, path, options.repeats)
        return 0
    with patched(subject.model) as applied:
        out.print(applied.report(), markup=False, soft_wrap=True)

    with out.status("comparing"):  # also the warm-up
        original = _as_it_is(subject, options.new_tokens)
        with _calls() as calls:
            other = answer(subject, options.new_tokens, {})
    _print_calls(out, calls)
    same = _print_comparison(out, subject, original, other)

    with out.status("measuring"):
        pairs = clocks(subject, options.new_tokens, options.repeats, None, {})
    _print_times(out, pairs)
    if device.type == "cpu":
        out.print("On a CPU the matmuls take nearly all of the time: expect a few per cent.")
    if options.reduce is not None:
        out.print()
        demo_reduce.compare(out, subject, options.reduce, picture, path, options.repeats)
    return 0 if same else 1


# ---- load ----


def _check(options: Namespace, path: Path) -> None:
    """Refuse options that have no effect beside the others, and a picture that could not be written after the run."""
    if options.reduce is not None and options.compare is not None:
        raise CommandError("--compare: not beside --reduce, whose method it can take as well")
    if options.reduce is not None or options.compare is not None:
        demo_reduce.check_overlay(path)
    elif options.overlay is not None:
        raise CommandError("--overlay: there is nothing to draw without --reduce or --compare")
    if options.model is not None and options.layers is not None:
        raise CommandError("--layers: is of the random model, not of --model")


def _load(options: Namespace, device: torch.device, image: Any) -> Subject:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    if options.model is not None:
        return checkpoint(options.model, image, options.prompt, device, dtype)
    return random_qwen3_vl(image, options.prompt, device, dtype or _quick_dtype(device), options.layers or 30)


def _quick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, but float32 on CPUs that can only emulate it."""
    emulated = device.type == "cpu" and not any(
        present for name, present in cpu_capabilities().items() if name.endswith("bf16")
    )
    return torch.float32 if emulated else torch.bfloat16


# ---- run ----


def _as_it_is(subject: Subject, new_tokens: int) -> Answer:
    """Answer by the unpatched model; an error there is not vlmfast's."""
    try:
        return answer(subject, new_tokens, None)
    except Exception as error:
        raise CommandError(f"the model cannot answer, even without vlmfast: {one_line(error)}") from error


@dataclass
class Calls:
    """The number of calls of an op on one backend, and why the backends before it declined the first one."""

    number: int
    refusals: list[str]


@contextmanager
def _calls() -> Iterator[dict[tuple[str, str], Calls]]:
    """Note each op call inside the block: (op, backend) -> `Calls`."""
    noted: dict[tuple[str, str], Calls] = {}

    def noting(entry: Op, backend: Backend) -> Backend:
        def run(*args: Any, **kwargs: Any) -> Any:
            if (entry.name, backend.name) not in noted:
                refusals = [f"{name}: {reason}" for name, reason in entry.refusals(*args, **kwargs) if reason]
                noted[entry.name, backend.name] = Calls(0, refusals)
            noted[entry.name, backend.name].number += 1
            return backend.run(*args, **kwargs)

        return replace(backend, run=run)

    with ExitStack() as overrides:
        for entry, name in itertools.product(OPS.values(), LOADERS):
            overrides.enter_context(override(entry, name, noting(entry, entry.backend(name))))
        yield noted


# ---- print ----


def _describe(out: Console, subject: Subject, options: Namespace) -> None:
    model, prompt_tokens = subject.model, subject.inputs["input_ids"].shape[1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    image = f"{options.image.name}, {subject.image_size[0]} x {subject.image_size[1]}"
    if subject.visual_tokens is not None:
        image += f", {subject.visual_tokens} visual tokens"
    rows = facts()
    rows.add_row("model", f"{subject.title} ({model.config.model_type}, {parameters / 1e6:.0f} M parameters)")
    rows.add_row("on", f"{_device_name(model.device)}, {str(model.dtype).removeprefix('torch.')}")
    rows.add_row("image", image)
    rows.add_row("prompt", f"{options.prompt!r}, {prompt_tokens} tokens with the image")
    out.print(rows)
    if options.model is None:
        out.print("The weights are random: the text means nothing, only its equality and the times do.")
    out.print()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} (threads: {torch.get_num_threads()})" if device.type == "cpu" else str(device)


def _print_calls(out: Console, calls: dict[tuple[str, str], Calls]) -> None:
    rows, refused = table("op", "backend that ran", "calls"), defaultdict[str, list[str]](list)
    for (name, backend), noted in calls.items():
        rows.add_row(name, backend, str(noted.number))
        for refusal in noted.refusals:
            refused[refusal].append(name)
    out.print(rows)
    for refusal, names in refused.items():
        out.print(f"passed over {refusal} ({', '.join(names)})", markup=False)
    if all(backend == "torch" for _, backend in calls):
        out.print(
            "Every call ran on its definition in plain PyTorch: expect no speed-up, only the noise of this machine."
        )


def _print_comparison(out: Console, subject: Subject, original: Answer, patched: Answer) -> bool:
    for name, given in (("original", original), ("patched", patched)):
        out.print(f"{name:9}{subject.decode(given.tokens)!r}", markup=False, soft_wrap=True)
    same = original.tokens == patched.tokens
    differ = [one != other for one, other in zip(original.tokens, patched.tokens, strict=False)]
    compared = len(differ) if same else differ.index(True) + 1  # logits of equal inputs
    if same:
        out.print(f"generated ids: EQUAL, all {compared}")
    else:
        best, second = original.logits[compared - 1].topk(2).values.tolist()
        out.print(
            f"generated ids: DIFFERENT from token {compared} on, where the original's best two logits are "
            f"{best:.6g} and {second:.6g}"
        )
    difference = (original.logits[:compared] - patched.logits[:compared]).abs().max().item()
    largest = original.logits[:compared].abs().max().item()
    out.print(f"largest logit difference: {difference:.3g} (of logits up to {largest:.3g})")
    return same


def _print_times(out: Console, pairs: list[tuple[Clock, Clock]]) -> None:
    rows = table("median (range)", "original", "patched", "speed-up")
    rows.add_row("first token", *compare([(before.first, after.first) for before, after in pairs]))
    if all(clock.following for pair in pairs for clock in pair):
        each = [(statistics.median(before.following), statistics.median(after.following)) for before, after in pairs]
        rows.add_row("each further token", *compare(each))
    out.print(rows)
    ratio = "the speed-up is taken pair by pair" if len(pairs) > 1 else "one gives no speed-up: --repeats 5 would"
    out.print(
        f"Pairs of generate() measured: {len(pairs)}, original and patched in turns after a warm-up; {ratio}. "
        "The first token includes the vision tower and the prefill."
    )
