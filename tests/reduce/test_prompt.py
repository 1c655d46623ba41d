"""Prompts with reduced visual tokens, against the language model run by hand on each sample alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers.reduce_models import EACH_METHOD, EACH_TYPE, METHODS, ByHand, Talk, run
from tests.helpers.thorough import first_of
from vlmfast.reduce import EvenTokens, Method, RandomTokens, VisionZip

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ONE = (10, 0, 11, 12)
# Only text; one image; two images of other sizes; two images with text between.
RAGGED = ((10, 11, 12), ONE, (13, 1, 2, 14), (0, 15, 2, 16, 17, 18))


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


@torch.no_grad()
def logits(model: nn.Module, inputs: dict) -> Tensor:
    return model(**inputs).logits


@torch.no_grad()
def assert_by_hand(got: Tensor, talk: Talk, method: Method, prompts: tuple, side: str = "left") -> None:
    """Check that each row of (B, N, V) equals the result of its sample alone."""
    lengths = []
    for row, prompt in zip(got, prompts, strict=True):
        want = ByHand.of(talk, method, prompt).logits()
        lengths.append(len(want))
        torch.testing.assert_close(row[-len(want) :] if side == "left" else row[: len(want)], want, **CLOSE)
    assert got.shape[1] == max(lengths), "more padding than needed"


# ---- what the language model sees ----


@pytest.mark.parametrize("method", EACH_METHOD)
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_forward_is_that_of_each_sample_by_hand(model_type: str, method: Method):
    talk = Talk.of(model_type)
    with vlmfast.patch(talk.model, reduce=method):
        for side in ("left", "right"):
            got = logits(talk.model, talk.batch(*RAGGED, side=side))
            assert_by_hand(got, talk, method, RAGGED, side)
        one = talk.batch(ONE)
        del one["attention_mask"]
        assert_by_hand(logits(talk.model, one), talk, method, (ONE,))


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_other_tokens_or_positions_would_be_noticed(model_type: str):
    """Controls of the comparison above: mistakes change the logits by far more than its tolerance."""
    talk, method = Talk.of(model_type), RandomTokens(0.5, seed=3)
    with torch.no_grad():
        want = ByHand.of(talk, method, ONE)
        last = want.logits()[-1]
        assert (ByHand.of(talk, RandomTokens(0.5, seed=4), ONE).logits()[-1] - last).abs().max() > 1e-3
        if want.positions is not None:
            moved = ByHand.of(talk, method, ONE)
            moved.positions[:, :, -3:] += 1
            assert (moved.logits()[-1] - last).abs().max() > 1e-3
        for level in range(len(want.levels)):
            less = ByHand.of(talk, method, ONE)
            less.levels[level] = torch.zeros_like(less.levels[level])
            # All tokens are compared: a level of the last layer changes only its own tokens.
            assert (less.logits() - want.logits()).abs().max() > 1e-3


@pytest.mark.parametrize("method", [*METHODS, RandomTokens(0.5)], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_dropped_columns_are_as_good_as_masked(model_type: str, method: Method):
    """The full prompt with masked garbage in the dropped columns gives the same result."""
    talk = Talk.of(model_type)
    if "linear_attention" in (getattr(talk.model.config.get_text_config(), "layer_types", None) or ()):
        pytest.skip("a masked token still is a step of linear attention")
    short = ByHand.of(talk, method, ONE)
    length = len(talk.ids(*ONE))
    embeddings = torch.randn(1, length, short.embeddings.shape[2])
    embeddings[:, short.columns] = short.embeddings
    mask = torch.zeros(1, length, dtype=torch.long).index_fill(1, short.columns, 1)
    visual = torch.tensor([talk.ids(*ONE)]) == talk.model.config.image_token_id
    inside = mask[visual].bool()
    levels = [torch.randn(len(inside), level.shape[1]) for level in short.levels]
    for level, rows in zip(levels, short.levels, strict=True):
        level[inside] = rows
    positions = short.full if short.full is not None else mask.cumsum(1) - 1
    want = talk.model.lm_head(run(talk, embeddings, positions, visual, levels, mask))[0, short.columns]
    with vlmfast.patch(talk.model, reduce=method):
        got = logits(talk.model, talk.batch(ONE))[0]
    # transformers takes a gap in one-axis positions for the start of another sample, whatever the mask says.
    torch.testing.assert_close(got, want, **CLOSE)
    assert (got - run_unmasked(talk, embeddings, positions, visual, levels)[0, short.columns]).abs().max() > 1e-3


def run_unmasked(talk: Talk, *arguments) -> Tensor:
    with torch.no_grad():
        return talk.model.lm_head(run(talk, *arguments))


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_samples_of_a_ragged_batch_are_as_alone(model_type: str):
    talk, method = Talk.of(model_type), METHODS[0]
    with vlmfast.patch(talk.model, reduce=method):
        together = logits(talk.model, talk.batch(*RAGGED))
        for row, prompt in zip(together, RAGGED, strict=True):
            alone = logits(talk.model, talk.batch(prompt))[0]
            torch.testing.assert_close(row[-len(alone) :], alone, **CLOSE)


# ---- nothing reduced ----


@pytest.mark.parametrize("dtype", first_of([torch.bfloat16, torch.float16, torch.float32]), ids=str)
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_keeping_everything_changes_no_bit(model_type: str, dtype: torch.dtype):
    talk = Talk.of(model_type, dtype)
    inputs = talk.batch(*RAGGED)
    want, ids = logits(talk.model, inputs), talk.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    keep = [EvenTokens(1.0), *keep_all_by_visionzip(talk)]
    for method in keep:
        with vlmfast.patch(talk.model, exclude="*", reduce=method):
            assert torch.equal(logits(talk.model, inputs), want)
            assert torch.equal(talk.model.generate(**inputs, max_new_tokens=4, do_sample=False), ids)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_keeping_everything_leaves_no_column_out(model_type: str, side: str):
    """Padding of all samples, gaps in the mask and inputs that accompany the ids stay as well."""
    talk = Talk.of(model_type)
    inputs = talk.batch(*RAGGED, side=side)
    pad = (3, 0) if side == "left" else (0, 3)
    for name in {"input_ids", "attention_mask", "mm_token_type_ids"} & inputs.keys():
        inputs[name] = nn.functional.pad(inputs[name], pad)
    inputs["attention_mask"][1, -2 if side == "left" else 1] = 0  # a text token, or the first of the image
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        want = talk.model(**inputs)
        with vlmfast.patch(talk.model, exclude="*", reduce=EvenTokens(1.0)) as patch:
            got = talk.model(**inputs)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.loss, want.loss)
        assert patch.reduction.last.columns.dropped == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_a_masked_image_at_an_edge_is_no_padding(model_type: str, side: str):
    """Trainers put such a masked dummy image behind a text, or in a masked prefix; the text does not see it."""
    talk = Talk.of(model_type)
    prompt = (20, 1, 10, 11, 12, 13) if side == "left" else (10, 11, 12, 13, 1, 20)
    inputs = talk.batch(ONE, prompt, side=side)  # last, or upstream would use its size for the others' positions
    text = [0] * (len(inputs["input_ids"][1]) - 4)
    inputs["attention_mask"][1] = torch.tensor([*text, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, *text])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        want = talk.model(**inputs)
        with vlmfast.patch(talk.model, exclude="*", reduce=EvenTokens(1.0)):
            got = talk.model(**inputs)
            assert torch.equal(got.logits, want.logits)
            assert torch.equal(got.loss, want.loss)
            if side == "left":
                ids = talk.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        if side == "left":
            assert torch.equal(ids, talk.model.generate(**inputs, max_new_tokens=3, do_sample=False))
        for method in (*METHODS, EvenTokens(0)):
            with vlmfast.patch(talk.model, reduce=method) as patch:
                short = logits(talk.model, inputs)
            columns = patch.reduction.last.columns
            seen = columns.take(inputs["attention_mask"], 0)[1].bool()
            assert columns.index[1, seen].tolist() == inputs["attention_mask"][1].nonzero()[:, 0].tolist()
            text = columns.index[1, seen]
            torch.testing.assert_close(short[1, text], want.logits[1, text], **CLOSE)
            alone = patch.reduction.last.images[0]
            torch.testing.assert_close(
                short[0, inputs["attention_mask"][0].bool()], ByHand.of(talk, method, ONE).full_logits(), **CLOSE
            )
            assert alone.total == talk.counts[0]


def keep_all_by_visionzip(talk: Talk) -> list[Method]:
    """Return VisionZip methods that keep everything; a kept CLS token takes the place of one patch."""
    return [] if shows_cls(talk) else [VisionZip(dominant=1.0, contextual=0)]


def shows_cls(talk: Talk) -> bool:
    """Tell whether the CLS token can be kept; InternVL drops it when it joins patches."""
    tower = getattr(talk.model.base_model, "vision_tower", None)
    return tower is not None and vlmfast.reduce.towers.has_cls(tower) and talk.model_type != "internvl"


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_budgets_of_nothing(model_type: str):
    """No token at all, no merged tokens, or only merged ones; with a CLS token, one has to be dominant."""
    talk, prompts = Talk.of(model_type), RAGGED[1:3]
    inputs = talk.batch(*prompts)
    for method in (EvenTokens(0), VisionZip(dominant=1, contextual=0), VisionZip(dominant=0, contextual=2)):
        with vlmfast.patch(talk.model, reduce=method):
            if method == VisionZip(dominant=0, contextual=2) and not keep_all_by_visionzip(talk):
                with pytest.raises(ValueError, match=r"dominant must be at least 1 of 16 .* CLS token, .* got 0"):
                    logits(talk.model, inputs)
            else:
                assert_by_hand(logits(talk.model, inputs), talk, method, prompts)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_prompts_without_images_are_left_alone(model_type: str):
    talk = Talk.of(model_type)
    texts = talk.batch((10, 11, 12, 13), (14, 15))
    want, ids = logits(talk.model, texts), talk.model.generate(**texts, max_new_tokens=4, do_sample=False)
    with vlmfast.patch(talk.model, exclude="*", reduce=METHODS[0]) as patch:
        assert torch.equal(logits(talk.model, texts), want)
        assert torch.equal(talk.model.generate(**texts, max_new_tokens=4, do_sample=False), ids)
        assert patch.images == []


# ---- dtypes, labels, training ----


@pytest.mark.parametrize("dtype", first_of([torch.bfloat16, torch.float16]), ids=str)
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_half_precision(model_type: str, dtype: torch.dtype):
    talk = Talk.of(model_type, dtype)
    with vlmfast.patch(talk.model, reduce=METHODS[0]):
        got = logits(talk.model, talk.batch(*RAGGED))
        assert got.dtype == dtype
        assert got.isfinite().all()
        out = talk.model.generate(**talk.batch(*RAGGED), max_new_tokens=3, do_sample=False)
        assert out.shape[1] == talk.batch(*RAGGED)["input_ids"].shape[1] + 3


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_loss_is_that_of_the_short_prompt(model_type: str):
    talk, method = Talk.of(model_type), METHODS[0]
    prompts = RAGGED[1:]
    inputs = talk.batch(*prompts)
    # The first token of a sample is not predicted, not even from padding.
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) <= 1, -100)
    labels = labels.masked_fill(labels == talk.model.config.image_token_id, -100)
    with vlmfast.patch(talk.model, reduce=method), torch.no_grad():
        loss = talk.model(**inputs, labels=labels).loss
    losses = []
    for prompt in prompts:
        short = ByHand.of(talk, method, prompt)
        ids = torch.tensor(talk.ids(*prompt))[short.columns]
        wanted = (ids != talk.model.config.image_token_id)[1:]
        rows = torch.log_softmax(short.logits().double(), -1)[:-1]
        losses += (-rows.gather(1, ids[1:, None])[:, 0][wanted]).tolist()
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
