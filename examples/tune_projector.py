r"""Tune only the projector of a vision-language model to fewer visual tokens.

    python examples/tune_projector.py --model llava-hf/llava-1.5-7b-hf --data llava.json --images FOLDER \
        --reduce visionzip:54:10 --out FOLDER
    python examples/tune_projector.py --digits WEIGHTS --out FOLDER

A projector was trained on all tokens, and reduced ones differ: VisionZip's authors gain 1 to 3 points by tuning it. The
data are in LLaVA's format, a JSON list of {"image": name, "conversations": [{"from": "human", "value": "<image>\nWhat
is it?"}, {"from": "gpt", "value": "A cat."}, ...]}. Training is by transformers' `Trainer`, on a patched model; only
the projector is saved, as ``projector.pt``.

With ``--digits`` the model is the small LLaVA of ``python -m vlmfast bench digits --weights WEIGHTS``: the accuracy
before and after tuning, for 8 and 16 of 64 tokens and every seed in WEIGHTS, is written to ``projector.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlmfast
from vlmfast.reduce.spelling import parse

IGNORED = -100  # the label of tokens that are not part of an answer
DIGITS = (8, 16)  # tokens


def projector_of(model: Any) -> nn.Module:
    """Return the projector of visual features to the language model.

    Raises:
        ValueError: for a model in which it has another name.
    """
    base = model.base_model
    found = getattr(base, "multi_modal_projector", None) or getattr(getattr(base, "visual", None), "merger", None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no multi_modal_projector and no visual.merger to tune")
    return found


def tune(
    model: Any,
    method: Any,
    data: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    out: Path,
    **settings: Any,
) -> list[float]:
    """Train the projector with reduced images, by transformers' `Trainer`; return the losses that it logs.

    Args:
        model: the model with its head; only its projector is changed.
        method: how visual tokens are reduced.
        data: one sample each.
        collate: makes a batch of samples, with ``labels`` of the full prompts.
        out: the folder of the `Trainer`.
        settings: other arguments of `TrainingArguments`.
    """
    from transformers import Trainer, TrainingArguments

    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    projector_of(model).requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=str(out), save_strategy="no", report_to="none", remove_unused_columns=False, **settings
    )
    with vlmfast.patch(model, reduce=method):
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
        trainer.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- data in LLaVA's format ----


@dataclass
class Conversations(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples of a JSON file in LLaVA's format, with the ids of their prompts and the labels of their answers."""

    samples: list[dict[str, Any]]
    folder: Path
    processor: Any

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        from PIL import Image

        sample = self.samples[number]
        with Image.open(self.folder / sample["image"]) as image:
            image = image.convert("RGB")
        text, spans = "", []
        for turn in sample["conversations"]:
            if turn["from"] == "human":
                said = turn["value"].replace("<image>", getattr(self.processor, "image_token", "<image>"))
                text += f" USER: {said} ASSISTANT:" if text else f"USER: {said} ASSISTANT:"
            else:
                spans.append((text, text := f"{text} {turn['value']}"))
        inputs = self.processor(text=[text], images=[image], return_tensors="pt")
        inputs["labels"] = answer_labels(inputs["input_ids"], self.processor.tokenizer, spans)
        return dict(inputs)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad prompts on the right, and concatenate the tensors of images."""
        longest = max(sample["input_ids"].shape[1] for sample in samples)
        fills = {"input_ids": self.processor.tokenizer.pad_token_id or 0, "labels": IGNORED}
        columns = [name for name, value in samples[0].items() if value.shape == samples[0]["input_ids"].shape]
        return {
            name: torch.cat(
                [
                    nn.functional.pad(sample[name], (0, longest - sample[name].shape[1]), value=fills.get(name, 0))
                    if name in columns
                    else sample[name]
                    for sample in samples
                ]
            )
            for name in samples[0]
        }


def answer_labels(ids: Tensor, tokenizer: Any, spans: list[tuple[str, str]]) -> Tensor:
    """(1, L) ids -> (1, L) labels: the ids of the answers, and `IGNORED` elsewhere.

    Args:
        ids: of a prompt with one image, which is in front of the first answer.
        tokenizer: of its text.
        spans: for each answer the text before it, and the text up to its end.
    """
    labels = torch.full_like(ids, IGNORED)

    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    image = ids.shape[1] - length(spans[-1][1])  # the processor has replaced one token by many
    for before, after in spans:
        part = slice(image + length(before), image + length(after))
        labels[0, part] = ids[0, part]
    return labels


# ---- digits ----


def tune_digits(weights: Path, out: Path, steps: int, batch: int) -> dict[str, Any]:
    """Tune the LLaVA of ``bench digits`` for each seed, and count right answers before and after."""
    from rich.console import Console
    from transformers import default_data_collator

    from vlmfast.benchmarks.digits import accuracy
    from vlmfast.benchmarks.digits_models import PICTURES, TRAININGS, trained

    training, console = TRAININGS["pictures"], Console(quiet=True)
    seeds = sorted(
        int(found[1])
        for path in weights.glob("*.pt")
        if (found := re.fullmatch(rf"pictures-{training.steps}x{training.batch}-(\d+)", path.stem))
    )
    if not seeds:
        raise SystemExit(f"--digits: {weights} holds no model of `python -m vlmfast bench digits --weights {weights}`")
    records = []
    for tokens in DIGITS:
        merged = max(1, round(tokens / 6.4))
        method = vlmfast.VisionZip(tokens - merged, merged)
        record: dict[str, Any] = {"method": repr(method), "tokens": tokens, "all tokens": [], "before": [], "after": []}
        for seed in seeds:
            torch.manual_seed(seed)
            model, _ = trained(PICTURES, training, seed, weights, console)
            test = PICTURES.drawer(train=False, seed=1000 + seed).draw(200)
            record["all tokens"].append(round(accuracy(PICTURES, model, test)[0], 4))
            record["before"].append(round(accuracy(PICTURES, model, test, method)[0], 4))
            tune(
                model,
                method,
                _digit_samples(PICTURES, seed, steps * batch),
                default_data_collator,
                out,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                logging_steps=50,
                disable_tqdm=True,
                use_cpu=True,
            )
            record["after"].append(round(accuracy(PICTURES, model, test, method)[0], 4))
        records.append(record)
    return {"seeds": seeds, "steps": steps, "batch": batch, "records": records}


def _digit_samples(task: Any, seed: int, number: int) -> list[dict[str, Any]]:
    drawer = task.drawer(train=True, seed=500 + seed)
    drawn = drawer.draw(number)
    order = torch.rand(number, task.drawer.questions, generator=drawer.generator).argsort(1)
    inputs = task.inputs(drawn, order)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    answers = slice(1 - 2 * task.drawer.questions, None, 2)
    labels[:, answers] = inputs["input_ids"][:, answers]
    inputs["labels"] = labels
    return [{name: value[row] for name, value in inputs.items()} for row in range(number)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a checkpoint: a folder, or a repository of the Hugging Face hub")
    what.add_argument("--digits", metavar="WEIGHTS", type=Path, help="the folder of `bench digits --weights`")
    parser.add_argument("--data", metavar="FILE", type=Path, help="a JSON list in LLaVA's format")
    parser.add_argument("--images", metavar="FOLDER", type=Path, help="where the images are that it names")
    parser.add_argument("--reduce", metavar="METHOD", default="visionzip:54:10", help="as for `vlmfast demo --reduce`")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.digits is not None:
        found = tune_digits(options.digits, options.out, options.steps, options.batch)
        (options.out / "projector.json").write_text(json.dumps(found, indent=1) + "\n")
        for record in found["records"]:
            gains = [after - before for before, after in zip(record["before"], record["after"], strict=True)]
            told = ", ".join(f"{gain:+.1%}" for gain in gains)
            mean = {name: statistics.mean(record[name]) for name in ("all tokens", "before", "after")}
            print(f"{record['tokens']} tokens: " + ", ".join(f"{k} {v:.1%}" for k, v in mean.items()) + f" ({told})")
        return 0
    if options.data is None or options.images is None:
        parser.error("--model needs --data and --images")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    method = parse(options.reduce)
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    data = Conversations(json.loads(options.data.read_text()), options.images, processor)
    tune(
        model,
        method,
        data,
        data.collate,
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        logging_steps=10,
    )
    torch.save(projector_of(model).state_dict(), options.out / "projector.pt")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
