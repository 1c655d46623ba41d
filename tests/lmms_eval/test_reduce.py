"""lmms-eval's own command with a task over twenty pictures, whole and with fewer tokens, against `generate`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import vlmfast
from tests.helpers import written_models
from vlmfast.lmms_eval import MODELS, manifests
from vlmfast.reduce.spelling import parse

ROOT = Path(__file__).parents[2]
QUESTION = "what is in this image ?"
TASK = """
task: twenty_pictures
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.visuals
doc_to_text: "question"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 6, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1}}
"""
VISUALS = "from PIL import Image\n\n\ndef visuals(doc):\n    return [Image.open(doc['picture']).convert('RGB')]\n"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a task over a local JSON of twenty pictures, and return its folder."""
    folder = tmp_path_factory.mktemp("task")
    documents = []
    for number in range(20):
        path = folder / f"{number}.png"
        written_models.picture(number, 90 + 8 * number, 120).save(path)
        documents.append({"picture": str(path), "question": QUESTION, "answer": f"w{number}"})
    data = folder / "data.json"
    data.write_text(json.dumps(documents))
    (folder / "twenty_pictures.yaml").write_text(TASK.format(data=data))
    (folder / "pictures.py").write_text(VISUALS)
    return folder


def evaluate(model: str, folder: Path, task: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--tasks", "twenty_pictures", "--batch_size", "1"]
    arguments = ",".join((f"pretrained={folder}", "device_map=cpu", *more))
    command += ["--model_args", arguments, "--include_path", str(task), "--force_simple", "--device", "cpu"]
    shutil.rmtree(task / "out", ignore_errors=True)  # lmms-eval's exit code is 0 on errors
    command += ["--output_path", str(task / "out"), "--log_samples"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(task / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=task, check=False)


def answers(task: Path) -> list[str]:
    """Return what the last run answered, in the order of the pictures."""
    [written] = (task / "out").rglob("*samples*.jsonl")
    samples = sorted((json.loads(line) for line in written.read_text().splitlines()), key=lambda one: one["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def generated(folder: Path, task: Path, method: str) -> list[str]:
    """Answer the same prompts with transformers and a patch, as `LlavaHf` writes them."""
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    found = []
    with vlmfast.patch(model, reduce=parse(method)):
        for number in range(20):
            message = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
            text = processor.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            with Image.open(task / f"{number}.png") as picture:
                inputs = processor(images=picture.convert("RGB"), text=text, return_tensors="pt")
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            found.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def test_reduce_is_one_argument(task: Path, tmp_path: Path):
    folder = written_models.write("llava", tmp_path)
    plain = evaluate("llava_hf", folder, task)
    assert plain.returncode == 0, plain.stderr[-3000:]
    whole = answers(task)
    seen = {}
    diverse = "DivPrune(keep=9, centered=True)"
    for method in ("even:1.0", f'"{diverse}"'):  # one with commas is in quotes
        run = evaluate("llava_hf", folder, task, f"reduce={method}")
        assert run.returncode == 0, run.stderr[-3000:]
        seen[method] = answers(task)
    assert seen["even:1.0"] == whole
    assert diverse in run.stdout
    assert seen[f'"{diverse}"'] == generated(folder, task, diverse)
    assert seen[f'"{diverse}"'] != whole


def test_an_unknown_method_is_refused_before_the_model_is_loaded(task: Path, tmp_path: Path):
    run = evaluate("llava_hf", tmp_path / "there is no model", task, "reduce=best:9")
    assert "unknown method 'best'; known: " in run.stdout + run.stderr


def test_each_model_can_be_loaded():
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    assert {manifest.model_id for manifest in manifests()} == set(MODELS)
    for name in MODELS:
        assert MODEL_REGISTRY_V2.resolve(name).class_path.startswith("vlmfast.lmms_eval.")
        assert [cls.__name__ for cls in get_model(name).__mro__].count("Reducing") == 1
