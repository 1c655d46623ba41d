"""What counts the columns of the caller's full prompt: logits, labels, stopping criteria and logits processors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

import vlmfast
from tests.helpers.reduce_models import METHODS, WORD, ByHand, Talk

METHOD = METHODS[0]
PROMPTS = ((10, 0, 11, 12), (0, 15, 1, 2, 16), (18, 19, 0, 20))


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


def labelled(talk: Talk, *prompts: tuple[int, ...], side: str = "right") -> dict[str, Tensor]:
    """Make a batch whose labels are the text tokens of its prompts."""
    inputs = talk.batch(*prompts, side=side)
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["input_ids"] < WORD, -100)}


# ---- logits ----


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_stand_where_the_labels_do(model_type: str, side: str):
    talk = Talk.of(model_type)
    inputs = labelled(talk, *PROMPTS, side=side)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = [ByHand.of(talk, METHOD, prompt).full_logits() for prompt in PROMPTS]
    with vlmfast.patch(talk.model, reduce=METHOD), torch.no_grad():
        output = talk.model(**inputs)
        for row, expected in enumerate(want):
            torch.testing.assert_close(output.logits[row, mask[row]], expected, rtol=1e-5, atol=2e-5)
        loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        torch.testing.assert_close(output.loss, loss)
        _, logits, *_ = talk.model(**inputs, return_dict=False)
        assert torch.equal(logits, output.logits)
        del inputs["labels"]
        count = torch.tensor(len(PROMPTS))
        torch.testing.assert_close(talk.model(**inputs, num_items_in_batch=count).logits, output.logits)
        for last in (1, 3, 7, 100):
            torch.testing.assert_close(talk.model(**inputs, logits_to_keep=last).logits, output.logits[:, -last:])
            one = talk.batch(PROMPTS[1])
            torch.testing.assert_close(talk.model(**one, logits_to_keep=last).logits[0], want[1][-last:])
        short = talk.model(**inputs)
        assert short.logits.shape[1] == short.past_key_values.get_seq_length() < mask.shape[1]
        assert torch.equal(talk.model(**inputs, return_dict=False)[0], short.logits)


def test_log_probabilities_of_answers_of_several_lengths():
    """In GRPO, prompts are padded on the left and answers on the right."""
    talk = Talk.of("llava")
    prompts, answers = talk.batch((10, 0, 11), (12, 13, 1, 14)), [[20, 21, 22], [23]]
    rows = torch.tensor([answer + [0] * (3 - len(answer)) for answer in answers])
    inputs = {name: torch.cat([prompts[name], rows], 1) for name in ("input_ids",)}
    inputs["attention_mask"] = torch.cat([prompts["attention_mask"], (rows != 0).long()], 1)
    with vlmfast.patch(talk.model, reduce=METHOD), torch.no_grad():
        logits = talk.model(**inputs, pixel_values=prompts["pixel_values"], logits_to_keep=4).logits[:, :-1]
        for row, (prompt, answer) in enumerate(zip(((10, 0, 11), (12, 13, 1, 14)), answers, strict=True)):
            alone = talk.model(**talk.batch((*prompt, *answer))).logits[0, -1 - len(answer) : -1]
            torch.testing.assert_close(logits[row, : len(answer)], alone, rtol=1e-4, atol=1e-5)


# ---- training ----


def test_number_of_labels():
    talk = Talk.of("llava")
    inputs = labelled(talk, *PROMPTS)
    count = inputs["labels"][:, 1:].ne(-100).sum()
    with vlmfast.patch(talk.model, reduce=METHOD), torch.no_grad():
        mean = talk.model(**inputs).loss
        torch.testing.assert_close(talk.model(**inputs, num_items_in_batch=2 * count).loss, mean / 2)
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        with pytest.raises(ValueError, match=r"labels must be -100 at the visual tokens .* counts them: 20 are not"):
            talk.model(**inputs, num_items_in_batch=count)
        talk.model(**inputs)  # the loss is a mean over the labels that remain


def trainer(talk: Talk, folder: Path, kind: str = "", **options: Any) -> Any:
    pytest.importorskip("accelerate")
    settings = {"per_device_eval_batch_size": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True, **options}
    settings |= {"remove_unused_columns": False, "label_names": ["labels"], "per_device_train_batch_size": 1}
    talk.model.config.get_text_config().use_cache = False  # some releases cannot gather a cache
    metrics = settings.pop("compute_metrics", None)
    arguments = getattr(transformers, f"{kind}TrainingArguments")(str(folder), **settings)
    return getattr(transformers, f"{kind}Trainer")(
        talk.model,
        arguments,
        train_dataset=list(range(len(PROMPTS))),
        eval_dataset=list(range(len(PROMPTS))),
        data_collator=lambda numbers: labelled(talk, *(PROMPTS[number] for number in numbers)),
        compute_metrics=metrics,
    )


def test_metrics_and_smoothed_labels(tmp_path: Path):
    talk = Talk.of("llava")
    inputs = labelled(talk, *PROMPTS)
    labels = inputs["labels"][:, 1:]
    with torch.no_grad():
        own = [ByHand.of(talk, METHOD, prompt).full_logits() for prompt in PROMPTS]
    logits = nn.utils.rnn.pad_sequence(own, batch_first=True)
    predicting = logits[:, :-1][labels != -100]
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found.inputs)
        own = torch.tensor(found.predictions[0][:, :-1])[torch.tensor(found.label_ids[:, 1:]) != -100]
        return {"difference": float((own - predicting).abs().max())}

    def smoothing(output: Any, labels: Tensor, **options: Any) -> Tensor:
        assert output["logits"].shape[:2] == labels.shape
        seen.append(output["logits"][:, :-1][labels[:, 1:] != -100])
        return smoother(output, labels, **options)

    with vlmfast.patch(talk.model, reduce=METHOD):
        ours = trainer(talk, tmp_path, compute_metrics=metrics, include_for_metrics=["inputs", "loss"])
        found = ours.evaluate()
        ours = trainer(talk, tmp_path, label_smoothing_factor=0.1)
        smoother, ours.label_smoother = ours.label_smoother, smoothing
        ours.evaluate()
    want = nn.functional.cross_entropy(predicting, labels[labels != -100]).item()
    assert found["eval_loss"] == pytest.approx(want, rel=1e-4)
    assert found["eval_difference"] < 1e-4
    assert seen[0].shape == inputs["input_ids"].shape
    torch.testing.assert_close(seen[1], predicting, rtol=1e-4, atol=1e-4)


def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path):
    """Samples have different numbers of labels: the loss is a mean over labels, not a mean of means."""
    talk = Talk.of("llava")
    inputs = labelled(talk, *PROMPTS)
    weight = talk.model.model.multi_modal_projector.linear_1.weight
    before = weight.detach().clone()
    with vlmfast.patch(talk.model, exclude="*", reduce=METHOD):
        talk.model(**inputs).loss.backward()
        want = before - 0.1 * weight.grad
        talk.model.zero_grad()
        options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        trainer(talk, tmp_path, gradient_accumulation_steps=3, max_steps=1, save_strategy="no", **options).train()
    assert not torch.equal(weight, before)
    torch.testing.assert_close(weight, want, rtol=1e-4, atol=1e-6)


def test_trainer_that_generates(tmp_path: Path):
    talk = Talk.of("llava")
    generating = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with vlmfast.patch(talk.model, reduce=METHOD):
        want = talk.model.generate(**talk.batch(*PROMPTS, side="right"), **generating)
        ours = trainer(talk, tmp_path, "Seq2Seq", predict_with_generate=True)
        found = ours.predict(ours.eval_dataset, **generating)
    assert torch.equal(torch.tensor(found.predictions), want)
    assert found.metrics["test_loss"] > 0


# ---- processors and criteria ----


def test_the_callers_processors_and_criteria_are_shown_the_full_prompt():
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    ids, seen = inputs["input_ids"], []

    def process(found: Tensor, scores: Tensor) -> Tensor:
        times = len(found) // len(ids)
        assert torch.equal(found[:, : ids.shape[1]], ids.repeat_interleave(times, 0))
        seen.append(found.shape[1])
        return scores

    def after_three(found: Tensor, scores: Any, **_: Any) -> Tensor:
        process(found, scores)
        return torch.full(found.shape[:1], found.shape[1] >= ids.shape[1] + 3)

    def allowed(number: int, found: Tensor) -> list[int]:
        sample = number // (2 if several else 1)
        assert torch.equal(found[: ids.shape[1]], ids[sample])
        return [20 + sample]

    searches = ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2})
    for options, by_processor in itertools.product(searches, (False, True)):
        several = "num_return_sequences" in options
        beams = options.get("num_beams", 1)
        given = [PrefixConstrainedLogitsProcessor(allowed, beams)] if by_processor else []
        seen.clear()
        with vlmfast.patch(talk.model, reduce=METHOD):
            found = talk.model.generate(
                **inputs,
                max_new_tokens=6,
                eos_token_id=None,
                logits_processor=LogitsProcessorList([process, *given]),
                stopping_criteria=StoppingCriteriaList([after_three]),
                prefix_allowed_tokens_fn=None if given else allowed,
                **options,
            )
        assert sorted(set(seen)) == [ids.shape[1] + number for number in range(4)]
        want = torch.tensor([[20], [21], [22]]).repeat_interleave(2 if several else 1, 0).expand(-1, 3)
        assert torch.equal(found[:, ids.shape[1] :], want)


def test_those_of_transformers_count_the_full_prompt():
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    length = inputs["input_ids"].shape[1]

    def new(**options: Any) -> Tensor:
        return talk.model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 6, **options})[:, length:]

    with vlmfast.patch(talk.model, reduce=METHOD):
        plain = new()
        stop = MaxLengthCriteria(length + 2)
        assert torch.equal(new(max_new_tokens=None, stopping_criteria=[stop]), plain[:, :2])
        assert stop.max_length == length + 2
        # The caller's criteria replace those that generate makes.
        eos = EosTokenCriteria(torch.tensor([63]))
        assert torch.equal(new(eos_token_id=int(plain[0, 0]), stopping_criteria=[eos]), plain)
        first = int(plain[0, 0])
        late = new(eos_token_id=None, logits_processor=[MinLengthLogitsProcessor(length + 3, first)])
        assert first not in late[0, :3]
        # Only generated tokens are penalised, not the prompt.
        ignoring = RepetitionPenaltyLogitsProcessor(50.0, prompt_ignore_length=length)
        assert torch.equal(new(logits_processor=[ignoring])[:, 0], plain[:, 0])
