"""`generate` on shortened prompts: its tokens, what it returns, and how a caller may go on with that."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import vlmfast
from tests.helpers.reduce_models import EACH_TYPE, METHODS, WORD, ByHand, Talk

METHOD = METHODS[0]
STEPS = 4
PROMPTS = ((10, 11), (10, 0, 11, 12), (0, 15, 1, 2, 16, 17))
GREEDY = {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": list(range(WORD))}


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


@torch.no_grad()
def by_hand(talk: Talk, prompts: tuple = PROMPTS, tails: tuple | None = None) -> tuple[Tensor, Tensor]:
    """Return the (B, STEPS) tokens and (B, STEPS, V) logits of prompts by hand; ``tails`` are ids that follow them."""
    tails = tails or ([],) * len(prompts)
    found = [ByHand.of(talk, METHOD, *pair).greedy(STEPS) for pair in zip(prompts, tails, strict=True)]
    return torch.tensor([tokens for tokens, _ in found]), torch.stack([logits for _, logits in found])


def generate(model, **options):
    return model.generate(**options, **GREEDY, return_dict_in_generate=True, output_logits=True)


def assert_same(out, ids: Tensor, want: tuple[Tensor, Tensor]) -> None:
    """Check ids and tokens, and the logits too, because the tokens of a random model repeat and prove little."""
    assert torch.equal(out.sequences, torch.cat([ids, want[0]], 1))
    torch.testing.assert_close(torch.stack(out.logits, 1), want[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_tokens_are_those_of_each_sample_by_hand(model_type: str):
    talk = Talk.of(model_type)
    want, inputs = by_hand(talk), talk.batch(*PROMPTS)
    ids = inputs["input_ids"]
    with vlmfast.patch(talk.model, reduce=METHOD) as patch:
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
            if options == {"use_cache": False} and not can_do_without_cache(talk):
                continue
            assert_same(generate(talk.model, **inputs, **options), ids, want)
        assert patch.reduction.last.columns.total == ids.shape[1]
        assert patch.reduction.last.columns.index.shape[1] == max(
            len(ByHand.of(talk, METHOD, p).columns) for p in PROMPTS
        )
        if (ids == 0).any():  # without a mask, padding is recognised by its id
            del inputs["attention_mask"]
            assert_same(generate(talk.model, **inputs), ids, want)
            # An id that the caller's configuration does not set comes from the model's configuration.
            own = GenerationConfig(**GREEDY, return_dict_in_generate=True, output_logits=True)
            assert_same(talk.model.generate(**inputs, generation_config=own), ids, want)
    full = generate(talk.model, **inputs).logits[0]
    assert ((full - want[1][:, 0])[1:].abs().amax(1) > 1e-3).all(), "what is reduced does not show"


def can_do_without_cache(talk: Talk) -> bool:
    """Without a cache each step is a prefill, but transformers 5.17 passes images only to the first step."""
    return "mm_encoder_outputs" in inspect.signature(talk.model.forward).parameters and not hasattr(
        talk.model.base_model, "get_rope_index"
    )


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_sampling_and_beams_are_those_of_the_short_prompt(model_type: str):
    """They equal the same search by the unpatched model on inputs that were shortened beforehand."""
    talk = Talk.of(model_type)
    if not talk.compressible:
        pytest.skip("inputs of this model cannot be shortened beforehand")
    inputs = talk.batch(*PROMPTS)
    length = inputs["input_ids"].shape[1]
    searches = (
        {"do_sample": True, "top_k": 8},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    )
    for search in searches:
        short = vlmfast.compress_inputs(talk.model, inputs, METHOD)
        torch.manual_seed(5)
        want = talk.model.generate(**short, **search, max_new_tokens=STEPS)[:, -STEPS:]
        with vlmfast.patch(talk.model, reduce=METHOD):
            torch.manual_seed(5)
            out = talk.model.generate(**inputs, **search, max_new_tokens=STEPS)
        times = search.get("num_return_sequences", 1)
        assert torch.equal(out[:, :length], inputs["input_ids"].repeat_interleave(times, 0))
        assert torch.equal(out[:, length:], want), search


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_positions_in_decoding(model_type: str):
    talk = Talk.of(model_type)
    prompt = PROMPTS[2]
    seen: list[Tensor] = []

    def note(_, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["position_ids"])

    talk.model.base_model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    with vlmfast.patch(talk.model, reduce=METHOD):
        talk.model.generate(**talk.batch(prompt), **GREEDY)
    short = ByHand.of(talk, METHOD, prompt)
    number = len(short.columns)
    if short.positions is None:
        assert seen[0].tolist() == [list(range(number))]
        assert [position.item() for position in seen[1:]] == list(range(number, number + STEPS - 1))
    else:
        text, *vision = seen[0]
        assert text.tolist() == [list(range(number))]
        assert torch.equal(torch.stack(vision), short.positions)
        for step, positions in enumerate(seen[1:]):
            assert positions[1:].unique().tolist() == [short.after + step], "not as after the full prompt"


# ---- lengths ----


@pytest.mark.parametrize("model_type", EACH_TYPE[:2])
def test_max_length_counts_the_full_prompt(model_type: str):
    talk = Talk.of(model_type)
    inputs = talk.batch(*PROMPTS)
    length = inputs["input_ids"].shape[1]
    model = talk.model
    with vlmfast.patch(model, reduce=METHOD):
        for options in (
            {"max_length": length + 5},
            {"generation_config": GenerationConfig(max_length=length + 5, pad_token_id=0)},
            {"max_new_tokens": 5, "max_length": 7},
            {"generation_config": GenerationConfig(max_new_tokens=5, pad_token_id=0)},
        ):
            assert model.generate(**inputs, do_sample=False, **options).shape[1] == length + 5
            if "generation_config" in options:
                assert options["generation_config"].max_length in (None, length + 5)
        model.generation_config.max_length = length + 3
        assert model.generate(**inputs, do_sample=False).shape[1] == length + 3
        assert model.generate(**inputs, do_sample=False, max_new_tokens=6).shape[1] == length + 6
        assert model.generation_config.max_length == length + 3
        stop = int(model.generate(**inputs, do_sample=False)[0, length])
        early = model.generate(**inputs, do_sample=False, eos_token_id=stop, max_length=length + 6)
        late = model.generate(
            **inputs, do_sample=False, eos_token_id=stop, min_length=length + 3, max_length=length + 6
        )
        assert early[0, length] == stop
        assert stop not in late[0, length : length + 2]


# ---- what is returned ----


class Words(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.got.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_streamer_and_dict(model_type: str):
    talk = Talk.of(model_type)
    inputs = talk.batch(PROMPTS[2])
    want, _ = by_hand(talk, PROMPTS[2:])
    words = Words()
    with vlmfast.patch(talk.model, reduce=METHOD):
        out = talk.model.generate(
            inputs["input_ids"],
            **{name: value for name, value in inputs.items() if name != "input_ids"},
            **GREEDY,
            streamer=words,
            return_dict_in_generate=True,
            output_scores=True,
        )
    prompt, *tokens = words.got
    assert torch.equal(prompt, inputs["input_ids"])
    assert torch.cat(tokens).tolist() == want[0].tolist()
    assert words.ended == 1
    assert torch.equal(out.sequences, torch.cat([inputs["input_ids"], want], 1))
    assert len(out.scores) == STEPS


# ---- turns ----


def turn(talk: Talk, ids: Tensor, mask: Tensor, vision: dict, cache: DynamicCache | None):
    inputs = talk.with_types({"input_ids": ids, "attention_mask": mask, **vision})
    return generate(talk.model, **inputs, past_key_values=cache)


@pytest.mark.parametrize("given", ["own", "returned"])
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_second_turn_of_text(model_type: str, given: str):
    talk = Talk.of(model_type)
    prompts, more = PROMPTS[1:], torch.tensor([[20, 21, 22], [23, 24, 25]])
    first = talk.batch(*prompts)
    cache = DynamicCache(config=talk.model.config.get_text_config()) if given == "own" else None
    with vlmfast.patch(talk.model, reduce=METHOD):
        out = turn(talk, first["input_ids"], first["attention_mask"], talk.vision(0, 0, 1, 2), cache)
        ids = torch.cat([out.sequences, more], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, STEPS + 3, dtype=torch.long)], 1)
        second = turn(talk, ids, mask, {}, out.past_key_values)
        assert torch.equal(second.sequences[:, : ids.shape[1]], ids)
        again = torch.cat([second.sequences, more], 1)
        mask = torch.cat([mask, torch.ones(2, STEPS + 3, dtype=torch.long)], 1)
        third = turn(talk, again, mask, {}, second.past_key_values)
    start = first["input_ids"].shape[1]
    assert_same(second, ids, by_hand(talk, prompts, ids[:, start:].tolist()))
    assert_same(third, again, by_hand(talk, prompts, again[:, start:].tolist()))


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_second_turn_with_another_image(model_type: str):
    talk = Talk.of(model_type)
    prompt, later = PROMPTS[1], (20, 1, 21)
    first = talk.batch(prompt)
    with vlmfast.patch(talk.model, reduce=METHOD):
        out = turn(talk, first["input_ids"], first["attention_mask"], talk.vision(0), None)
        new = out.sequences[0, first["input_ids"].shape[1] :].tolist()
        ids = torch.cat([out.sequences, torch.tensor([talk.ids(*later)])], 1)
        if hasattr(talk.model.base_model, "get_rope_index"):
            with pytest.raises(ValueError, match="must be those of the whole conversation"):
                turn(talk, ids, torch.ones_like(ids), talk.vision(1), out.past_key_values)
            vision = talk.vision(0, 1)
        else:
            vision = talk.vision(1)
        second = turn(talk, ids, torch.ones_like(ids), vision, out.past_key_values)
    assert_same(second, ids, by_hand(talk, ((*prompt, *new, *later),)))


def test_turns_that_cannot_be():
    talk = Talk.of("llava")
    first = talk.batch(PROMPTS[1])
    with vlmfast.patch(talk.model, reduce=METHOD):
        out = turn(talk, first["input_ids"], first["attention_mask"], talk.vision(0), None)
        other = torch.cat([out.sequences + 1, out.sequences], 1)
        with pytest.raises(ValueError, match="past_key_values must be the cache of this conversation"):
            turn(talk, other, torch.ones_like(other), {}, out.past_key_values)


def test_second_turn_of_new_ids_alone():
    talk = Talk.of("llava")
    first = talk.batch(PROMPTS[1])
    more = torch.tensor([[20, 21]])
    with vlmfast.patch(talk.model, reduce=METHOD):
        out = turn(talk, first["input_ids"], first["attention_mask"], talk.vision(0), None)
        new = torch.cat([out.sequences[:, -1:], more], 1)
        mask = torch.ones(1, out.sequences.shape[1] + 2, dtype=torch.long)
        second = turn(talk, new, mask, {}, out.past_key_values)
    tail = out.sequences[0, first["input_ids"].shape[1] :].tolist() + more[0].tolist()
    assert_same(second, new, by_hand(talk, PROMPTS[1:2], [tail]))


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_loop_of_the_callers_own(model_type: str):
    """The loop prefills by forward, then steps with a mask that continues that of the full prompt."""
    talk = Talk.of(model_type)
    prompts = PROMPTS if not hasattr(talk.model.base_model, "get_rope_index") else PROMPTS[2:]
    want, inputs = by_hand(talk, prompts), talk.batch(*prompts)
    found, logits = [], []
    with vlmfast.patch(talk.model, reduce=METHOD), torch.no_grad():
        out = talk.model(**inputs, use_cache=True)
        mask = inputs["attention_mask"]
        for _ in range(STEPS):
            logits.append(out.logits[:, -1])
            found.append(WORD + logits[-1][:, None, WORD:].argmax(-1))
            mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=torch.long)], 1)
            # Qwen-VL counts positions over the whole mask, and would assign them all to the one token of a step.
            given = {} if hasattr(talk.model.base_model, "get_rope_index") else {"attention_mask": mask}
            out = talk.model(input_ids=found[-1], **given, past_key_values=out.past_key_values, use_cache=True)
    assert torch.equal(torch.cat(found, 1), want[0])
    torch.testing.assert_close(torch.stack(logits, 1), want[1], rtol=1e-5, atol=2e-5)
