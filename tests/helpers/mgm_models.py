"""A small Mini-Gemini with those classes and methods of dvlab-research/MGM that a patch replaces or calls.

The methods compute what upstream's do, with keys and values of every pixel. They are the oracle of the replacements.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

WIDTH, AUX = 16, 24  # channels of the tower and of the map
SIDE, SCALE = 4, 3  # patches along a side of a picture, pixels of the map along a side of a patch
PATCH = 2  # pixels of the picture along a side of a patch


class CLIPVisionTower(nn.Module):
    def __init__(self, select_feature: str = "patch"):
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE * PATCH,
            patch_size=PATCH,
        )
        self.vision_tower = CLIPVisionModel(config)
        self.select_layer, self.select_feature, self.is_optimize = -2, select_feature, False

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_optimize):
            outputs = self.vision_tower(images.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
        return outputs.hidden_states[self.select_layer][:, 1:].to(images.dtype)


class AuxTower(nn.Module):
    """Returns a map with ``SCALE`` pixels along each side of a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, AUX, 3, padding=1)

    def forward(self, images_aux: Tensor) -> Tensor:
        return self.convolution(images_aux) + 1.0  # so that the mean of a pixel is not zero


class MGMMetaModel(nn.Module):
    def __init__(self, out: int = 12):
        super().__init__()
        self.vision_tower, self.vision_tower_aux = CLIPVisionTower(), AuxTower()
        self.vlm_uni_query_projector = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.vlm_uni_aux_projector = nn.Sequential(nn.LayerNorm(AUX), nn.Linear(AUX, WIDTH))
        self.vlm_uni_val_projector = nn.Sequential(nn.LayerNorm(AUX), nn.Linear(AUX, WIDTH))
        self.mm_projector = nn.Sequential(nn.Linear(WIDTH, out), nn.GELU(), nn.Linear(out, out))

    def get_vision_tower(self) -> nn.Module:
        return self.vision_tower

    def get_vision_tower_aux(self) -> nn.Module:
        return self.vision_tower_aux


class MGMMetaForCausalLM:
    def get_vision_tower(self) -> nn.Module:
        return self.get_model().get_vision_tower()

    def get_vision_tower_aux(self) -> nn.Module:
        return self.get_model().get_vision_tower_aux()

    def encode_images(self, images: Tensor, images_aux: Tensor | None = None, is_video: bool = False) -> Tensor:
        grid, whole = getattr(self.config, "image_grid", 1), getattr(self.config, "image_global", False)
        if grid > 1:
            batch = images.shape[0]
            if whole:
                pictures = images[:, -1:].flatten(0, 1).contiguous()
                crops = images[:, :-1].flatten(0, 1).contiguous()
                images = torch.cat([crops, pictures])
            else:
                images = images.flatten(0, 1).contiguous()
        features = self.get_model().get_vision_tower()(images)
        if whole:
            of_whole, features = features[-len(pictures) :], features[: len(crops)]
        if images_aux is not None:
            aux = self.get_model().get_vision_tower_aux()(images_aux).to(dtype=features.dtype, device=features.device)
            if whole:
                small = F.interpolate(aux.float(), scale_factor=1 / grid, mode="bilinear", align_corners=False)
                of_whole, mined_whole = self.unified_resampler(of_whole, small.to(dtype=aux.dtype))
            if grid > 1:
                aux = aux.reshape(*aux.shape[:2], grid, aux.shape[-2] // grid, grid, aux.shape[-1] // grid)
                aux = aux.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(0, 1).contiguous()
            features, mined = self.unified_resampler(features, aux)
            if grid > 1:
                features = features.reshape(batch, grid**2, *features.shape[1:]).flatten(1, 2)
                mined = mined.reshape(batch, grid**2, *mined.shape[1:]).flatten(1, 2)
            if whole:
                features, mined = torch.cat([of_whole, features], 1), torch.cat([mined_whole, mined], 1)
            features = features + mined
        return self.get_model().mm_projector(features)

    def unified_resampler(self, images: Tensor, images_aux: Tensor) -> tuple[Tensor, Tensor]:
        side = int(images.shape[1] ** 0.5)
        scale = images_aux.shape[-1] // side
        pixels = images_aux.permute(0, 2, 3, 1)
        pixels = pixels.reshape(len(pixels), side, scale, side, scale, pixels.shape[-1]).permute(0, 1, 3, 2, 4, 5)
        pixels = pixels.reshape(len(pixels), side**2, scale**2, pixels.shape[-1]).contiguous()
        query = self.get_model().vlm_uni_query_projector(images)
        key = self.get_model().vlm_uni_aux_projector(pixels)
        value = self.get_model().vlm_uni_val_projector(pixels)
        weights = (query[:, :, None] @ (key.transpose(-1, -2) / key.shape[-1] ** 0.5)).nan_to_num()
        return images, (weights.softmax(-1) @ value).mean(2)


class MGMLlamaForCausalLM(nn.Module, MGMMetaForCausalLM):
    def __init__(self, image_grid: int = 1, image_global: bool = False):
        super().__init__()
        self.config = SimpleNamespace(image_grid=image_grid, image_global=image_global)
        self.model = MGMMetaModel()

    def get_model(self) -> MGMMetaModel:
        return self.model

    def forward(self, images: Tensor, images_aux: Tensor | None = None) -> Tensor:
        return self.encode_images(images, images_aux)

    def inputs(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Make pictures, or their crops, and the larger images of which the map is made."""
        grid = self.config.image_grid
        views = [grid**2 + self.config.image_global] if grid > 1 else []
        images = torch.randn(batch, *views, 3, SIDE * PATCH, SIDE * PATCH, dtype=dtype)
        return images, torch.randn(batch, 3, grid * SIDE * SCALE, grid * SIDE * SCALE, dtype=dtype)
