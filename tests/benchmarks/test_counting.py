"""The counter of launches and host synchronisations: what counts, and that values do not change."""

from __future__ import annotations

import dataclasses
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import shortens_prompts
from tests.helpers import traffic
from tests.helpers.cases import each, launches_of, outputs
from tests.helpers.published_models import little
from tests.helpers.thorough import first_of
from vlmfast.benchmarks import counting, launches
from vlmfast.benchmarks.forwards import STEPS, Decoding, patches_of, twin
from vlmfast.benchmarks.published import MODELS
from vlmfast.registry import OPS, Op


def counted(call, *values):
    """Call a function with tensors on the device; return the counts and its result."""
    tensors = [counting.put(value) if isinstance(value, torch.Tensor) else value for value in values]
    with counting.count() as found:
        result = call(*tensors)
    return found, [counting.values(tensor) if counting.is_put(tensor) else tensor for tensor in outputs(result)]


MASK = torch.tensor([True, False, True, True])
COLUMNS = torch.tensor([True, False, False, True, True, False])
# The arguments of the calls below, by parameter name.
GIVEN = {"x": torch.randn(4, 6), "rows": torch.tensor([2, 0]), "mask": MASK, "columns": COLUMNS}


def into(change):
    """Make a call that changes its first argument in place and returns it."""

    @functools.wraps(change)
    def call(x, **rest):
        change(x, **rest)
        return x

    return call


CALLS = {
    # name: (call, launches, waits); None: any number
    "views": (lambda x: x.view(2, 12).t()[1:].unsqueeze(0).expand(3, -1, -1), 0, 0),
    "contiguous": (lambda x: x.t().contiguous(), 1, 0),
    "in place": (lambda x: x.t().add_(1), 1, 0),
    "allocation": (lambda x: (torch.empty_like(x), x.new_empty(3)), 0, 0),
    "made there": (lambda x: torch.arange(3, device=x.device), 1, 0),
    "made on the host": (lambda x: torch.arange(3) + 1, 0, 0),
    "empty": (lambda x: x[:0] + 1, 0, 0),
    "linear": (lambda x: F.linear(x, x), 1, 0),
    "cast": (lambda x: x.to(torch.bfloat16), 1, 0),
    "attention": (lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3) * 0, 2, 0),
    # values that the host reads
    "item": (lambda x: torch.tensor(x.sum().item()), 1, 1),
    "branch": (lambda x: x if x.sum() > 0 else -x, None, 1),
    "tolist": (lambda x: torch.tensor(x.tolist()), 0, 1),
    "bound of a slice": (lambda x, rows: x[: rows[0]], 0, 1),
    "nonzero": (lambda x: x.nonzero(), 1, 1),
    "unique": (lambda x: x.unique(), 1, 1),
    "repeat_interleave": (lambda x, rows: x[:2].repeat_interleave(rows, 0), 2, 2),
    "masked_fill with a number of the device": (lambda x: x.masked_fill(x > 0, x[0, 0]), 2, 1),
    "masked_fill with a number": (lambda x: x.masked_fill(x > 0, 3.0), 2, 0),
    "index_fill with a number of the device": (lambda x, rows: x.index_fill(0, rows, x[0, 0]), 1, 1),
    # copies
    "to the host": (lambda x: x.cpu() * 2, 0, 1),
    "a number into a tensor of the host": (lambda x: torch.ones(3).fill_(x[0, 0]), 0, 1),
    "from the host": (lambda x: x + torch.ones(6).to(x.device), 2, 1),
    "from the host without waiting": (lambda x: torch.ones(6).to(x.device, non_blocking=True), 1, 0),
    "copy_ of a number": (into(lambda x: x.copy_(3.0)), 1, 1),
    "copy_ of nothing": (into(lambda x: x[:0].copy_(torch.ones(6))), 0, 0),
    "fill_": (into(lambda x: x.fill_(3.0)), 1, 0),
    "fill_ from the host": (into(lambda x: x.fill_(torch.tensor(3.0))), 1, 0),
    "tensor of a number": (lambda x: torch.tensor(3.0, device=x.device), 1, 1),
    "asarray": (lambda x: torch.asarray([3.0], device=x.device), 1, 1),
    "new_tensor": (lambda x: x.new_tensor([1, 2]), 1, 1),
    "where": (lambda x: torch.where(x > 0, x, torch.tensor(0.0)), 2, 1),
    "where with a number": (lambda x: torch.where(x > 0, x, 0.0), 3, 0),
    "times a number of the host": (lambda x: x * torch.tensor(2.0), 1, 0),
    # indices
    "rows": (lambda x, rows: x[rows], 1, 0),
    "rows of the host": (lambda x: x[torch.tensor([0, 2])], 1, 1),
    "a list": (lambda x: x[:, [0, 2]], 2, 1),
    "a list of truths": (lambda x: x[[True, False, True, False]], 2, 2),
    "a mask": (lambda x, mask: x[mask], 1, 1),
    "two masks": (lambda x, mask, columns: x[mask, columns], 1, 2),
    "a mask of the host": (lambda x: x[MASK], 1, 0),
    "masked_select": (lambda x, mask: x.masked_select(mask[:, None]), 1, 1),
    "row set to a number": (into(lambda x: x.__setitem__(0, 3.0)), 1, 0),
    "element set to a number": (into(lambda x: x.__setitem__((0, 0), 3.0)), 1, 1),
    "row set within the device": (into(lambda x: x.__setitem__(0, x[1])), 1, 0),
    "rows set to a number": (into(lambda x, rows: x.__setitem__(rows, 3.0)), 1, 1),
    "rows set within the device": (into(lambda x, rows: x.__setitem__(rows, x[2:].clone())), 2, 0),
    "mask set to a number": (into(lambda x, mask: x.__setitem__(mask, 3.0)), 1, 0),
    "mask of the host set to a number": (into(lambda x: x.__setitem__(MASK, 3.0)), 1, 1),
    "mask set within the device": (into(lambda x, mask: x.__setitem__(mask, x[1:].clone())), 2, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_counts(name: str):
    call, launched, waits = CALLS[name]
    given = {name: GIVEN[name] for name in inspect.signature(call).parameters}
    found, got = counted(
        lambda *values: call(**dict(zip(given, values, strict=True))), *map(torch.clone, given.values())
    )
    assert launched is None or found.launches.total() == launched, found.launches
    assert found.waits.total() == waits, found.waits
    if name not in ("allocation", "attention"):
        want = call(**{name: value.clone() for name, value in given.items()})
        for g, w in zip(got, outputs(want), strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("op", each(op for op in OPS.values() if op.compose is None and op.cases.compute_bound is None))
def test_an_op_counts_as_what_its_launcher_starts(op: Op):
    _, args = traffic.workload(op)
    found, _ = counted(op.function, *args)
    assert found.launches.total() == launches_of(op, "triton"), found
    assert not found.waits


# ---- whole models ----


def test_waits_are_seen_where_they_are(monkeypatch):
    from transformers.models.llama import modeling_llama

    llava = little("llava-1.5-7b")
    before, _, _ = launches.count(llava)
    forward = modeling_llama.LlamaMLP.forward

    def planted(self, x):
        x.sum().item()
        return forward(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", planted)
    after, _, _ = launches.count(llava)
    for part in ("prefill", "decode"):
        assert after[part]["syncs"] == before[part]["syncs"] + 2  # layers
        assert after[part]["launches"] == before[part]["launches"] + 2


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen3-vl-8b"])
def test_patched_models_launch_less(name: str):
    model = little(name)
    if not shortens_prompts():
        model = dataclasses.replace(model, method=None)
    original, patched, *reduced = launches.count(model)
    layers, norm = 2, 8  # two casts, pow, mean, add, rsqrt, mul, mul
    rotary = 2 * 5 + (2 * norm if "qwen3" in name else 0)  # of queries and keys; q_norm and k_norm
    layer = 7 + 1 + 2 + 2 * (norm + 1) + rotary + 2  # linear, attention, cache, residual, activation and product
    saved = original["decode"]["launches"] - patched["decode"]["launches"]
    assert saved == layers * (layer - 14) + norm - 1  # and the norm before the first layer
    assert [counted["decode"]["syncs"] for counted in (original, patched)] == [0, 0]
    assert patched["prefill"]["launches"] < original["prefill"]["launches"] - saved
    assert patched["prefill"]["syncs"] < original["prefill"]["syncs"]
    assert patched["cached_tokens"] == patched["prompt_tokens"]
    for record in reduced:
        assert record["cached_tokens"] < patched["cached_tokens"]
        assert record["decode"] == patched["decode"]


def test_the_width_changes_no_count():
    narrow = little("llava-1.5-7b")
    wide = dataclasses.replace(narrow, small_text={**narrow.small_text, "hidden_size": 128, "intermediate_size": 200})
    assert list(launches.count(narrow)) == list(launches.count(wide, "small"))


@pytest.mark.parametrize("name", first_of(MODELS))
def test_a_step_can_be_captured(name: str, monkeypatch):
    """In every variant, a step with a static cache never makes the host wait; nor does a patched LLaVA's prefill."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = little(name)
    original, inputs = model.build("narrow", torch.bfloat16, "cpu")
    counting.move(original)
    on_device = {key: counting.put(value) for key, value in inputs.items()}
    for variant, arguments in patches_of(model).items():
        if variant == "reduced" and not shortens_prompts():
            continue
        with counting.count():
            answer = Decoding(twin(original, arguments), on_device, inputs["input_ids"].shape[1] + STEPS)
            answer.prefill()
        with counting.count() as prefill:
            answer.prefill()
        with counting.count() as step:
            answer.step()
        assert not step.waits
        if name in ("llava-1.5-7b", "internvl3-8b"):
            assert (not prefill.waits) == (variant == "patched"), prefill.waits
