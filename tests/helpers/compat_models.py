"""Small models with those methods of projects outside transformers that patches replace or call.

The methods compute what upstream's do. Where the way matters they do it upstream's way: sorting by a float32 key,
boolean indexing.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

WIDTH = 8
PLACEHOLDER = 3


class FourM(nn.Module):
    def __init__(self, registers: int = 0, causal: bool = False, separate: bool = True):
        super().__init__()
        self.modality_info = {"rgb": {"id": 7}, "depth": {"id": 2}, "caption": {"id": 300}}
        self.num_register_tokens = registers
        self.decoder_causal_mask, self.decoder_sep_mask = causal, separate
        self.register_tokens = nn.Parameter(torch.randn(1, registers, WIDTH)) if registers else None

    def cat_encoder_tensors(self, mod_dict: dict) -> tuple[Tensor, ...]:
        return self._join(mod_dict, ["x", "emb", "input_mask"])

    def cat_decoder_tensors(self, mod_dict: dict) -> tuple[Tensor, ...]:
        names = random.sample(sorted(mod_dict), len(mod_dict))
        keys = ["x", "emb", "target_mask", "ids", "decoder_attention_mask"]
        return self._join({name: mod_dict[name] for name in names}, keys)

    def _join(self, mod_dict: dict, keys: list[str]) -> tuple[Tensor, ...]:
        modality = [
            torch.full_like(values["ids"], self.modality_info[name]["id"], dtype=torch.int16)
            for name, values in mod_dict.items()
        ]
        joined = [torch.cat([values[key] for values in mod_dict.values()], 1) for key in keys]
        return (*joined, torch.cat(modality, 1))

    def forward_mask_encoder(self, mod_dict: dict, num_encoder_tokens: int) -> tuple[Tensor, ...]:
        batch = list(mod_dict.values())[0]["x"].shape[0]  # noqa: RUF015
        tokens, emb, mask, modality = self.cat_encoder_tensors(mod_dict)
        place = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0) * 1e-6
        order = torch.argsort(mask + place, dim=1)[:, :num_encoder_tokens]
        tokens, emb = (torch.gather(x, 1, repeat(order, "b n -> b n d", d=x.shape[2])) for x in (tokens, emb))
        mask, modality = torch.gather(mask, 1, order), torch.gather(modality, 1, order)
        if self.num_register_tokens > 0:
            registers = repeat(self.register_tokens, "() n d -> b n d", b=batch)
            shape = registers.shape[:2]
            tokens, emb = torch.cat([registers, tokens], 1), torch.cat([torch.zeros_like(registers), emb], 1)
            mask = torch.cat([torch.zeros(shape, dtype=torch.bool, device=mask.device), mask], 1)
            modality = torch.cat([torch.full(shape, -1, dtype=torch.int16), modality], 1)
        tokens[mask] = 0.0
        emb[mask] = 0.0
        modality[mask] = -1
        return tokens, emb, rearrange(mask, "b n -> b 1 n"), modality

    def forward_mask_decoder(self, mod_dict: dict, num_decoder_tokens: int) -> tuple[Tensor, ...]:
        tokens, emb, mask, ids, attention, modality = self.cat_decoder_tensors(mod_dict)
        place = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0) * 1e-6
        order = torch.argsort(mask + place, dim=1)[:, :num_decoder_tokens]
        tokens, emb = (torch.gather(x, 1, repeat(order, "b n -> b n d", d=x.shape[2])) for x in (tokens, emb))
        mask, ids, attention, modality = (torch.gather(x, 1, order) for x in (mask, ids, attention, modality))
        tokens[mask] = 0.0
        emb[mask] = 0.0
        ids[mask] = 0
        attention = self.adapt_decoder_attention_mask(attention, modality)
        modality[mask] = -1
        return tokens, emb, rearrange(mask, "b n -> b 1 n"), ids, attention, modality

    def adapt_decoder_attention_mask(self, decoder_attention_mask: Tensor, mod_mask: Tensor) -> Tensor:
        batch, number = decoder_attention_mask.shape
        column = torch.arange(number, device=mod_mask.device)
        limit = column + 1 if self.decoder_causal_mask else decoder_attention_mask.cumsum(1)
        blocked = column >= limit[..., None]
        blocked = blocked.expand(batch, number, number)
        return blocked | (mod_mask[:, None] != mod_mask[..., None]) if self.decoder_sep_mask else blocked


def repeat(x: Tensor, pattern: str, b: int = -1, d: int = -1) -> Tensor:
    """Stand in for ``einops.repeat``."""
    return x.expand(b, -1, -1) if b >= 0 else x[..., None].expand(-1, -1, d)


def rearrange(x: Tensor, pattern: str) -> Tensor:
    """Stand in for ``einops.rearrange``."""
    return x[:, None]


class FM(FourM):
    """The class that ml-4m loads from the hub."""


class VisionLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(64, WIDTH)
        self.tokenizer = SimpleNamespace(image_token_id=PLACEHOLDER)

    def forward(self, input_ids: Tensor, image_embd: Tensor) -> Tensor:
        return self._replace_img_tokens_with_embd(input_ids, self.token_embedding(input_ids), image_embd)

    def _replace_img_tokens_with_embd(self, input_ids: Tensor, token_embd: Tensor, image_embd: Tensor) -> Tensor:
        placed = token_embd.clone()
        rows = image_embd.view(-1, image_embd.size(-1))
        placed[input_ids == self.tokenizer.image_token_id] = rows.to(placed.dtype)
        return placed


class Tower(nn.Module):
    """A vision tower with a CLS row and one patch per pixel; ``last_hidden_state`` differs from its last layer's."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.embedding = nn.Linear(3, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> BaseModelOutput:
        patches = self.embedding(pixel_values.flatten(2).transpose(1, 2))
        states = [torch.cat([patches.sum(1, keepdim=True), patches], 1)]
        for layer in self.layers:
            states.append(states[-1] + layer(states[-1]))
        return BaseModelOutput(
            last_hidden_state=self.norm(states[-1]), hidden_states=tuple(states) if output_hidden_states else None
        )


class InternVLChatModel(nn.Module):
    def __init__(self, ps_version: str = "v2", select_layer: int = -1, out: int = 12):
        super().__init__()
        self.vision_model = Tower()
        self.ps_version, self.select_layer, self.downsample_ratio = ps_version, select_layer, 0.5
        self.mlp1 = nn.Sequential(nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.extract_feature(pixel_values)

    def pixel_shuffle(self, x: Tensor, scale_factor: float = 0.5) -> Tensor:
        batch, rows, columns, channels = x.size()
        scale = int(1 / scale_factor)
        squares = x.contiguous().view(batch, rows // scale, scale, columns // scale, scale, channels)
        squares = squares.permute(0, 3, 1, 2, 4, 5) if self.ps_version == "v1" else squares.permute(0, 1, 3, 2, 4, 5)
        return squares.contiguous().view(*squares.size()[:3], scale**2 * channels)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        final = self.select_layer == -1
        outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=not final, return_dict=True)
        patches = (outputs.last_hidden_state if final else outputs.hidden_states[self.select_layer])[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        square = patches.reshape(patches.shape[0], side, side, patches.shape[2])
        tokens = self.pixel_shuffle(square, scale_factor=self.downsample_ratio)
        return self.mlp1(tokens.reshape(tokens.shape[0], -1, tokens.shape[3]))


class InternViTVisionTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = Tower()
        self.select_layer, self.scale_pix_shuffle = -1, 0.5

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    def feature_select(self, image_forward_outs: BaseModelOutput) -> Tensor:
        return image_forward_outs.hidden_states[self.select_layer][:, 1:]

    def pixel_shuffle(self, x: Tensor, scale_factor: float = 0.5) -> Tensor:
        batch, rows, columns, channels = x.size()
        scale = int(1 / scale_factor)
        squares = x.contiguous().view(batch, rows // scale, scale, columns // scale, scale, channels)
        return squares.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, rows // scale, columns // scale, -1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if type(images) is list:
            features = []
            for image in images:
                features.append(self.feature_select(self.vision_tower(image.unsqueeze(0), output_hidden_states=True)))
        else:
            pixels = images.to(device=self.device, dtype=self.dtype)
            features = self.feature_select(self.vision_tower(pixels, output_hidden_states=True)).to(images.dtype)
        side = int(features.shape[1] ** 0.5)
        square = features.reshape(features.shape[0], side, side, features.shape[2])
        tokens = self.pixel_shuffle(square * self.scale_pix_shuffle)
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[3])


class ModalityProjector(nn.Module):
    def __init__(self, scale: int = 2, out: int = 12):
        super().__init__()
        self.scale_factor = scale
        self.proj = nn.Linear(scale**2 * WIDTH, out, bias=False)

    def pixel_shuffle(self, x: Tensor) -> Tensor:
        batch, patches, channels = x.size()
        side, scale = int(patches**0.5), self.scale_factor
        squares = x.reshape(batch, side // scale, scale, side // scale, scale, channels)
        return squares.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, -1, scale**2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.pixel_shuffle(x))


class OlderVisionLanguageModel(nn.Module):
    """A nanoVLM from before placeholders."""

    def __init__(self) -> None:
        super().__init__()
        self.MP = ModalityProjector()


OlderVisionLanguageModel.__name__ = "VisionLanguageModel"
