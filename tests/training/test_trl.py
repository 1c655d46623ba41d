"""TRL's `SFTTrainer`, which computes its loss in a ``forward`` of its own: `make test-training` runs this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer

import vlmfast
from tests.helpers.patches_models import llava_processor, patched
from tests.helpers.reduce_models import Talk
from tests.training.steps import METHOD, assert_losses_alike, assert_trained_alike, weights
from vlmfast.reduce import Method

SAID = [("describe this", "word3 word4"), ("word6 word7", "word5"), ("describe", "word8 word9 word10")]


class Compressing(SFTTrainer):
    """Shortens each batch, as the refusal of a patch with ``reduce`` says."""

    method: Method | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        if self.method is not None:
            inputs = vlmfast.compress_inputs(self.accelerator.unwrap_model(model), inputs, self.method)
        return super().compute_loss(model, inputs, **options)


def train(model: Any, folder: Path, method: Method | None = None, checkpointing: bool = False, **more: Any) -> Any:
    pictures = [Image.new("RGB", (40, 30 + number), (number * 80, 90, 20)) for number in range(len(SAID))]
    rows = [
        {"images": [picture], "prompt": f"<image> {question}", "completion": f" {answer}"}
        for picture, (question, answer) in zip(pictures, SAID, strict=True)
    ]
    settings = {"learning_rate": 0.01, "optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "report_to": []}
    settings |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": None}
    trainer = Compressing(
        model,
        SFTConfig(str(folder), gradient_checkpointing=checkpointing, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=llava_processor(),
        **more,
    )
    trainer.method = method
    trainer.train()
    return [row[key] for row in trainer.state.log_history for key in ("loss", "grad_norm") if key in row]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", [None, METHOD], ids=["all tokens", "half of them"])
def test_trained_as_the_unpatched_one(method: Method | None, checkpointing: bool, tmp_path: Path):
    plain, talk = Talk.of("llava"), Talk.of("llava")
    before = weights(talk.model)
    want = train(plain.model, tmp_path, method, checkpointing)
    vlmfast.patch(talk.model)
    got = train(talk.model, tmp_path, method, checkpointing)
    assert patched(talk.model)
    assert_losses_alike(got, want)
    assert_trained_alike(weights(talk.model), weights(plain.model), before)


def test_adapters_of_the_trainer(tmp_path: Path):
    peft = pytest.importorskip("peft")
    losses = []
    for patching in (False, True):
        talk = Talk.of("llava")
        if patching:
            vlmfast.patch(talk.model)
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        losses.append(train(talk.model, tmp_path, peft_config=adapter))
    assert_losses_alike(losses[1], losses[0])


@pytest.mark.parametrize("method", [METHOD, vlmfast.FastV(1, 0.5)], ids=["before", "between the layers"])
def test_a_reduction_that_would_be_passed_by_is_refused(method: Any, tmp_path: Path):
    talk = Talk.of("llava")
    vlmfast.patch(talk.model, reduce=method)
    with pytest.raises(RuntimeError, match="pixel_values came to LlavaModel without") as raised:
        train(talk.model, tmp_path)
    assert ("compress_inputs" in str(raised.value)) == (method is METHOD)
