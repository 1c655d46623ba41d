"""Qwen3-Omni: the thinker, which sees and listens, and the talker."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.masked_rows import deepstack_process, placeholder_mask
from vlmfast.patches.merger import omni_merge_patches
from vlmfast.patches.qwen3_vl_moe import EXPERTS
from vlmfast.patches.rms_norm import llama_rms_norm

AUDIO = 7


def image_video_and_audio_masks(
    self: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    image_features: Tensor | None = None,
    video_features: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Qwen3OmniMoeThinkerModel.get_placeholder_mask, as `image_mask` of the other families."""
    return (
        placeholder_mask(self, input_ids, inputs_embeds, self.config.image_token_id),
        placeholder_mask(self, input_ids, inputs_embeds, self.config.video_token_id),
        placeholder_mask(self, input_ids, inputs_embeds, self.config.audio_token_id),
    )


def thinker_deepstack_process(
    self: Any, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor
) -> Tensor:
    """Qwen3OmniMoeThinkerTextModel._deepstack_process: in transformers 4.57 its mask has one dimension more."""
    mask = visual_pos_masks if visual_pos_masks.dim() == 2 else visual_pos_masks[..., 0]
    return deepstack_process(self, hidden_states, mask, visual_embeds)


def tiny_thinker() -> tuple[nn.Module, dict[str, Any]]:
    """The thinker: the part that the others follow."""
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration as Thinker

    config = Thinker.config_class(
        text_config=tiny.text(head_dim=16, **EXPERTS, **tiny.mrope([4, 2, 2], mrope_interleaved=True)),
        vision_config=tiny.qwen3_vision(deepstack_visual_indexes=[0, 1]),
        audio_config={
            "num_mel_bins": 16,
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "output_dim": 64,
            "downsample_hidden_size": 8,
        },
        audio_token_id=AUDIO,
        **tiny.QWEN_TOKENS,
    )
    return tiny.with_qwen_inputs(tiny.randomised(lambda: Thinker._from_config(config)))


FAMILY = Family(
    model_types=(
        "qwen3_omni_moe",
        "qwen3_omni_moe_thinker",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_vision_encoder",
        "qwen3_omni_moe_talker",
        "qwen3_omni_moe_talker_text",
        "qwen3_omni_moe_talker_code_predictor",
    ),
    replace={
        "qwen3_omni_moe.Qwen3OmniMoeThinkerModel.get_placeholder_mask": image_video_and_audio_masks,
        # up to transformers 5.17
        "qwen3_omni_moe.Qwen3OmniMoeThinkerForConditionalGeneration.get_placeholder_mask": image_video_and_audio_masks,
        "qwen3_omni_moe.Qwen3OmniMoeThinkerTextModel._deepstack_process": thinker_deepstack_process,
        "qwen3_omni_moe.Qwen3OmniMoeTalkerModel._deepstack_process": deepstack_process,
        "qwen3_omni_moe.Qwen3OmniMoeVisionPatchMerger.forward": omni_merge_patches,
        "qwen3_omni_moe.Qwen3OmniMoeThinkerTextRMSNorm.forward": llama_rms_norm,
        "qwen3_omni_moe.Qwen3OmniMoeTextRMSNorm.forward": llama_rms_norm,
        "qwen3_omni_moe.Qwen3OmniMoeRMSNorm.forward": llama_rms_norm,
        "qwen3_omni_moe.Qwen3OmniMoeCode2WavRMSNorm.forward": llama_rms_norm,
    },
    tiny=tiny_thinker,
)
