"""Accuracy against token budget, of a small LLaVA trained from scratch.

    python -m vlmfast bench digits [--out FOLDER]

Random weights cannot show what a reduction of tokens costs, so here a model is trained for a few minutes: on pictures
composed of scikit-learn's digits, which are scans of handwriting, and questions about them. Some quarters of a picture
hold a digit, somewhere; "what is in this quarter?" is answered by one of ten digits or by "nothing". The scans of the
test pictures are not among those of the training. The CLS token gets a signal of its own, which digits are present, as
contrastive pre-training gives it one: a CLS token that learns nothing attends to nothing.

It says how the methods compare on this task. It says nothing about the accuracy of real models on real benchmarks.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import vlmfast
from vlmfast.benchmarks import report
from vlmfast.console import CommandError, console, table

RESULTS = Path(__file__).parent / "results"

# ---- the task ----

SIDE, PATCH, DIGIT = 64, 8, 16  # pixels
PATCHES = (SIDE // PATCH) ** 2
QUARTERS = 4
OCCUPIED = 0.75  # the chance that a quarter holds a digit
PAD, BOS, EOS, IMAGE = range(4)
QUESTION = 4  # + quarter
ANSWER = QUESTION + QUARTERS  # + digit; + 10 for nothing
NOTHING = 10
VOCABULARY = ANSWER + NOTHING + 1


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures: (B, 3, SIDE, SIDE), and what each quarter holds: (B, QUARTERS), a digit or NOTHING."""

    pixels: Tensor
    contents: Tensor


class Digits:
    """Draws pictures from one part of the scans."""

    def __init__(self, train: bool, seed: int) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        split = train_test_split(data.images, data.target, test_size=0.25, random_state=0, stratify=data.target)
        images, labels = (split[0], split[2]) if train else (split[1], split[3])
        scans = torch.tensor(images, dtype=torch.float32)[:, None] / 16
        self.scans = F.interpolate(scans, size=(DIGIT, DIGIT), mode="bilinear")[:, 0]
        self.labels = torch.tensor(labels)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int) -> Pictures:
        """Draw digits anywhere in their quarter on the grid of the patches, on a noisy ground."""
        generator = self.generator
        canvas = 0.15 * torch.rand(batch, SIDE, SIDE, generator=generator)
        chosen = torch.randint(len(self.labels), (batch, QUARTERS), generator=generator)
        occupied = torch.rand(batch, QUARTERS, generator=generator) < OCCUPIED
        half = SIDE // 2
        places = (half - DIGIT) // PATCH + 1
        place = PATCH * torch.randint(places, (batch, QUARTERS, 2), generator=generator)
        for picture, quarter in occupied.nonzero().tolist():
            y, x = (place[picture, quarter] + half * torch.tensor([quarter // 2, quarter % 2])).tolist()
            canvas[picture, y : y + DIGIT, x : x + DIGIT] += self.scans[chosen[picture, quarter]]
        contents = torch.where(occupied, self.labels[chosen], NOTHING)
        pixels = (canvas - 0.2) / 0.4
        return Pictures(pixels[:, None].expand(-1, 3, -1, -1).contiguous(), contents)


def questions(pictures: Pictures, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids of one prompt per picture, which asks for quarters in the given order, (B, n), and the labels."""
    asked = torch.stack([QUESTION + order, ANSWER + pictures.contents.gather(1, order)], 2).flatten(1)
    head = torch.tensor([BOS, *[IMAGE] * PATCHES]).expand(len(order), -1)
    ids = torch.cat([head, asked], 1)
    labels = torch.full_like(ids, -100)
    labels[:, head.shape[1] + 1 :: 2] = asked[:, 1::2]
    return ids, labels


def _positions(ids: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return positions of prompts whose text comes sooner or later behind the image, by up to a share of its tokens.

    Real models know prompts of every length. One that has only ever met its questions 64 positions behind the image's
    first token is at a loss when they come sooner, whatever the tokens hold.
    """
    text = 1 + PATCHES
    sooner = torch.randint(1 + int(share * (PATCHES - 4)), (len(ids), 1), generator=generator)
    position = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return torch.where(position < text, position, position - sooner)


# ---- the model ----


def build(seed: int) -> nn.Module:
    """Build a LLaVA on a CLIP tower, as wide as a few minutes on two cores allow."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=64,
        initializer_factor=1.0,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    return LlavaForConditionalGeneration(config)


LEARNING_RATE = 3e-3


def train(model: nn.Module, options: Namespace, console: Console) -> list[float]:
    """Train answers and, from the CLS token, presence; return the loss of the answers at every hundredth step."""
    data = Digits(train=True, seed=options.seed)
    presence = nn.Linear(model.config.vision_config.hidden_size, 10)
    optimiser = torch.optim.AdamW([*model.parameters(), *presence.parameters()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, options.steps, pct_start=0.1)
    cls: list[Tensor] = []
    tower = model.model.vision_tower
    hook = tower.register_forward_hook(lambda module, args, output: cls.append(output.pooler_output))
    losses, recent = [], []
    model.train()
    for step in track(range(options.steps), "training", console=console):
        pictures = data.draw(options.batch)
        order = torch.rand(options.batch, QUARTERS, generator=data.generator).argsort(1)
        ids, labels = questions(pictures, order)
        inputs = {"input_ids": ids, "pixel_values": pictures.pixels, "labels": labels}
        share = min(1.0, step / (0.6 * options.steps))  # all at once, it learns in several times as many steps
        inputs["position_ids"] = _positions(ids, share, data.generator)
        inputs["attention_mask"] = torch.ones_like(ids)  # without one, positions that go back begin a new sequence
        loss = model(**inputs).loss
        present = F.one_hot(pictures.contents, NOTHING + 1)[..., :NOTHING].amax(1).float()
        seen = F.binary_cross_entropy_with_logits(presence(cls.pop()), present)
        optimiser.zero_grad()
        (loss + seen).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            losses.append(sum(recent) / len(recent))
            recent.clear()
    hook.remove()
    return losses


# ---- the measurement ----


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures, method: vlmfast.reduce.Method | None) -> dict[str, float]:
    """Return the share of right answers: of all, and of those about a quarter that holds a digit."""
    model.eval()
    right = []
    for quarter in range(QUARTERS):
        ids, _ = questions(pictures, torch.full((len(pictures.contents), 1), quarter))
        found = []
        for pixels, prompt in zip(pictures.pixels.split(100), ids[:, :-1].split(100), strict=True):
            inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": pixels}
            if method is not None:
                inputs = vlmfast.compress_inputs(model, inputs, method)
            found.append(model(**inputs).logits[:, -1].argmax(1) - ANSWER)
        right.append(torch.cat(found) == pictures.contents[:, quarter])
    hits = torch.stack(right, 1)
    digits = pictures.contents != NOTHING
    return {"all": float(hits.float().mean()), "digits": float(hits[digits].float().mean())}


def methods(budget: int) -> dict[str, vlmfast.reduce.Method]:
    """Return the methods at one budget of tokens; VisionZip merges into a sixth of them, as published (54 + 10)."""
    contextual = max(1, round(budget / 6.4))
    return {
        "VisionZip": vlmfast.VisionZip(dominant=budget - contextual, contextual=contextual),
        "RandomTokens": vlmfast.RandomTokens(budget),
        "EvenTokens": vlmfast.EvenTokens(budget),
    }


BUDGETS = (48, 32, 24, 16, 12, 8, 6, 4)


def measure(model: nn.Module, pictures: Pictures, console: Console) -> list[dict[str, Any]]:
    """Return one record for each method and budget, the whole picture first."""
    records = [{"method": "all tokens", "tokens": PATCHES, **accuracy(model, pictures, None)}]
    for budget in track(BUDGETS, "measuring", console=console):
        for name, method in methods(budget).items():
            records.append({"method": name, "tokens": budget, "settings": repr(method)})
            records[-1] |= accuracy(model, pictures, method)
    return records


def show(console: Console, records: list[dict[str, Any]]) -> None:
    """Print a line for each budget."""
    whole, *reduced = records
    names = list(methods(PATCHES))
    lines = table("tokens", *names)
    lines.add_row(str(PATCHES), *(f"{whole['digits']:.1%}" for _ in names))
    for budget in BUDGETS:
        lines.add_row(str(budget), *(f"{r['digits']:.1%}" for r in reduced if r["tokens"] == budget))
    console.print("right answers about a quarter that holds a digit (chance is 10%)")
    console.print(lines)


def plot(path: Path, records: list[dict[str, Any]], test_pictures: int) -> None:
    """Draw accuracy over the number of tokens."""
    from matplotlib.figure import Figure

    whole, *reduced = records
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.axhline(whole["digits"], color="grey", linestyle="--", label=f"all {PATCHES} tokens")
    for name in methods(PATCHES):
        axes.plot(BUDGETS, [r["digits"] for r in reduced if r["method"] == name], marker="o", label=name)
    axes.axhline(0.1, color="lightgrey", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel="visual tokens", ylabel="right answers", ylim=(0, 1))
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.set_xticks([], minor=True)
    title = f"Which digit is in this quarter? ({test_pictures} test pictures, small LLaVA trained on them)"
    axes.set_title(title, size=9)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def run(options: Namespace) -> int:
    """Train and measure as the command line says, and write ``digits.json`` and ``digits.png``."""
    out = console()
    if not options.out.is_dir():
        raise CommandError(f"--out: there is no folder {options.out}")
    model = build(options.seed)
    losses = train(model, options, out)
    pictures = Digits(train=False, seed=options.seed + 1).draw(options.test_pictures)
    records = measure(model, pictures, out)
    show(out, records)
    found = {
        "environment": report.environment("cpu"),
        "training": {
            "steps": options.steps,
            "batch": options.batch,
            "learning_rate": LEARNING_RATE,
            "seed": options.seed,
            "loss_every_100_steps": [round(loss, 4) for loss in losses],
        },
        "test_pictures": options.test_pictures,
        "records": records,
    }
    (options.out / "digits.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(options.out / "digits.png", records, options.test_pictures)
    return 0


if __name__ == "__main__":
    from vlmfast.benchmarks.command import moved

    sys.exit(moved("digits"))
