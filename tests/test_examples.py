"""The examples run, on data and models that are small."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import shortens_prompts

ROOT = Path(__file__).parent.parent


def load(name: str):
    """Import a file of the examples, which are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def processor():
    pytest.importorskip("transformers")
    if not shortens_prompts():
        pytest.skip("this transformers is too old")
    from tests.helpers.patches_models import llava_processor

    return llava_processor()


ANSWERS = [("word3 word4", []), ("word5", ["word6 word6"]), ("word7 word8 word9", [])]


def write_data(folder: Path) -> Path:
    from PIL import Image

    samples = []
    for number, (answer, more) in enumerate(
        [("word3 word4", []), ("word5", ["word6 word6"]), ("word7 word8 word9", [])]
    ):
        Image.new("RGB", (40, 30 + number), (number * 80, 90, 20)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\n describe this"}, {"from": "gpt", "value": answer}]
        for text in more:
            turns += [{"from": "human", "value": "word6 word6"}, {"from": "gpt", "value": text}]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples))
    return folder / "data.json"


def test_labels_are_those_of_the_answers(processor, tmp_path):
    """Of several turns each answer, behind the one before it: a question that holds its words is not taken for it."""
    example = load("tune_projector")
    data = example.Conversations(json.loads(write_data(tmp_path).read_text()), tmp_path, processor)
    batch = data.collate([data[0], data[1]])
    assert batch["pixel_values"].shape[0] == 2
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    said = [processor.tokenizer.decode(row[row != example.IGNORED]) for row in batch["labels"]]
    assert said == ["word3 word4", "word5 word6 word6"]
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist(), reverse=True)


@pytest.mark.thorough
def test_projector_alone_is_tuned(processor, tmp_path):
    """What Trainer sees has fewer tokens, and nothing but the projector changes."""
    pytest.importorskip("accelerate")
    from tests.helpers.tiny_types import build

    example = load("tune_projector")
    model = build("llava")[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    processor.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--data", str(write_data(tmp_path)), "--images", str(tmp_path)]
    options += ["--reduce", "visionzip:5:2", "--out", str(tmp_path / "out"), "--steps", "3", "--batch", "2"]
    assert example.main([*options, "--learning-rate", "0.01"]) == 0
    tuned = torch.load(tmp_path / "out" / "projector.pt")
    start = {name: before[f"model.multi_modal_projector.{name}"] for name in tuned}
    assert all(not torch.equal(tuned[name], start[name]) for name in tuned)
    data = example.Conversations(json.loads((tmp_path / "data.json").read_text()), tmp_path, processor)
    lengths = []
    hook = model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(output.last_hidden_state.shape[1]), with_kwargs=True
    )
    one_step = {"max_steps": 1, "per_device_train_batch_size": 1, "use_cpu": True, "learning_rate": 0.01}
    example.tune(model, example.parse("visionzip:5:2"), data, data.collate, tmp_path / "out", **one_step)
    hook.remove()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.multi_modal_projector.{name}" for name in tuned}
    assert all(parameter.requires_grad for parameter in model.parameters())
    full = {data[number]["input_ids"].shape[1] for number in range(3)}
    assert len(lengths) == 1
    assert lengths[0] + 16 - 7 in full
