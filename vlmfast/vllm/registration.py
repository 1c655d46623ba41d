"""Registers the reduced models in every process of vLLM, and checks that they were written for this vLLM."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

from vlmfast.vllm import rms_norm
from vlmfast.vllm.naming import ARCHITECTURES, KEY, PREFIX, configured_method

SUPPORTED = ("0.32",)  # the versions that the tests are run with; the extra `vlmfast[vllm]` says the same
logger = logging.getLogger("vllm.vlmfast")


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not one that the reduced models were written for."""


def register() -> None:
    """Register the reduced models, lazily, and vlmfast's RMSNorm; calling it again does no harm.

    It does not raise, so that other models are served as before. If something is missing in another vLLM, that is a
    warning here, and an error when a reduced model is loaded.
    """
    from vllm import __version__

    tested = any(__version__.startswith(f"{release}.") for release in SUPPORTED)
    if not tested:
        problems = {name: problem for name, module in ARCHITECTURES.items() if (problem := missing(module))}
        logger.warning(
            "vlmfast's reduced models were tested with vLLM %s, and this is %s: %s",
            " and ".join(SUPPORTED),
            __version__,
            "; ".join(f"{name}: {problem}" for name, problem in problems.items()) or "all that they override is there",
        )
    for what, add in (("reduced models", _register_models), ("RMSNorm", rms_norm.register)):
        try:
            add()
        except (ImportError, AttributeError, TypeError) as error:
            logger.warning("vlmfast cannot add its %s to vLLM %s: %s", what, __version__, error)


def _register_models() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    for architecture in ARCHITECTURES:
        name = PREFIX + architecture
        ModelRegistry.register_model(name, f"vlmfast.vllm:{name}")
        upstream = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        hooks: dict[str, Any] = {
            "verify_and_update_config": staticmethod(functools.partial(_verify, architecture, upstream))
        }
        MODELS_CONFIG_MAP[name] = type(f"{name}Config", (upstream,), hooks)


def _verify(architecture: str, upstream: Any, vllm_config: Any) -> None:
    """Refuse a configuration that a reduced model does not work with, and then check it as vLLM does its own model's.

    Raises:
        ValueError: with the setting that is wrong. UnsupportedVllmError: as `missing`.
    """
    problem = missing(ARCHITECTURES[architecture])
    if problem:
        raise UnsupportedVllmError(problem)
    configured_method(architecture, getattr(vllm_config.model_config.hf_config, KEY, None))
    for setting, wrong, reason in _refused(architecture, vllm_config):
        if wrong:
            raise ValueError(f"{setting} is not possible with {KEY}: {reason}")
    upstream.verify_and_update_config(vllm_config)


def _refused(architecture: str, config: Any) -> list[tuple[str, bool, str]]:
    """Return the settings that do not work, whether this configuration has them, and why."""
    multimodal, compilation, parallel = (
        config.model_config.multimodal_config,
        config.compilation_config,
        config.parallel_config,
    )
    speculative = config.speculative_config
    bypassed = "the scores come from hooks in the vision tower, which a compiled or captured one passes by"
    return [
        ("compile_mm_encoder", compilation.compile_mm_encoder, bypassed),
        ("cudagraph_mm_encoder", compilation.cudagraph_mm_encoder, bypassed),
        (
            "mm_encoder_tp_mode=data",
            multimodal.mm_encoder_tp_mode == "data",
            "each rank would choose by its own images",
        ),
        (
            "video_pruning_rate",
            multimodal.is_multimodal_pruning_enabled(),
            "vLLM's own pruning counts positions as well",
        ),
        (
            f"speculative_config with method {speculative.method if speculative else None}",
            speculative is not None and speculative.method not in ("ngram", "ngram_gpu", "suffix"),
            "a drafter would get embeddings that carry positions",
        ),
        (
            "enable_tower_connector_lora",
            bool(config.lora_config and config.lora_config.enable_tower_connector_lora),
            "vLLM counts the tokens of the tower by those that come out of it",
        ),
        ("dual batch overlap", parallel.use_ubatching, "half batches would get the positions of others"),
        (
            "pipeline_parallel_size > 1",
            parallel.pipeline_parallel_size > 1 and ARCHITECTURES[architecture] == "qwen",
            "later stages would not get the positions of the tokens that are kept",
        ),
    ]


@functools.cache
def missing(module: str) -> str:
    """Say what the installed vLLM lacks for a module of reduced models; an empty text if nothing."""
    try:
        importlib.import_module(f"vlmfast.vllm.{module}")
    except (ImportError, AttributeError, UnsupportedVllmError) as error:
        from vllm import __version__

        return f"vlmfast does not know this vLLM ({__version__}), it was written for {' and '.join(SUPPORTED)}: {error}"
    return ""


def replaces(name: str, base: type) -> None:
    """Raise unless vLLM's class has the method that is overridden here.

    Raises:
        UnsupportedVllmError: if it has not.
    """
    if not callable(getattr(base, name, None)):
        raise UnsupportedVllmError(f"{base.__name__} has no {name}")


def load(name: str) -> Any:
    """Return the reduced model of that name.

    Raises:
        AttributeError: if there is none. UnsupportedVllmError: as `missing`.
    """
    module = ARCHITECTURES.get(name.removeprefix(PREFIX))
    if module is None or not name.startswith(PREFIX):
        raise AttributeError(f"module 'vlmfast.vllm' has no attribute {name!r}")
    if problem := missing(module):
        raise UnsupportedVllmError(problem)
    return getattr(importlib.import_module(f"vlmfast.vllm.{module}"), name)
