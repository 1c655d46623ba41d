"""Models whose visual tokens are cut between layers: training, copies, threads, reports, and what is refused."""

from __future__ import annotations

import argparse
import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers.cut_models import Masked
from tests.helpers.reduce_models import WORD, Talk
from tests.reduce.test_cuts import HALF, HYBRID, LAYERS, METHOD, PROMPTS, assert_close, logits, patched, talk_of
from vlmfast import demo_reduce
from vlmfast.reduce import EvenTokens, FastV, LayerMethod, PyramidDrop, VisionZip, spelling
from vlmfast.reduce.costs import Shape

TYPES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl")


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


# ---- training ----


@pytest.mark.parametrize("model_type", TYPES)
def test_loss_and_gradients_are_those_of_the_masked_model(model_type: str):
    talk, prompt = talk_of(model_type), PROMPTS[2]
    inputs, own = talk.batch(prompt), Masked(talk, PROMPTS[2], HALF)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < WORD, -100)
    watched = [parameter for parameter in talk.model.parameters() if parameter.requires_grad]

    def gradients(loss: Tensor) -> list[Tensor]:
        return [x for x in torch.autograd.grad(loss, watched, allow_unused=True) if x is not None]

    want_loss = nn.functional.cross_entropy(own.differentiable()[:-1], labels[0, 1:])
    want = gradients(want_loss)
    talk.model.train()
    for checkpoints in (False, True):
        if checkpoints:
            talk.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with patched(talk):
            output = talk.model(**inputs, labels=labels, use_cache=False)
            assert output.logits.shape[1] == labels.shape[1]
            torch.testing.assert_close(output.loss, want_loss.to(output.loss.dtype), rtol=1e-6, atol=1e-6)
            got = gradients(output.loss)
        for found, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_prompt_of_embeddings_is_not_cut_in_silence():
    """As compress_inputs gives it under transformers 5.17."""
    talk = talk_of("llava")
    embeddings = talk.model.get_input_embeddings()(talk.batch(PROMPTS[0])["input_ids"])
    with patched(talk):
        with pytest.warns(UserWarning, match="no visual tokens are cut between layers of a prompt .* as inputs_embeds"):
            talk.model.generate(inputs_embeds=embeddings, max_new_tokens=2)
        with pytest.warns(UserWarning, match="inputs_embeds"):
            talk.model(inputs_embeds=embeddings)


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_to_keep_are_those_of_the_last_columns(model_type: str):
    talk = talk_of(model_type)
    inputs = talk.batch(*PROMPTS)
    with torch.no_grad(), patched(talk):
        whole = talk.model(**inputs).logits
        for last in (1, 3, whole.shape[1] - 2):
            assert_close(talk.model(**inputs, logits_to_keep=last).logits, whole[:, -last:])


# ---- copies, threads, undo ----


def test_a_patch_ends_and_copies_are_cut():
    talk = talk_of("llava")
    inputs = talk.batch(*PROMPTS)
    before = [(type(module), list(vars(module))) for module in talk.model.modules()]
    full = logits(talk, inputs)
    with patched(talk) as patch:
        cut = logits(talk, inputs)
        twin = copy.deepcopy(talk.model)
        talk.model.model.language_model.layers[0].self_attn.config = talk.model.config.get_text_config()
    assert [(type(module), list(vars(module))) for module in talk.model.modules()] == before
    assert torch.equal(logits(talk, inputs), full)
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, cut)
        vlmfast.unpatch(twin)
        assert torch.equal(twin(**inputs).logits, full)
    assert "64 in layers 0-1, 32 in layers 2-3" in patch.report()


def test_threads_do_not_see_each_others_cuts():
    talk = talk_of("llava")
    inputs = [talk.batch(prompt) for prompt in (*PROMPTS, *PROMPTS)]
    found: list[Any] = [None] * len(inputs)
    with patched(talk):
        want = [logits(talk, each) for each in inputs]

        def work(number: int) -> None:
            found[number] = logits(talk, inputs[number])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(got, one) for got, one in zip(found, want, strict=True))


def test_a_run_that_fails_leaves_nothing():
    talk = talk_of("llava")
    with patched(talk):
        want = logits(talk, talk.batch(*PROMPTS))
        wrong = talk.batch(PROMPTS[1])
        wrong["pixel_values"] = wrong["pixel_values"].repeat(2, 1, 1, 1)
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            talk.model(**wrong)
        text = {"input_ids": torch.tensor([[1, 10, 11]])}
        talk.model(**text)  # would be refused if state of the failed run were left
        assert torch.equal(logits(talk, talk.batch(*PROMPTS)), want)


def test_a_compiled_model_is_cut():
    talk = talk_of("llava", torch.float32)
    inputs = talk.batch(PROMPTS[1])
    with patched(talk):
        want = logits(talk, inputs)
        compiled = torch.compile(talk.model, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, want)


# ---- the report ----


@pytest.mark.parametrize("model_type", [*TYPES, "qwen3_vl_moe"])
def test_costs_are_those_that_torch_counts(model_type: str):
    from torch.utils.flop_counter import FlopCounterMode

    talk = Talk.of(model_type, torch.float32, LAYERS)
    layers = talk.model.base_model.language_model.layers
    talk.model.set_attn_implementation("eager")
    if model_type.endswith("moe"):
        talk.model.set_experts_implementation("eager")
    shape, inputs = Shape.of(talk.model), talk.batch((10, 0, 11, 12), (1, 12))
    samples, columns = inputs["input_ids"].shape
    with torch.no_grad(), patched(talk) as patch:
        assert "no prompt" in patch.report().splitlines()[-1]
        with FlopCounterMode(talk.model, display=False) as counter:
            cache = talk.model(**inputs).past_key_values
        widths = [layer.keys.shape[2] for layer in cache.layers]
        counts = counter.get_flop_counts()
        path = next(name for name, module in talk.model.named_modules() if module is layers)
        counted = sum(sum(counts[f"{type(talk.model).__name__}.{path}.{layer}"].values()) for layer in range(LAYERS))
        unseen = sum(4 * 64 * samples * (width * width - width * (width + 1) // 2) for width in widths)
        router = 2 * 64 * 4 * samples * sum(widths) if model_type.endswith("moe") else 0
        # torch does not count the scores, which a kernel of ours computes.
        assert counted - unseen - router == shape.operations(samples, widths)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == shape.bytes(samples, widths)
        assert patch.report().splitlines()[-1] == "  " + shape.compare(samples, [columns] * LAYERS, widths)


# ---- a user's own method ----


class Least(LayerMethod):
    """Keeps the three tokens that receive the least attention."""

    cut_before = (2,)

    def budget(self, cut: int, count: int) -> int:
        return min(3, count)

    def score(self, attention: Tensor) -> Tensor:
        return -10 - attention


def test_a_method_of_ones_own_says_what_a_token_is_worth():
    talk = talk_of("llava")
    own = Masked(talk, PROMPTS[1], {2: lambda count: count})
    row = own._attention(1)[-1].tolist()
    visual = [column for column, token in enumerate(talk.ids(*PROMPTS[1])) if token == 3]
    own.dropped[2] = set(visual) - set(sorted(visual, key=lambda column: row[column])[:3])
    want = own.logits()
    with patched(talk, Least()):
        assert_close(logits(talk, talk.batch(PROMPTS[1]))[0], want)


@pytest.mark.parametrize(
    ("member", "answer", "error", "message"),
    [
        (
            "score",
            lambda attention: attention[:, :2],
            ValueError,
            r"score of Wrong must return \(1, .*\), got \(1, 2\)",
        ),
        ("score", lambda attention: None, TypeError, "score of Wrong must return a tensor, got NoneType"),
        (
            "score",
            lambda attention: attention + 1j,
            TypeError,
            r"score of Wrong must return real .*, got torch\.complex",
        ),
        ("budget", lambda cut, count: 2.5, TypeError, r"budget of Wrong must return an int, got 2\.5"),
        ("budget", lambda cut, count: -2, ValueError, "budget of Wrong must be of at least 0 visual tokens, got -2"),
        ("cut_before", (0,), ValueError, "cut_before of Wrong must be at least 1, as the layer before it .*, got 0"),
        ("cut_before", 2, TypeError, "cut_before of Wrong must be a tuple of layers, got 2"),
    ],
)
def test_what_a_method_of_ones_own_answers_is_checked(member: str, answer: Any, error: type[Exception], message: str):
    talk = talk_of("llava")
    wrong = type("Wrong", (Least,), {member: staticmethod(answer) if callable(answer) else answer})()
    with pytest.raises(error, match=message), patched(talk, wrong):
        logits(talk, talk.batch(PROMPTS[1]))


def test_a_score_may_be_of_integers():
    class Newest(Least):
        def score(self, attention: Tensor) -> Tensor:
            return torch.arange(attention.shape[1]).expand_as(attention)

    class AsFloats(Newest):
        def score(self, attention: Tensor) -> Tensor:
            return super().score(attention).float()

    talk = talk_of("llava")
    found = []
    for method in (Newest(), AsFloats()):
        with patched(talk, method):
            found.append(logits(talk, talk.batch(PROMPTS[1]))[0])
    assert torch.equal(*found)


def test_budgets_are_rounded_as_published():
    assert [FastV(2, 0.5).budget(0, count) for count in (0, 1, 5, 7, 576)] == [0, 1, 2, 4, 288]  # half to even
    assert [FastV(2, 3).budget(0, count) for count in (2, 5)] == [2, 3]
    assert FastV(2, 0.0).budget(0, 9) == 0
    assert PyramidDrop(8, 0.5) == PyramidDrop((8,), (0.5,))
    pyramid = PyramidDrop((8, 16), (0.5, 0.25))
    assert [[pyramid.budget(cut, count) for count in (1, 7, 576)] for cut in (0, 1)] == [[1, 3, 288], [1, 1, 144]]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FastV(0, 0.5), ValueError, "layer must be at least 1, as the layer before it gives the scores, got 0"),
        (lambda: FastV(2.0, 0.5), TypeError, r"layer must be a layer \(int\), got 2\.0"),
        (lambda: FastV(2, "half"), TypeError, "keep must be a number of tokens"),
        (lambda: FastV(2, 1.5), ValueError, "keep must be an int of at least 0 or a float within"),
        (lambda: PyramidDrop((1, 2), (0.5,)), ValueError, "layers and shares must be as many, .*, got 2 and 1"),
        (lambda: PyramidDrop((), ()), ValueError, "layers and shares must be as many, and at least one, got 0 and 0"),
        (lambda: PyramidDrop((2, 2), (0.5, 0.2)), ValueError, r"layers must ascend, got \(2, 2\)"),
        (lambda: PyramidDrop((1, 2), (0.2, 0.5)), ValueError, r"shares must descend, got \(0\.2, 0\.5\)"),
        (lambda: PyramidDrop((1, 2), (0.5, 2)), TypeError, "shares must be floats, got 2"),
        (lambda: PyramidDrop((1, 2), (1.5, 0.5)), ValueError, r"shares must be within 0\.0 and 1\.0, got 1\.5"),
        (lambda: PyramidDrop("8", 0.5), TypeError, "layers must be a sequence, got '8'"),
    ],
)
def test_arguments_that_make_no_method(make: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("model_type", "methods", "error", "message"),
    [
        ("llava", FastV(4, 0.5), ValueError, "layer must be below 4, the number of layers of Llava.*, got 4"),
        (
            "qwen3_vl",
            FastV(1, 0.5),
            ValueError,
            r"layer must be at least 2, as Qwen3VL.* adds visual features .* got 1",
        ),
        ("llava", [METHOD, VisionZip(4, 2)], ValueError, "at most one method that acts before the language model, t"),
        ("llava", [EvenTokens(0.5), EvenTokens(0.5)], ValueError, "at most one method that acts before the language"),
        ("llava", [], ValueError, "at most one method"),
        ("llava", [METHOD, FastV(2, 0.2)], ValueError, r"layers of the cuts must ascend .*, got \[2, 2\]"),
        ("llava", [FastV(3, 0.5), FastV(2, 0.2)], ValueError, r"layers of the cuts must ascend .*, got \[3, 2\]"),
        ("llava", [FastV(2, 0.5), FastV(3, 0.5)], ValueError, r"FastV\(layer=3, keep=0.5\) must keep fewer visual tok"),
        ("llava", "fastv", ValueError, r"fastv is written fastv:LAYER:KEEP.*: missing a required argument: 'layer'"),
        ("llava", "fast:2:0.5", ValueError, "unknown method 'fast'; known: .*fastv.* written as scope:64"),
        ("llava", FastV, TypeError, r"got the class FastV, without its arguments \(layer, keep\)"),
        ("llava", [METHOD, 0.5], TypeError, "reduce must be a method such as .*, got float"),
    ],
)
def test_methods_that_a_model_cannot_have(model_type: str, methods: Any, error: type[Exception], message: str):
    talk = talk_of(model_type)
    with pytest.raises(error, match=message):
        patched(talk, methods)
    assert not any(isinstance(module, vlmfast.patches.swap.PatchedModule) for module in talk.model.modules())


@pytest.mark.parametrize("model_type", HYBRID)
def test_linear_attention_is_refused(model_type: str):
    talk = Talk.of(model_type)
    with pytest.raises(
        ValueError, match=r"layer 0 of Qwen3_5.* has linear_attention, which takes a step for each token"
    ):
        patched(talk, FastV(1, 0.5))


def test_sliding_windows_are_refused():
    talk = Talk.of("llava_next")  # Mistral
    assert talk.model.config.text_config.sliding_window is not None
    with pytest.raises(
        ValueError, match=r"layer 0 of LlavaNext.* has sliding_attention, which drops keys by their number"
    ):
        patched(talk, FastV(1, 0.5))


def test_calls_that_cannot_be_cut_are_refused():
    talk = talk_of("llava", torch.float32)
    inputs = talk.batch(PROMPTS[1])
    embeddings = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeddings["inputs_embeds"] = talk.model.get_input_embeddings()(inputs["input_ids"])
    with patched(talk):
        for name, value in (("prompt_lookup_num_tokens", 2), ("assistant_model", talk.model)):
            with pytest.raises(ValueError, match=f"{name} cannot be given where visual tokens are cut between layers"):
                talk.model.generate(**inputs, max_new_tokens=2, **{name: value})
        with pytest.raises(ValueError, match="input_ids must be given beside images where visual tokens are cut"):
            talk.model(**embeddings)
        with pytest.raises(ValueError, match="attention_mask must be as long as the 0 columns of past_key_values and"):
            talk.model(**{**inputs, "attention_mask": inputs["attention_mask"][:, 1:]})
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, L\) or .* got 3 dimensions"):
            talk.model(**{**inputs, "attention_mask": inputs["attention_mask"][None]})
        talk.model.config.text_config._attn_implementation_internal = "flex_attention"
        with pytest.raises(ValueError, match=r"attn_implementation must be sdpa, eager or flash attention .* flex_att"):
            talk.model(**inputs)


def test_a_cropped_cache_is_refused():
    talk = talk_of("llava")
    with torch.no_grad(), patched(talk):
        cache = talk.model(**talk.batch(PROMPTS[1])).past_key_values
        with pytest.raises(RuntimeError, match=r"copy it with copy\.deepcopy"):
            list(cache)
        for layer in cache.layers[:2]:
            layer.crop(-2)
        with pytest.raises(ValueError, match=r"past_key_values .* was cropped since"):
            talk.model(input_ids=torch.tensor([[12]]), past_key_values=cache)


def test_attention_that_passes_by_is_an_error():
    talk = talk_of("llava")
    with patched(talk):
        attention = talk.model.model.language_model.layers[1].self_attn
        forward = attention.forward
        attention.forward = lambda *args, **kwargs: forward(*args, **kwargs)
        logits(talk, talk.batch(PROMPTS[1]))  # a wrapper that calls the original works
        attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
        with pytest.raises(
            RuntimeError, match="cut at layer 2: LlamaAttention of the layer before did not call an att"
        ):
            logits(talk, talk.batch(PROMPTS[1]))


def test_methods_are_typed_as_others_are():
    assert spelling.parse("fastv:2+0.5") == spelling.parse("fastv:2:0.5") == FastV(2, 0.5)
    assert spelling.parse("pyramiddrop:8,16:0.5,0.25") == PyramidDrop((8, 16), (0.5, 0.25))
    assert spelling.parse("pyramiddrop:8:0.5") == PyramidDrop(8, 0.5)
    assert "fastv:LAYER:KEEP" in spelling.usage()
    for wrong in ("fastv:2", "fastv:0:0.5", "fastv:2:0.5,", "fastv:0.5:0.5", "pyramiddrop:8:2"):
        with pytest.raises(argparse.ArgumentTypeError):
            demo_reduce.parse_method(wrong)
