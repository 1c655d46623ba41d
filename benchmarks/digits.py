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
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import vlmfast
from vlmfast.benchmarks import report
from vlmfast.console import CommandError, console, needed, writable

RESULTS = Path(__file__).parent / "results"
SIDE, PATCH, DIGIT = 64, 8, 16  # pixels
PATCHES = (SIDE // PATCH) ** 2
QUARTERS = 4
OCCUPIED = 0.75  # the chance that a quarter holds a digit
PAD, BOS, EOS, IMAGE = range(4)
QUESTION = 4  # + quarter
ANSWER = QUESTION + QUARTERS  # + digit; + 10 for nothing
NOTHING = 10
LEARNING_RATE = 3e-3
BUDGETS = (48, 32, 24, 16, 12, 8, 6, 4)
METHODS = ("VisionZip", "RandomTokens", "EvenTokens")


class Digits:
    """Draws pictures from one part of the scans."""

    def __init__(self, train: bool, seed: int) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        split = train_test_split(data.images, data.target, test_size=0.25, random_state=0, stratify=data.target)
        images, labels = split[0::2] if train else split[1::2]
        scans = torch.tensor(images, dtype=torch.float32)[:, None] / 16
        self.scans = F.interpolate(scans, size=(DIGIT, DIGIT), mode="bilinear")[:, 0]
        self.labels = torch.tensor(labels)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Draw digits anywhere in their quarter on the grid of the patches, on a noisy ground.

        Returns:
            The pixels, (batch, 3, SIDE, SIDE), and what each quarter holds, (batch, QUARTERS): a digit or NOTHING.
        """
        generator, half = self.generator, SIDE // 2
        canvas = 0.15 * torch.rand(batch, SIDE, SIDE, generator=generator)
        chosen = torch.randint(len(self.labels), (batch, QUARTERS), generator=generator)
        occupied = torch.rand(batch, QUARTERS, generator=generator) < OCCUPIED
        place = PATCH * torch.randint((half - DIGIT) // PATCH + 1, (batch, QUARTERS, 2), generator=generator)
        for picture, quarter in occupied.nonzero().tolist():
            y, x = (place[picture, quarter] + half * torch.tensor([quarter // 2, quarter % 2])).tolist()
            canvas[picture, y : y + DIGIT, x : x + DIGIT] += self.scans[chosen[picture, quarter]]
        pixels = ((canvas - 0.2) / 0.4)[:, None].expand(-1, 3, -1, -1).contiguous()
        return pixels, torch.where(occupied, self.labels[chosen], NOTHING)


def questions(contents: Tensor, order: Tensor) -> Tensor:
    """Return the ids of one prompt per picture, which asks for quarters in the given order, (batch, n)."""
    asked = torch.stack([QUESTION + order, ANSWER + contents.gather(1, order)], 2).flatten(1)
    return torch.cat([torch.tensor([BOS, *[IMAGE] * PATCHES]).expand(len(order), -1), asked], 1)


def _positions(ids: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return positions of prompts whose text comes sooner or later behind the image, by up to a share of its tokens.

    Real models know prompts of every length. One that has only ever met its questions 64 positions behind the image's
    first token is at a loss when they come sooner, whatever the tokens hold.
    """
    sooner = torch.randint(1 + int(share * (PATCHES - 4)), (len(ids), 1), generator=generator)
    position = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return torch.where(position <= PATCHES, position, position - sooner)


def build(seed: int) -> nn.Module:
    """Build a LLaVA on a CLIP tower, as wide as a few minutes on two cores allow."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**wide, num_hidden_layers=4, image_size=SIDE, patch_size=PATCH, projection_dim=64)
    ids = {"vocab_size": ANSWER + NOTHING + 1, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    text = LlamaConfig(**wide, num_hidden_layers=2, max_position_embeddings=512, **ids)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    return LlavaForConditionalGeneration(config)


def train(model: nn.Module, options: Namespace, console: Console) -> list[float]:
    """Train answers and, from the CLS token, presence; return the mean loss of the answers of every hundred steps."""
    data = Digits(train=True, seed=options.seed)
    presence = nn.Linear(model.config.vision_config.hidden_size, NOTHING)
    optimiser = torch.optim.AdamW([*model.parameters(), *presence.parameters()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, options.steps, pct_start=0.1)
    cls: list[Tensor] = []
    tower = model.model.vision_tower
    hook = tower.register_forward_hook(lambda module, args, output: cls.append(output.pooler_output))
    losses = []
    model.train()
    for step in track(range(options.steps), "training", console=console):
        pixels, contents = data.draw(options.batch)
        ids = questions(contents, torch.rand(options.batch, QUARTERS, generator=data.generator).argsort(1))
        labels = torch.full_like(ids, -100)
        labels[:, PATCHES + 2 :: 2] = ids[:, PATCHES + 2 :: 2]
        share = min(1.0, step / (0.6 * options.steps))  # all at once, it learns in several times as many steps
        loss = model(
            input_ids=ids,
            pixel_values=pixels,
            labels=labels,
            position_ids=_positions(ids, share, data.generator),
            attention_mask=torch.ones_like(ids),  # without one, positions that go back begin a new sequence
        ).loss
        present = F.one_hot(contents, NOTHING + 1)[..., :NOTHING].amax(1).float()
        optimiser.zero_grad()
        (loss + F.binary_cross_entropy_with_logits(presence(cls.pop()), present)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    hook.remove()
    hundreds = [losses[end - 100 : end] for end in range(100, len(losses) + 1, 100)]
    return [round(sum(hundred) / 100, 4) for hundred in hundreds]


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, contents: Tensor, method: Any = None) -> dict[str, float]:
    """Return the share of right answers: of all, and of those about a quarter that holds a digit."""
    model.eval()
    hits = torch.empty(contents.shape, dtype=torch.bool)
    for quarter in range(QUARTERS):
        ids = questions(contents, torch.full((len(contents), 1), quarter))[:, :-1]
        for some in torch.arange(len(contents)).split(100):
            inputs = {"input_ids": ids[some], "attention_mask": torch.ones_like(ids[some])}
            inputs["pixel_values"] = pixels[some]
            if method is not None:
                inputs = vlmfast.compress_inputs(model, inputs, method)
            answers = model(**inputs).logits[:, -1].argmax(1) - ANSWER
            hits[some, quarter] = answers == contents[some, quarter]
    return {"all": float(hits.float().mean()), "digits": float(hits[contents != NOTHING].float().mean())}


def measure(model: nn.Module, pixels: Tensor, contents: Tensor, console: Console) -> list[dict[str, Any]]:
    """Return one record for each method and budget, the whole picture first."""
    records = [{"method": "all tokens", "tokens": PATCHES, **accuracy(model, pixels, contents)}]
    for budget in track(BUDGETS, "measuring", console=console):
        contextual = max(1, round(budget / 6.4))  # VisionZip merges into a sixth, as published (54 + 10)
        zipped = vlmfast.VisionZip(dominant=budget - contextual, contextual=contextual)
        for method in (zipped, vlmfast.RandomTokens(budget), vlmfast.EvenTokens(budget)):
            record = {"method": type(method).__name__, "tokens": budget, "settings": repr(method)}
            records.append(record | accuracy(model, pixels, contents, method))
    return records


def show(console: Console, found: dict[str, Any], path: Path) -> None:
    """Print a line for each budget, and draw accuracy over the number of tokens."""
    from matplotlib.figure import Figure

    whole, *reduced = found["records"]
    lines = {name: [record["digits"] for record in reduced if record["method"] == name] for name in METHODS}
    console.print("right answers about a quarter that holds a digit (chance is 10%)")
    rows = zip((PATCHES, *BUDGETS), *([whole["digits"], *line] for line in lines.values()), strict=True)
    shown = [(None, [str(tokens), *(f"{share:.1%}" for share in shares)]) for tokens, *shares in rows]
    report.show_table(console, ("tokens", *METHODS), 1, shown)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.axhline(whole["digits"], color="grey", linestyle="--", label=f"all {PATCHES} tokens")
    for name, line in lines.items():
        axes.plot(BUDGETS, line, marker="o", label=name)
    axes.axhline(0.1, color="lightgrey", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel="visual tokens", ylabel="right answers", ylim=(0, 1))
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.set_xticks([], minor=True)
    title = f"Which digit is in this quarter? ({found['test_pictures']} test pictures, small LLaVA trained on them)"
    axes.set_title(title, size=9)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def run(options: Namespace) -> int:
    """Train and measure as the command line says, and write ``digits.json`` and ``digits.png``."""
    out = console()
    if not options.out.is_dir():
        raise CommandError(f"--out: there is no folder {options.out}")
    for name in ("digits.json", "digits.png"):
        writable("--out", options.out / name)
    for package in ("transformers", "sklearn", "matplotlib"):
        needed(package, "bench digits")
    model = build(options.seed)
    losses = train(model, options, out)
    training = {"steps": options.steps, "batch": options.batch, "learning_rate": LEARNING_RATE, "seed": options.seed}
    pictures = Digits(train=False, seed=options.seed + 1).draw(options.test_pictures)
    found = {
        "environment": report.environment("cpu"),
        "training": {**training, "loss_every_100_steps": losses},
        "test_pictures": options.test_pictures,
        "records": measure(model, *pictures, out),
    }
    (options.out / "digits.json").write_text(json.dumps(found, indent=1) + "\n")
    show(out, found, options.out / "digits.png")
    return 0


if __name__ == "__main__":
    from vlmfast.benchmarks.command import moved

    moved("digits")
