"""Small vision-language models, trained from scratch in minutes, that answer questions about digits.

The tower has its own losses, in place of pre-training: for each patch the digit that it shows and, in pictures, its
quarter, and for the CLS token the digits that are present. Without the first two, training succeeds by chance only;
without the last one, the CLS token does not learn to attend. Questions come behind the image, as in all families.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from vlmfast.benchmarks import digits_data as data
from vlmfast.benchmarks.digits_data import ANSWER, NOTHING, PATCH, QUESTION, Batch, Drawer

LEARNING_RATE = 3e-3
CHANNELS = 64
WIDE = {"hidden_size": CHANNELS, "intermediate_size": 2 * CHANNELS, "num_attention_heads": 4}
IDS = {
    "vocab_size": data.VOCABULARY,
    "pad_token_id": data.PAD,
    "bos_token_id": data.BOS,
    "eos_token_id": data.EOS,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Task:
    """Questions about pictures or videos, and the model that answers them.

    Attributes:
        name: "pictures" or "videos".
        question: the question in words.
        drawer: draws the pictures or videos.
        placeholder: the id of a visual token.
    """

    name: str
    question: str
    drawer: type[Drawer]
    placeholder: int

    @property
    def patches(self) -> int:
        """The number of visual tokens of a frame."""
        return (self.drawer.side // PATCH) ** 2

    @property
    def tokens(self) -> int:
        """The number of visual tokens of a sample."""
        return self.drawer.frames * self.patches

    def build(self, seed: int) -> Any:
        """Build the model with random weights: a LLaVA on a CLIP tower for pictures, a Qwen2-VL for videos."""
        torch.manual_seed(seed)
        return _llava(self.drawer.side) if self.name == "pictures" else _qwen2_vl()

    def inputs(self, batch: Batch, order: Tensor) -> dict[str, Tensor]:
        """Make one prompt for each sample, with all questions in the given order, (B, n), and their answers."""
        asked = torch.stack([QUESTION + order, ANSWER + batch.contents.gather(1, order)], 2).flatten(1)
        shown = [data.BOS, data.START, *[self.placeholder] * self.tokens, data.END]
        ids = torch.cat([torch.tensor(shown).expand(len(order), -1), asked], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.name == "pictures":
            return inputs | {"pixel_values": batch.pixels.expand(-1, 3, -1, -1)}
        frames, side = self.drawer.frames, self.drawer.side // PATCH
        cells = batch.pixels.view(-1, frames, side, PATCH, side, PATCH).transpose(3, 4)
        rows = cells.flatten(4).flatten(0, 3)[:, None].expand(-1, 3, -1).flatten(1)  # as its processor orders them
        grid = torch.tensor([[frames, side, side]]).expand(len(order), -1)
        types = 2 * (ids == self.placeholder).int()
        return inputs | {"pixel_values_videos": rows, "video_grid_thw": grid, "mm_token_type_ids": types}

    def questions_in_turn(self, batch: Batch) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield, for each question, the inputs that end with it, and the answers."""
        for question in range(self.drawer.questions):
            inputs = self.inputs(batch, torch.full((len(batch.contents), 1), question))
            columns = ("input_ids", "attention_mask", "mm_token_type_ids")
            short = {name: value[:, :-1] if name in columns else value for name, value in inputs.items()}
            yield short, batch.contents[:, question]


PICTURES = Task("pictures", "Which digit is in this quarter?", data.Pictures, data.IMAGE)
VIDEOS = Task("videos", "Which digit came first, second, third?", data.Videos, data.VIDEO)
TASKS = {task.name: task for task in (PICTURES, VIDEOS)}


def _llava(side: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**WIDE, num_hidden_layers=4, image_size=side, patch_size=PATCH, projection_dim=CHANNELS)
    text = LlamaConfig(**WIDE, num_hidden_layers=2, **IDS)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=data.IMAGE, vision_feature_layer=-2)
    return LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = {**WIDE, **IDS, "num_hidden_layers": 2, "num_key_value_heads": 4, "rope_parameters": rope}
    vision = {"depth": 3, "embed_dim": CHANNELS, "hidden_size": CHANNELS, "mlp_ratio": 2, "num_heads": 4}
    vision |= {"patch_size": PATCH, "spatial_merge_size": 1, "temporal_patch_size": 1}
    marks = {"image_token_id": data.IMAGE, "video_token_id": data.VIDEO}
    marks |= {"vision_start_token_id": data.START, "vision_end_token_id": data.END}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **marks))


# ---- training ----


@dataclass(frozen=True)
class Training:
    """The length of a training: steps, and samples per step."""

    steps: int
    batch: int


TRAININGS = {"pictures": Training(600, 32), "videos": Training(1000, 16)}


def trained(task: Task, training: Training, seed: int, folder: Path | None, out: Console) -> tuple[Any, list[float]]:
    """Return a trained model and its losses, which are loaded from the folder or stored in it, if there is one."""
    model = task.build(seed)
    path = None if folder is None else folder / f"{task.name}-{training.steps}x{training.batch}-{seed}.pt"
    if path is not None and path.exists():
        kept = torch.load(path, weights_only=True)
        model.load_state_dict(kept["weights"])
        return model.eval(), kept["losses"]
    losses = train(task, model, training, seed, out)
    if path is not None:
        torch.save({"weights": model.state_dict(), "losses": losses}, path)
    return model, losses


def train(task: Task, model: Any, training: Training, seed: int, out: Console) -> list[float]:
    """Train the answers and the tower; return the mean loss of the answers over every hundred steps."""
    steps, batch = training.steps, training.batch
    drawer = task.drawer(train=True, seed=seed)
    heads = nn.ModuleList([nn.Linear(CHANNELS, count) for count in (NOTHING + 1, NOTHING, task.drawer.questions)])
    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, steps, pct_start=0.1)
    losses = []
    model.train()
    with _tower_outputs(model) as seen:
        for step in track(range(steps), f"training on {task.name}, seed {seed}", console=out):
            drawn = drawer.draw(batch)
            order = torch.rand(batch, task.drawer.questions, generator=drawer.generator).argsort(1)
            inputs = task.inputs(drawn, order)
            labels = torch.full_like(inputs["input_ids"], -100)
            answers = slice(1 - 2 * task.drawer.questions, None, 2)
            labels[:, answers] = inputs["input_ids"][:, answers]
            if task.name == "pictures":
                inputs["position_ids"] = _positions(inputs["input_ids"], task, step / steps, drawer.generator)
            loss = model(**inputs, labels=labels).loss
            optimiser.zero_grad()
            (loss + _tower_loss(heads, *seen.pop(), drawn)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    hundreds = [losses[end - 100 : end] for end in range(100, len(losses) + 1, 100)]
    return [round(sum(hundred) / 100, 4) for hundred in hundreds]


@contextmanager
def _tower_outputs(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record the features and the pooled output of the tower."""
    outputs: list[tuple[Tensor, Tensor]] = []
    base = model.base_model
    tower = base.vision_tower if hasattr(base, "vision_tower") else base.visual

    def note(module: nn.Module, args: Any, output: Any) -> None:  # LLaVA's output has other fields too
        states = output.last_hidden_state if output.hidden_states is None else output.hidden_states[-2]
        outputs.append((states, output.pooler_output))

    hook = tower.register_forward_hook(note)
    try:
        yield outputs
    finally:
        hook.remove()


def _tower_loss(heads: nn.ModuleList, states: Tensor, pooled: Tensor, drawn: Batch) -> Tensor:
    """Return the loss for what each patch shows and, in pictures, for its quarter and the digits that are present."""
    if states.dim() == 2:  # of Qwen-VL: the patches of all frames of all samples
        return F.cross_entropy(heads[0](states), drawn.places.flatten())
    shown = F.cross_entropy(heads[0](states[:, 1:]).flatten(0, 1), drawn.places.flatten())
    present = F.one_hot(drawn.contents, NOTHING + 1)[..., :NOTHING].amax(1).float()
    half = torch.arange(math.isqrt(states.shape[1])) * 2 // math.isqrt(states.shape[1])
    quarters = (2 * half[:, None] + half).flatten().repeat(len(states))
    where = F.cross_entropy(heads[2](states[:, 1:]).flatten(0, 1), quarters)
    return shown + where + F.binary_cross_entropy_with_logits(heads[1](pooled), present)


def _positions(ids: Tensor, task: Task, progress: float, generator: torch.Generator) -> Tensor:
    """Return positions of prompts whose text begins earlier, by a random number up to that of the image's tokens.

    Real models are trained on prompts of every length. A model that has only seen questions 64 positions behind the
    image's first token fails when they come earlier, whatever tokens are left. With the full range from the start,
    training takes several times as many steps, so the range grows during the first 60 % of the training.
    """
    most = int(min(1.0, progress / 0.6) * (task.tokens - 4))
    sooner = torch.randint(1 + most, (len(ids), 1), generator=generator)
    position = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return torch.where(position <= task.tokens + 1, position, position - sooner)
