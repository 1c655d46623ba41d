"""Attention of vision towers within segments: bit-equal to upstream or as accurate, with one wait and few calls."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers.segments_of_towers import (
    CLASSES,
    HEAD_DIM,
    HEADS,
    IMPLEMENTATIONS,
    LENGTHS,
    WIDTH,
    attention_of,
    inputs_of,
    results,
)
from vlmfast.benchmarks import counting
from vlmfast.patches import segments
from vlmfast.patches.plan import find_sites
from vlmfast.patches.segments import Segments, segments_of


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def calls_of_attention(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[torch.Size]:
    """Record the shapes of the queries that the attention function gets from now on."""
    shapes: list[torch.Size] = []
    function: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(query.shape)
        return function(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return shapes


# ---- numbers ----


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", CLASSES)
def test_each_segment_attends_to_itself(name: str, lengths: list[int], implementation: str):
    """In float32 SDPA runs the same kernel for one segment and for a batch, so results are bit-equal."""
    module, inputs = attention_of(name, implementation), inputs_of(lengths)
    want = results(module, inputs)
    with vlmfast.patch(module) as patch:
        assert patch.replaced == {f"{name}.forward": 1}
        got = results(module, inputs)
    assert torch.equal(got[0], want[0]) or implementation == "eager"
    for mine, theirs in zip(got, want, strict=True):  # the matmul of a batch may sum in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, results(module, inputs), want)), "undone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS[name] for name in ("windows", "windows with edges", "images")])
def test_error_is_that_of_upstream(lengths: list[int], dtype: torch.dtype, implementation: str):
    module, inputs = attention_of(implementation=implementation, head_dim=80).to(dtype), inputs_of(lengths, dtype, 80)
    exact = results(copy.deepcopy(module).double(), {**inputs, "hidden_states": inputs["hidden_states"].double()})
    upstream = results(module, inputs)
    with vlmfast.patch(module):
        got = results(module, inputs)
    for mine, theirs, true in zip(got, upstream, exact, strict=True):
        assert mine.dtype == theirs.dtype
        rounding = torch.finfo(dtype).eps / 2 * true.norm()
        assert (mine - true).norm() <= 1.05 * (theirs - true).norm() + rounding


def test_windows_cannot_be_exchanged():
    """A token that attends to another segment has another result, otherwise the comparisons above prove nothing."""
    module, inputs = attention_of(), inputs_of([4, 8, 4])
    moved = {**inputs, "cu_seqlens": torch.tensor([0, 8, 12, 16], dtype=torch.int32)}
    with vlmfast.patch(module):
        assert not torch.allclose(module(**inputs), module(**moved))


def test_eager_attention_holds_few_scores(monkeypatch: pytest.MonkeyPatch):
    module, inputs = attention_of(implementation="eager"), inputs_of(LENGTHS["windows with edges"])
    want, names = module(**inputs), segments.names_of(type(module), "forward")
    with vlmfast.patch(module):
        for scores, most in ((2 * HEADS * 16**2, 2), (1, 1)):
            seen: list[int] = []
            eager = names["eager_attention_forward"]

            def counted(module: Any, query: Tensor, *args: Any, eager: Any = eager, seen: Any = seen, **kwargs: Any):
                seen.append(query.shape[0] * query.shape[2] ** 2)
                return eager(module, query, *args, **kwargs)

            monkeypatch.setattr(segments, "EAGER_SCORES", scores)
            monkeypatch.setitem(names, "eager_attention_forward", counted)
            torch.testing.assert_close(module(**inputs), want)
            assert max(seen) == most * 16**2
            monkeypatch.setitem(names, "eager_attention_forward", eager)


# ---- calls and waits ----


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_as_many_calls_as_lengths(lengths: list[int], monkeypatch: pytest.MonkeyPatch):
    module, inputs = attention_of(), inputs_of(lengths)
    with vlmfast.patch(module):
        shapes = calls_of_attention(monkeypatch, module)
        module(**inputs)
    assert sorted(shapes) == sorted(
        (lengths.count(length), HEADS, length, HEAD_DIM) for length in set(lengths) if length
    )


@pytest.mark.parametrize("lengths", [LENGTHS["windows"], LENGTHS["windows with edges"]], ids=str)
def test_blocks_ask_once_for_each_ends(lengths: list[int]):
    module, other = attention_of(), attention_of()
    inputs, ends = inputs_of(lengths), inputs_of([sum(lengths)])["cu_seqlens"]
    for each in (module, other):
        counting.move(each)
    cos, sin = map(counting.put, inputs["position_embeddings"])
    given = {"hidden_states": counting.put(inputs["hidden_states"]), "position_embeddings": (cos, sin)}
    mine, theirs = counting.put(inputs["cu_seqlens"]), counting.put(ends)
    with vlmfast.patch(module), vlmfast.patch(other), counting.count() as found:
        for cu_seqlens, waits in ((mine, 1), (mine, 1), (theirs, 2), (mine, 2), (theirs, 2)):
            module(**given, cu_seqlens=cu_seqlens)
            other(**given, cu_seqlens=cu_seqlens)
            assert found.waits.total() == waits


def test_ends_that_were_changed_are_asked_for_again():
    """Nor is a stale value used for inference tensors, which have no version counter."""
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    told: list[Segments] = []

    def ask(cu_seqlens: Tensor) -> Segments:
        told.append(Segments((), ()))
        return told[-1]

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Segments, "of", ask)
        assert segments_of(ends) is segments_of(ends) is told[0]
        ends[1:].add_(1)
        assert segments_of(ends) is segments_of(ends) is told[1]
        assert segments_of(ends.clone()) is told[2]
        with torch.inference_mode():
            inferred = ends.clone()
        assert segments_of(inferred) is not segments_of(inferred)
        context.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = ends.as_subclass(type("OnGpu", (Tensor,), {"is_cuda": True}))
        assert segments_of(captured) is not segments_of(captured)


def test_an_array_behind_the_ends_may_change():
    array = inputs_of([4, 4, 8])["cu_seqlens"].numpy()
    module, inputs = attention_of(), {**inputs_of([4, 4, 8]), "cu_seqlens": torch.from_numpy(array)}
    with vlmfast.patch(module):
        module(**inputs)
        array[:] = [0, 8, 12, 16]
        got = module(**inputs)
    assert torch.equal(got, module(**inputs))


def test_what_inference_has_kept_can_be_used_in_training():
    module, inputs = attention_of(), inputs_of(LENGTHS["windows with edges"])
    want = results(module, inputs)
    with vlmfast.patch(module), pytest.MonkeyPatch.context() as context:
        context.setattr("vlmfast.host.notices_writes", lambda tensor: not tensor.is_inference())
        with torch.inference_mode():
            module(**inputs)
        assert hasattr(inputs["cu_seqlens"], "_segments")
        assert torch.equal(results(module, inputs)[1], want[1])


def test_two_threads_share_a_module():
    """Each thread has its own images."""
    module = attention_of()
    inputs = [inputs_of(lengths) for lengths in ([16, 8, 16], [8, 16, 16], [4] * 10, [40])]
    want = [module(**each) for each in inputs]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(30):
            if not torch.equal(module(**inputs[number]), want[number]):
                wrong.append(number)

    with vlmfast.patch(module):
        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- cases that are left to upstream ----


def test_ends_that_do_not_fit_are_refused_as_upstream_does(implementation: str):
    """Only some releases and implementations refuse an empty segment."""
    module, inputs = attention_of(implementation=implementation), inputs_of([4, 8])

    def outcome(**given: Any) -> str:
        try:
            return str(module(**given))
        except Exception as error:  # the type of upstream's error varies
            return repr(error)

    for ends in ([0, 4, 11], [0, 4, 13], [0], [0, 14, 12], [0, 4, 4, 12]):
        wrong = {**inputs, "cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
        want = outcome(**wrong)
        with vlmfast.patch(module):
            assert outcome(**wrong) == want
        assert "Error" in want or ends[1] == ends[2]


def test_ends_may_begin_anywhere():
    module, inputs = attention_of(), inputs_of([4, 8])
    inputs["cu_seqlens"] += 3
    want = module(**inputs)
    with vlmfast.patch(module):
        assert torch.equal(module(**inputs), want)


def test_hooks_of_the_parts_are_called(implementation: str):
    """Modules that replace a part, such as an adapter, are called as well."""
    module, inputs = attention_of(implementation=implementation), inputs_of(LENGTHS["windows with edges"])
    module.proj = nn.Sequential(module.proj, nn.Linear(WIDTH, WIDTH))

    def seen() -> list[Any]:
        found: list[Any] = []
        handles = [
            part.register_forward_hook(lambda part, args, output: found.append((part, output.clone())))
            for part in (module, module.qkv, module.proj)
        ]
        handles.append(module.proj.register_forward_hook(lambda part, args, output: 2 * output))
        found.append((None, module(**inputs)))
        for handle in handles:
            handle.remove()
        return found

    want = seen()
    with vlmfast.patch(module):
        got = seen()
    assert [part for part, _ in got] == [part for part, _ in want]
    for (_, mine), (_, theirs) in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_attention_of_others_is_called_as_before(monkeypatch: pytest.MonkeyPatch):
    """A foreign attention function, registered under its own name or as "sdpa", is called segment by segment."""
    functions = segments.names_of(type(attention_of()), "forward")["ALL_ATTENTION_FUNCTIONS"]
    theirs = functions["sdpa"]
    for name in ("mine", "sdpa"):
        seen: list[int] = []

        def attention(module: Any, query: Tensor, *args: Any, seen: list[int] = seen, **kwargs: Any) -> Any:
            seen.append(query.shape[2])
            return theirs(module, query, *args, **kwargs)

        functions.register(name, attention)
        module, inputs = attention_of(implementation=name), inputs_of([4, 4, 8])
        try:
            with vlmfast.patch(module):
                module(**inputs)
        finally:
            functions.register("sdpa", theirs)
        assert seen == [4, 4, 8]


def test_dropout_draws_as_upstream():
    module, inputs = attention_of().train(), inputs_of([4, 4, 8])
    module.attention_dropout = 0.5
    torch.manual_seed(3)
    want = module(**inputs)
    with vlmfast.patch(module):
        torch.manual_seed(3)
        assert torch.equal(module(**inputs), want)
        assert not torch.equal(module.eval()(**inputs), want)


def test_arguments_go_on_to_attention():
    """For example a position bias, which is added to the logits."""
    module, inputs = attention_of(), inputs_of([4, 4])
    sdpa = segments.names_of(type(module), "forward")["ALL_ATTENTION_FUNCTIONS"]["sdpa"]
    if "position_bias" not in inspect.signature(sdpa).parameters:
        pytest.skip("this transformers adds no bias")
    bias = torch.randn(1, HEADS, 4, 4)
    want = module(**inputs, position_bias=bias)
    with vlmfast.patch(module):
        assert torch.equal(module(**inputs, position_bias=bias), want)
        assert not torch.equal(module(**inputs), want)


@pytest.mark.thorough
def test_a_compiled_tower_breaks_where_upstream_does():
    module, inputs = attention_of(), inputs_of([4, 4, 8])
    found = []
    for patched in (False, True):
        torch._dynamo.reset()
        twin = copy.deepcopy(module)
        if patched:
            vlmfast.patch(twin)
        explained = torch._dynamo.explain(twin)(**inputs)
        found.append((explained.graph_break_count, explained.graph_count))
        compiled = torch.compile(twin, backend="eager")
        assert torch.equal(compiled(**inputs), module(**inputs))
    assert found[1] == found[0]


# ---- attention of segments of any lengths, on a GPU ----


def by_segments(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int) -> Tensor:
    """Compute what varlen attention computes, one segment after the other."""
    assert torch.equal(cu_q, cu_k)
    assert longest == (max(cu_q.diff()), max(cu_k.diff()))
    lengths = cu_q.diff().tolist()
    parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    attended = (
        torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)).transpose(0, 1)
        for part in parts
    )
    return torch.cat(list(attended))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_varlen_attention_gets_the_tokens_in_their_order(lengths: list[int], monkeypatch: pytest.MonkeyPatch):
    module, inputs = attention_of(), inputs_of(lengths)
    want = module(**inputs)
    monkeypatch.setattr(segments, "_varlen", lambda *_: by_segments)
    with vlmfast.patch(module):
        torch.testing.assert_close(module(**inputs), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [64, 72, 80])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_varlen_attention_is_no_worse(lengths: list[int], head_dim: int):
    module, inputs = attention_of(head_dim=head_dim), inputs_of(lengths, torch.bfloat16, head_dim)
    module = module.to("cuda", torch.bfloat16)
    given = {
        "hidden_states": inputs["hidden_states"].cuda(),
        "cu_seqlens": inputs["cu_seqlens"].cuda(),
        "position_embeddings": tuple(part.cuda() for part in inputs["position_embeddings"]),
    }
    exact = results(copy.deepcopy(module).double(), {**given, "hidden_states": given["hidden_states"].double()})
    upstream = results(module, given)
    with vlmfast.patch(module):
        got = results(module, given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(**given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for mine, theirs, true in zip(got, upstream, exact, strict=True):
        rounding = torch.finfo(torch.bfloat16).eps / 2 * true.norm()
        assert (mine - true).norm() <= 1.05 * (theirs - true).norm() + rounding


def test_only_known_bodies_are_replaced():
    """A body that differs in one word is left alone, without a warning, because it does not look like a norm."""
    cls = type(attention_of())

    class Scaled(cls):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states, cu_seqlens, position_embeddings=None, max_seqlen=None, **kwargs):  # type: ignore[no-untyped-def]
            return 2 * super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)

    module = attention_of()
    module.__class__ = Scaled
    assert not find_sites(module)
