"""Visual tokens cut between layers, against the full model with these columns masked from the same layer on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.cut_models import Masked
from tests.helpers.reduce_models import EACH_TYPE, WORD, Talk
from tests.helpers.thorough import first_of
from tests.helpers.tiny_models import IMAGE
from vlmfast.reduce import EvenTokens, FastV, PyramidDrop

LAYERS, STEPS = 4, 4
CLOSE = {"rtol": 2e-6, "atol": 2e-6}  # cos and sin are computed in float32
CLOSE_32 = {"rtol": 1e-4, "atol": 5e-5}
METHOD = FastV(2, 0.5)
HALF = {2: lambda count: max(round(count / 2), 1)}
GREEDY = {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": list(range(WORD))}
# Only text; one image; two images of other sizes with text between.
PROMPTS = ((10, 11, 12), (10, 0, 11, 12), (0, 15, 1, 2, 16, 17))
HYBRID = ("qwen3_5", "qwen3_5_moe")
TYPES = [name for name in EACH_TYPE if name not in HYBRID]


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


def talk_of(model_type: str, dtype: torch.dtype = torch.float64) -> Talk:
    # The kernels of experts have no float64.
    return Talk.of(model_type, torch.float32 if model_type.endswith("moe") else dtype, LAYERS)


def assert_close(got: Tensor, want: Tensor) -> None:
    close = CLOSE if want.dtype == torch.float64 else CLOSE_32
    torch.testing.assert_close(got.to(want.dtype), want, **close)


def patched(talk: Talk, method=METHOD, **options):
    return vlmfast.patch(talk.model, reduce=method, **{"exclude": "*", **options})


@torch.no_grad()
def logits(talk: Talk, inputs: dict) -> Tensor:
    return talk.model(**inputs).logits


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_those_of_the_full_model_with_the_columns_masked(model_type: str):
    talk = talk_of(model_type)
    want = [Masked(talk, prompt, HALF) for prompt in PROMPTS]
    found = [own.logits() for own in want]
    full = [logits(talk, talk.batch(prompt))[0] for prompt in PROMPTS]
    for own, cut, whole in zip(want[1:], found[1:], full[1:], strict=True):
        assert own.near > 1e-9
        assert (cut[-1] - whole[-1]).abs().max() > 1e-3, "what is cut does not show"
    with patched(talk):
        for side in ("left", "right"):
            got = logits(talk, talk.batch(*PROMPTS, side=side))
            for row, cut in zip(got, found, strict=True):
                assert_close(row[-len(cut) :] if side == "left" else row[: len(cut)], cut)
        for prompt, cut in zip(PROMPTS, found, strict=True):
            one = talk.batch(prompt)
            assert_close(logits(talk, one)[0], cut)
            del one["attention_mask"]
            assert_close(logits(talk, one)[0], cut)
    for prompt, whole in zip(PROMPTS, full, strict=True):
        assert torch.equal(logits(talk, talk.batch(prompt))[0], whole), "undo left something"


@pytest.mark.parametrize("model_type", TYPES)
def test_two_questions_about_a_picture_keep_different_tokens(model_type: str):
    talk = talk_of(model_type)
    first, *others = (Masked(talk, prompt, HALF) for prompt in ((10, 0, 11, 12), (13, 0, 40, 50, 60), (13, 0, 40, 50)))
    own = first, next(other for other in others if other.dropped != first.dropped)
    found = [each.logits() for each in own]
    with patched(talk):
        for row, want in zip(logits(talk, talk.batch(*(each.prompt for each in own))), found, strict=True):
            assert_close(row[-len(want) :], want)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_generated_words_are_those_of_the_full_model_with_the_columns_masked(model_type: str, options: dict):
    talk = talk_of(model_type)
    want = [Masked(talk, prompt, HALF).greedy(STEPS) for prompt in PROMPTS]
    inputs = talk.batch(*PROMPTS)
    with patched(talk):
        out = talk.model.generate(**inputs, **GREEDY, **options, return_dict_in_generate=True, output_logits=True)
    ids = inputs["input_ids"]
    assert torch.equal(out.sequences, torch.cat([ids, torch.tensor([words for words, _ in want])], 1))
    rows = torch.stack([rows for _, rows in want])
    assert_close(torch.stack(out.logits, 1), rows)
    held = out.past_key_values.held_columns[2].index.shape[1]
    assert held < ids.shape[1]
    assert out.past_key_values.get_seq_length(2) == held + STEPS - 1
    assert out.past_key_values.get_seq_length(1) == ids.shape[1] + STEPS - 1


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "qwen3_vl", "internvl"])
def test_beams_are_those_of_the_full_model_with_the_columns_masked(model_type: str):
    # transformers 5.17 assigns several images of an InternVL to the beams in another order.
    talk, prompt = talk_of(model_type), PROMPTS[1 if model_type == "internvl" else 2]
    own = Masked(talk, prompt, HALF)
    for search in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2}):
        options = {**GREEDY, **search, "do_sample": "num_beams" not in search}
        with own.masked(talk.model):
            torch.manual_seed(1)
            want = talk.model.generate(**talk.batch(prompt), **options)
        with patched(talk):
            torch.manual_seed(1)
            assert torch.equal(talk.model.generate(**talk.batch(prompt), **options), want)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_next"])
def test_several_cuts(model_type: str):
    """Each cut keeps its share of each prompt's tokens; the second chooses among those that the first has kept."""
    talk, method = talk_of(model_type), PyramidDrop((2, 3), (0.75, 0.3))
    cuts = {2: lambda count: int(count * 0.75), 3: lambda count: max(int(count * 0.3), 1)}
    inputs = talk.batch(*PROMPTS)
    own = [Masked(talk, prompt, cuts) for prompt in PROMPTS]
    want, whole = [each.greedy(STEPS) for each in own], [each.logits() for each in own]
    with patched(talk, method) as patch:
        got = talk.model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        for row, rows in zip(logits(talk, inputs), whole, strict=True):
            assert_close(row[-len(rows) :], rows)
        for row, rows in zip(logits(talk, talk.batch(*PROMPTS, side="right")), whole, strict=True):
            assert_close(row[: len(rows)], rows)
        assert "in layers 0-1, " in patch.report()
    assert_close(torch.stack(got.logits, 1), torch.stack([rows for _, rows in want]))
    lengths = [got.past_key_values.get_seq_length(layer) for layer in range(LAYERS)]
    assert lengths[0] == lengths[1] > lengths[2] > lengths[3]


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_two_methods_in_a_row_are_several_cuts(model_type: str):
    talk, inputs = talk_of(model_type), None
    inputs = talk.batch(*PROMPTS)
    with patched(talk, PyramidDrop((2, 3), (0.5, 0.25))):
        want = logits(talk, inputs)
    with patched(talk, [FastV(2, 0.5), PyramidDrop([3], [0.25])]):
        assert torch.equal(logits(talk, inputs), want)


@pytest.mark.parametrize("model_type", TYPES)
def test_behind_a_method_before_the_language_model(model_type: str):
    """The result equals that of inputs compressed beforehand for an unpatched model, then cut."""
    talk, before = talk_of(model_type, torch.float32), EvenTokens(0.75)
    if not talk.compressible:
        pytest.skip("inputs of this model cannot be shortened beforehand")
    inputs = talk.batch(*PROMPTS)
    with torch.no_grad():
        short = vlmfast.compress_inputs(talk.model, inputs, before)
        if "inputs_embeds" in short:
            pytest.skip("cuts need ids")
    with patched(talk):
        want = logits(talk, copy.copy(short))
        words = talk.model.generate(**vlmfast.compress_inputs(talk.model, inputs, before), **GREEDY)[:, -STEPS:]
    with patched(talk, [before, METHOD]) as patch:
        got = logits(talk, inputs)
        assert torch.equal(got, want)
        out = talk.model.generate(**inputs, **GREEDY)
        lines = patch.report().splitlines()[-3:]
        assert "EvenTokens" in lines[0]
        assert "FastV" in lines[1]
    assert torch.equal(out, torch.cat([inputs["input_ids"], words], 1))
    with patched(talk, before):
        alone = logits(talk, inputs)
    assert alone.shape == got.shape
    assert (alone[1:, -1] - got[1:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", first_of([torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_keeping_everything_changes_no_bit(model_type: str, dtype: torch.dtype):
    talk = Talk.of(model_type, dtype, LAYERS)
    inputs = talk.batch(*PROMPTS)
    want, ids = logits(talk, inputs), talk.model.generate(**inputs, **GREEDY)
    for method in (FastV(2, 1.0), FastV(3, 1000), PyramidDrop([2], [1.0])):
        with patched(talk, method):
            out = talk.model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            assert torch.equal(logits(talk, inputs), want)
            assert torch.equal(out.sequences, ids)
            assert not hasattr(out.past_key_values, "held_columns")


@pytest.mark.parametrize("model_type", TYPES)
def test_patched_layers_are_cut_alike(model_type: str):
    """Patched layers call norms and attention without their modules, and are cut all the same."""
    talk = Talk.of(model_type, torch.float32, LAYERS)
    inputs = talk.batch(*PROMPTS)
    with patched(talk):
        want = logits(talk, inputs)
    with patched(talk, exclude=None), vlmfast.use("torch"):
        torch.testing.assert_close(logits(talk, inputs), want, rtol=1e-4, atol=5e-5)
        assert talk.model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + STEPS


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "qwen3_vl"])
def test_eager_attention_is_cut_alike(model_type: str):
    talk = Talk.of(model_type, torch.float32, LAYERS)
    for prompts in (PROMPTS, PROMPTS[1:2], ((10, 0, 11, 12), (1, 12))):
        inputs = talk.batch(*prompts)
        with patched(talk):
            want = logits(talk, inputs)
            talk.model.set_attn_implementation("eager")
            got = logits(talk, inputs)
            talk.model.set_attn_implementation("sdpa")
        valid = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[valid], want[valid], rtol=1e-4, atol=5e-5)


def flash_like(module, query, key, value, attention_mask, scaling=None, **_):
    """Attend with flash attention's arguments: causal, aligned at the last key, with a (B, N) padding mask or None."""
    tokens, total = query.shape[2], key.shape[2]
    assert module.config._attn_implementation == "flash_like"  # transformers' flash attention reads the name too
    assert attention_mask is None or attention_mask.shape == (len(query), total)
    seen = torch.ones(tokens, total, dtype=torch.bool).tril(total - tokens)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None] | torch.eye(total, dtype=torch.bool)[-tokens:]
    groups = query.shape[1] // key.shape[1]
    key, value = (rows.repeat_interleave(groups, 1) for rows in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_masks_of_flash_attention_are_cut_alike(model_type: str):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("flash_like", flash_like)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)
    talk = talk_of(model_type)
    equal = ((10, 0, *[20] * (talk.counts[1] - talk.counts[0]), 11, 12), (10, 1, 11, 12))  # without padding
    for prompts in (PROMPTS, PROMPTS[1:2], equal):
        inputs = talk.batch(*prompts)
        with patched(talk):
            want = talk.model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
            talk.model.config.get_text_config()._attn_implementation_internal = "flash_like"
            got = talk.model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
            talk.model.config.get_text_config()._attn_implementation_internal = "sdpa"
        assert torch.equal(got.sequences, want.sequences)
        assert_close(torch.stack(got.logits), torch.stack(want.logits))


# ---- samples without padding, of which one loses more tokens than another ----


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_samples_of_one_length_with_other_numbers_of_tokens(implementation: str):
    """Without padding the model makes no mask; the cut introduces padding and needs one."""
    talk = talk_of("qwen2_5_vl", torch.float32)
    prompts = ((10, 0, *[20] * (talk.counts[1] - talk.counts[0]), 11, 12), (10, 1, 11, 12))
    own = [Masked(talk, prompt, HALF) for prompt in prompts]
    inputs = talk.batch(*prompts)
    assert inputs["attention_mask"].all()
    for mask in (True, False):
        if not mask:
            del inputs["attention_mask"]
        talk.model.set_attn_implementation(implementation)
        with patched(talk):
            got = logits(talk, inputs)
            out = talk.model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        talk.model.set_attn_implementation("sdpa")
        for row, more, want in zip(got, torch.stack(out.logits, 1), own, strict=True):
            assert_close(row, want.logits())
            assert_close(more, want.greedy(STEPS)[1])


# ---- several turns ----


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "qwen3_vl", "internvl"])
def test_a_second_turn_of_text_goes_on_from_the_cache(model_type: str):
    talk, prompt, tail = talk_of(model_type), PROMPTS[1], [13, 14, 15]
    own = Masked(talk, prompt, HALF)
    words, _ = own.greedy(STEPS)
    want = own.greedy(STEPS, words + tail)[1]
    inputs = talk.batch(prompt)
    with patched(talk):
        first = talk.model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([tail])], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for cache in (copy.deepcopy(first.past_key_values), pickle.loads(pickle.dumps(first.past_key_values))):
            second = talk.model.generate(
                **again, past_key_values=cache, **GREEDY, return_dict_in_generate=True, output_logits=True
            )
            assert_close(torch.stack(second.logits, 1)[0], want)
    with pytest.raises(RuntimeError, match=r"only a model patched with reduce=... can continue it"):
        talk.model.generate(**again, past_key_values=first.past_key_values, **GREEDY)


@pytest.mark.parametrize("model_type", ["llava", "internvl"])
def test_a_second_image_is_cut_in_its_turn(model_type: str):
    """In the user's own loop, the words in between are text, and the first image remains as it was cut."""
    talk = talk_of(model_type)
    first, second = (10, 0, 11), (12, 1, 13, 14)
    with torch.no_grad(), patched(talk):
        out = talk.model(**talk.batch(first))
        cache = out.past_key_values
        talk.model(input_ids=torch.tensor([[15]]), past_key_values=cache)
        more = talk.batch(second)
        held = cache.get_seq_length(0)
        more["attention_mask"] = torch.ones(1, held + more["input_ids"].shape[1], dtype=torch.long)
        got = talk.model(**more, past_key_values=cache).logits[0]
    assert cache.get_seq_length(0) - cache.get_seq_length(2) == sum(talk.counts[n] // 2 for n in (0, 1))
    assert got.shape[0] == len(talk.ids(*second))
    own = Masked(talk, (*first, 15, *second), {})
    own.dropped[2] = Masked(talk, first, HALF).dropped[2]
    row = own._attention(1)[-1].tolist()
    start = len(talk.ids(*first, 15))
    visual = [start + c for c, token in enumerate(talk.ids(*second)) if token == IMAGE]
    ranked = sorted(visual, key=lambda column: (-row[column], column))
    own.dropped[2] = own.dropped[2] | set(ranked[HALF[2](len(visual)) :])
    assert_close(got, own.logits()[start:])


def test_caches_repeat_and_select_what_they_hold():
    talk = talk_of("llava")
    prompts = ((10, 0, 11, 12), (10, 1, 11, 12), (10, 0, 1, 11))
    inputs = talk.batch(*prompts)
    step = {"input_ids": torch.tensor([[13], [14], [15]])}
    step["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    with torch.no_grad(), patched(talk):
        cache = talk.model(**inputs).past_key_values
        want = talk.model(**step, past_key_values=copy.deepcopy(cache)).logits
        rows = torch.tensor([2, 0])
        some = copy.deepcopy(cache)
        some.batch_select_indices(rows)
        chosen = {name: value[rows] for name, value in step.items()}
        assert_close(talk.model(**chosen, past_key_values=some).logits, want[rows])
        twice = copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        doubled = {name: value.repeat_interleave(2, 0) for name, value in step.items()}
        assert_close(talk.model(**doubled, past_key_values=twice).logits, want.repeat_interleave(2, 0))
        turned = copy.deepcopy(cache)
        turned.reorder_cache(torch.tensor([1, 2, 0]))
        other = {name: value[[1, 2, 0]] for name, value in step.items()}
        assert_close(talk.model(**other, past_key_values=turned).logits, want[[1, 2, 0]])
        with pytest.raises(RuntimeError, match="past_key_values cannot be cropped where its visual tokens were cut"):
            cache.crop(-1)
        cache.reset()
        assert not hasattr(cache, "held_columns")
        assert type(cache).update is type(copy.copy(cache)).update
