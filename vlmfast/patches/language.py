"""The language models that LLaVA, InternVL and Idefics are built around, alone or inside them."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.rms_norm import gemma_rms_norm, llama_rms_norm

LANGUAGE_MODELS = {
    "gemma.GemmaRMSNorm.forward": gemma_rms_norm,
    "gemma2.Gemma2RMSNorm.forward": gemma_rms_norm,
    "gemma3.Gemma3RMSNorm.forward": gemma_rms_norm,
    "llama.LlamaRMSNorm.forward": llama_rms_norm,
    "mistral.MistralRMSNorm.forward": llama_rms_norm,
    "mixtral.MixtralRMSNorm.forward": llama_rms_norm,
    "phi3.Phi3RMSNorm.forward": llama_rms_norm,
    "qwen2.Qwen2RMSNorm.forward": llama_rms_norm,
    "qwen2_moe.Qwen2MoeRMSNorm.forward": llama_rms_norm,
    "qwen3.Qwen3RMSNorm.forward": llama_rms_norm,
    "qwen3_moe.Qwen3MoeRMSNorm.forward": llama_rms_norm,
}

FAMILY = Family(
    model_types=(
        "gemma",
        "gemma2",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    ),
    replace=LANGUAGE_MODELS,
    tiny=lambda: tiny.language_model("llama"),
)
