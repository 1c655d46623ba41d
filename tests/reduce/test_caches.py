"""Caches of shortened prompts: what they remember, and that neither threads nor turns mix prompts."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vlmfast
from tests.helpers.reduce_models import EACH_TYPE, METHODS, Talk
from tests.helpers.turns import answer, prefilled, second_turn
from vlmfast.reduce import EvenTokens
from vlmfast.reduce.caches import keep, kept_by, lent, release

METHOD = METHODS[0]


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_one_picture_and_a_batch_of_questions(model_type: str):
    talk = Talk.of(model_type)
    questions = [(10, 0, 20, 21, 22), (10, 0, 23, 24, 25)]
    with vlmfast.patch(talk.model, reduce=METHOD):
        want = answer(talk, talk.batch(*questions))[1]
        cache = prefilled(talk, talk.batch((10, 0)))
        cache.batch_repeat_interleave(2)
        inputs = talk.batch(*questions)
        for name in talk.pictures[0]:
            del inputs[name]
        got = answer(talk, inputs, past_key_values=cache)[1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rows_of_a_cache_are_rows_of_its_prompt():
    talk = Talk.of("llava")
    with vlmfast.patch(talk.model, reduce=METHOD):
        cache = prefilled(talk, talk.batch((10, 0), (11, 1), (12, 2)))
        prompt = kept_by(cache)
        assert isinstance(cache, DynamicCache)
        assert type(cache).__name__ == "DynamicCache"
        for change, chosen, rows in (
            (cache.batch_select_indices, torch.tensor([2, 0, -2]), [2, 0, 1]),
            (cache.reorder_cache, torch.tensor([1, 0, 2]), [1, 0, 2]),
            (cache.batch_select_indices, torch.tensor([False, True, True]), [1, 2]),
            (cache.batch_select_indices, [1], [1]),
        ):
            change(chosen)
            assert cache.layers[0].keys.shape[0] == len(rows)
            assert torch.equal(kept_by(cache).ids, prompt.ids[rows])
            assert torch.equal(kept_by(cache).columns.index, prompt.columns.index[rows])
            assert kept_by(cache).samples == [[] for _ in rows]
            prompt = kept_by(cache)
        cache.reset()
        assert kept_by(cache) is None
        assert type(cache) is DynamicCache


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_cache_of_beams_has_a_prompt_for_each(options: dict[str, int]):
    talk = Talk.of("llava")
    first = talk.batch((10, 0, 11), (12, 1, 13))
    with vlmfast.patch(talk.model, reduce=METHOD):
        cache = answer(talk, first, **options)[0].past_key_values
        assert torch.equal(kept_by(cache).ids, first["input_ids"].repeat_interleave(3, 0))
        cache.batch_select_indices(torch.tensor([0, 3]))
        assert torch.equal(kept_by(cache).ids, first["input_ids"])
        cache.crop(len(kept_by(cache).columns.index[0]) - cache.get_seq_length())
        inputs = talk.batch((10, 0, 11, 20), (12, 1, 13, 20))
        want = answer(talk, inputs)[1]
        del inputs["pixel_values"]
        got = answer(talk, inputs, past_key_values=cache)[1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_features_of_images_do_not_live_as_long_as_a_cache(model_type: str):
    talk = Talk.of(model_type)
    inputs = talk.batch((10, 0, 11))
    with vlmfast.patch(talk.model, reduce=METHOD) as patch:
        for make in (prefilled, lambda talk, inputs: answer(talk, inputs)[0].past_key_values):
            cache = make(talk, inputs)
            features = weakref.ref(patch.images[0].features)
            assert kept_by(cache) is not None
            patch.reduction.note.prompt = None
            assert features() is None


def test_copies_and_pickles_keep_the_prompt():
    talk = Talk.of("llava")
    with vlmfast.patch(talk.model, reduce=METHOD):
        output, _ = answer(talk, talk.batch((10, 0, 11)))
        cache, turn = output.past_key_values, second_turn(talk, output)
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        want = answer(talk, turn, past_key_values=cache)[1]
        for other in copies:
            assert torch.equal(kept_by(other).ids, talk.batch((10, 0, 11))["input_ids"])
            assert torch.equal(answer(talk, turn, past_key_values=other)[1], want)


def test_a_model_without_the_patch_cannot_go_on():
    talk = Talk.of("llava")
    with vlmfast.patch(talk.model, reduce=METHOD):
        output, _ = answer(talk, talk.batch((10, 0, 11)))
    with pytest.raises(RuntimeError, match="visual tokens were reduced: only a model patched with reduce"):
        answer(talk, second_turn(talk, output), past_key_values=output.past_key_values)
    # After patching the model again, the cache works.
    with vlmfast.patch(talk.model, reduce=METHOD):
        answer(talk, second_turn(talk, output), past_key_values=output.past_key_values)


def test_a_model_without_the_patch_writes_nothing():
    """Also with linear attention, which writes to the cache by other methods, and earlier."""
    talk = Talk.of("qwen3_5")
    with vlmfast.patch(talk.model, reduce=METHOD):
        cache = prefilled(talk, talk.batch((10, 0, 11)))
    before = [copy.deepcopy(vars(layer)) for layer in cache.layers]
    with pytest.raises(RuntimeError, match="only a model patched with reduce"), torch.no_grad():
        talk.model(input_ids=torch.tensor([[12]]), past_key_values=cache)
    for layer, state in zip(cache.layers, before, strict=True):
        assert str(vars(layer)) == str(state)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("removed", [2, 3, 5])  # the last columns: 3 generated ones, before these 4 of text
def test_another_question_after_cropping(model_type: str, removed: int):
    talk = Talk.of(model_type)
    first, more = talk.batch((10, 0, 11, 12, 13, 14)), torch.tensor([[20, 21, 22]])
    with vlmfast.patch(talk.model, reduce=METHOD), torch.no_grad():
        output, _ = answer(talk, first, max_new_tokens=4)
        held = output.sequences.shape[1] - 1 - removed
        ids = torch.cat([output.sequences[:, :held], more], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        want = answer(talk, talk.with_types(turn | talk.vision(0)))[1]
        step = talk.model(**talk.with_types(turn | talk.vision(0))).logits[:, -3:]
        cache = output.past_key_values
        cache.crop(-removed)
        again = copy.deepcopy(cache)
        torch.testing.assert_close(answer(talk, turn, past_key_values=cache)[1], want, rtol=1e-4, atol=1e-5)
        # With forward, the cache then holds the new question.
        got = talk.model(input_ids=more, past_key_values=again).logits
        torch.testing.assert_close(got, step, rtol=1e-4, atol=1e-5)
        again.crop(-1)
        torch.testing.assert_close(answer(talk, turn, past_key_values=again)[1], want, rtol=1e-4, atol=1e-5)


def test_cropping_into_an_image():
    talk = Talk.of("llava")
    with vlmfast.patch(talk.model, reduce=EvenTokens(0.25)), torch.no_grad():
        cache = prefilled(talk, talk.batch((10, 0, 11)))
        prompt = kept_by(cache)
        cache.crop(-3)
        for call in (
            lambda: talk.model(input_ids=torch.tensor([[20]]), past_key_values=cache),
            lambda: answer(talk, talk.batch((10, 0, 20)) | {"pixel_values": None}, past_key_values=cache),
        ):
            with pytest.raises(ValueError, match="it was cropped by 3 columns of the prompt, where visual tokens"):
                call()
            assert kept_by(cache) is prompt
        # An emptied cache is as good as a new one.
        cache.crop(-cache.get_seq_length())
        other = talk.batch((12, 1, 13))
        got = talk.model(**other, past_key_values=cache).logits
        assert torch.equal(got, talk.model(**other).logits)
        assert torch.equal(kept_by(cache).ids, other["input_ids"])


def test_a_cache_made_of_the_layers_of_another():
    talk = Talk.of("llava")
    with vlmfast.patch(talk.model, reduce=EvenTokens(0.25)):
        output, _ = answer(talk, talk.batch((10, 0, 11)))
        with pytest.raises(RuntimeError, match=r"would not know: copy it with copy\.deepcopy"):
            DynamicCache(tuple(output.past_key_values))
        # Keys that were changed are not recognised, but the cache is too short for the image in the ids.
        made = DynamicCache()
        for number, layer in enumerate(output.past_key_values.layers):
            made.update(layer.keys + 1, layer.values, number)
        with pytest.raises(ValueError, match=r"after the 10 columns that past_key_values holds; .* copy\.deepcopy"):
            answer(talk, second_turn(talk, output), past_key_values=made)
        # The first turn is text, the second has the first image.
        text, _ = answer(talk, talk.batch((10, 11, 12)))
        ids = torch.cat([text.sequences, torch.tensor([talk.ids(20, 0, 21)])], 1)
        answer(talk, {"input_ids": ids, **talk.vision(0)}, past_key_values=text.past_key_values)


@pytest.mark.parametrize("model_type", ["internvl", "qwen2_5_vl", "qwen3_5"])
def test_a_cache_made_of_layers_is_refused_where_its_length_tells_nothing(model_type: str):
    """It reaches behind the image in the full ids. Two answers are enough for that, as images have few tokens here."""
    talk = Talk.of(model_type)
    other = talk.batch((10, 1, 12), (11, 2, 13))
    with vlmfast.patch(talk.model, reduce=EvenTokens(0.25)), torch.no_grad():
        output, _ = answer(talk, talk.batch((11, 1, 12), (10, 0, 11)))
        prefilled(talk, other)
        turn, step = second_turn(talk, output), torch.tensor([[12], [12]])
        for cache in (output.past_key_values, prefilled(talk, other)):
            made = DynamicCache(config=talk.model.config.get_text_config(decoder=True))
            made.layers = list(cache.layers)
            made.batch_select_indices([1, 0]) if model_type != "qwen3_5" else None
            for call in (
                lambda: answer(talk, turn, past_key_values=made),  # noqa: B023
                lambda: answer(talk, talk.with_types(turn | talk.vision(1, 0)), past_key_values=made),  # noqa: B023
                lambda: talk.model(input_ids=step, past_key_values=made),  # noqa: B023
            ):
                with pytest.raises(ValueError, match=r"was made of the layers of a cache .* copy\.deepcopy"):
                    call()


def test_a_cache_of_text_or_of_full_images_may_come_from_elsewhere():
    talk = Talk.of("qwen2_5_vl")
    output, _ = answer(talk, talk.batch((10, 0, 11)))
    with vlmfast.patch(talk.model, reduce=EvenTokens(0.25)):
        answer(talk, talk.batch((10, 0, 11)))
        answer(talk, second_turn(talk, output), past_key_values=output.past_key_values)
        text, _ = answer(talk, talk.batch((10, 11, 12)))
        made = DynamicCache()
        for number, layer in enumerate(text.past_key_values.layers):
            made.update(layer.keys, layer.values, number)
        got, expected = (
            answer(talk, second_turn(talk, text), past_key_values=c)[1] for c in (made, text.past_key_values)
        )
        assert torch.equal(got, expected)


def test_replicas_of_data_parallel():
    """DataParallel takes the caches of its replicas apart to gather them."""
    talk = Talk.of("llava")
    with vlmfast.patch(talk.model, reduce=METHOD):
        replica = talk.model._replicate_for_data_parallel()
        replica._modules = talk.model._modules
        cache = replica(**talk.batch((10, 0, 11)), use_cache=True).past_key_values
    assert len(tuple(cache)) == len(cache.layers) > 0


def test_embeddings_in_place_of_ids():
    talk = Talk.of("llava")
    first = talk.batch((10, 0, 11))
    with vlmfast.patch(talk.model, reduce=METHOD), torch.no_grad():
        output, _ = answer(talk, first)
        turn = second_turn(talk, output)
        embeddings = talk.model.get_input_embeddings()(turn.pop("input_ids"))
        for inputs in (
            {"inputs_embeds": embeddings, **talk.vision(0)},
            {"inputs_embeds": embeddings, **turn, "past_key_values": output.past_key_values},
            {"inputs_embeds": embeddings[:, -3:], **turn, "past_key_values": output.past_key_values},
            talk.vision(0),
        ):
            with pytest.raises(ValueError, match=r"input_ids must be a tensor \(B, L\) .*, got none"):
                answer(talk, inputs)
        answer(talk, {"inputs_embeds": embeddings[:, -3:]})


def test_generate_makes_no_graph():
    talk = Talk.of("llava")
    needed: list[bool] = []
    talk.model.model.multi_modal_projector.register_forward_hook(lambda _, __, rows: needed.append(rows.requires_grad))
    with vlmfast.patch(talk.model, reduce=METHOD):
        answer(talk, talk.batch((10, 0, 11)))
        talk.model(**talk.batch((10, 0, 11)))
    assert needed == [False, True]


def test_a_cache_that_was_lent_keeps_its_prompt_after_an_error():
    talk = Talk.of("llava")
    with vlmfast.patch(talk.model, reduce=METHOD):
        output, _ = answer(talk, talk.batch((10, 0, 11)))
        cache = output.past_key_values
        prompt = kept_by(cache)
        with pytest.raises(ValueError, match="input_ids do not begin with the prompt"):
            answer(talk, talk.batch((20, 21, 22)) | {"pixel_values": None}, past_key_values=cache)
        assert kept_by(cache) is prompt
        with lent(cache) as held:
            assert held is prompt
            assert kept_by(cache) is None
        assert release(cache) is prompt
        assert release(cache) is None
        keep(None, prompt)


@pytest.mark.parametrize("name", ["mm_token_type_ids", "labels"])
def test_inputs_of_the_first_turn_in_the_second(name: str):
    talk = Talk.of("qwen2_5_vl")
    first = talk.batch((10, 0, 11))
    if name not in first:
        first[name] = first["input_ids"].clone()
    want = None
    for reduce in (None, EvenTokens(1.0)):
        with vlmfast.patch(talk.model, reduce=reduce):
            output, _ = answer(talk, talk.batch((10, 0, 11)))
            turn = second_turn(talk, output) | {"image_grid_thw": first["image_grid_thw"], name: first[name]}
            got = answer(talk, turn, past_key_values=output.past_key_values)[0].sequences
        want = got if want is None else want
    assert torch.equal(got, want)
    with vlmfast.patch(talk.model, reduce=METHOD), pytest.raises(ValueError, match=f"{name} must have the shape"):
        talk.model(**{**talk.batch((10, 0, 11, 12)), name: first[name]})


def test_threads_do_not_mix_pictures():
    """One thread is paused in its vision tower, after the scored layer, while another one runs."""
    talk = Talk.of("llava")
    mine, other = talk.batch((10, 0, 11)), talk.batch((10, 1, 11))
    layers = talk.model.model.vision_tower.encoder.layers
    inside, done = threading.Event(), threading.Event()
    found: list[Any] = []
    with vlmfast.patch(talk.model, reduce=METHOD) as patch:
        want = answer(talk, mine)[1]
        kept = patch.images[0].kept[0]
        thread = threading.Thread(target=lambda: found.append(answer(talk, mine)))

        def pause(*_: Any) -> None:
            if threading.current_thread() is thread:
                inside.set()
                assert done.wait(60)

        hook = layers[-1].register_forward_pre_hook(pause)
        thread.start()
        assert inside.wait(60)
        assert not torch.equal(answer(talk, other)[1], want)
        done.set()
        thread.join()
        hook.remove()
    ((_, logits),) = found
    assert torch.equal(logits, want)
    assert torch.equal(patch.images[0].kept[0], kept)


def test_a_step_during_which_another_prompt_runs():
    """The positions of the step do not change, because a patched model stores nothing about a prompt."""
    talk = Talk.of("qwen2_5_vl")
    mine, other = talk.batch((10, 0, 11)), talk.batch((10, 2, 11), (12, 1, 13))
    step = torch.tensor([[12]])
    with vlmfast.patch(talk.model, reduce=METHOD), torch.no_grad():
        want = talk.model(input_ids=step, past_key_values=prefilled(talk, mine)).logits
        cache = prefilled(talk, mine)
        layer = talk.model.get_input_embeddings()

        def run_another(*_: Any) -> None:
            hook.remove()
            turns(other)

        def turns(first: dict[str, Tensor]) -> None:
            output, _ = answer(talk, first)
            answer(talk, second_turn(talk, output), past_key_values=output.past_key_values)

        hook = layer.register_forward_hook(run_another)
        assert torch.equal(talk.model(input_ids=step, past_key_values=cache).logits, want)
        turns(mine)
    assert talk.model.base_model.rope_deltas is None
