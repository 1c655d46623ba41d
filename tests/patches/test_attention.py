"""Replaced attention of decoders equals upstream's and calls the modules that upstream calls."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import vlmfast
from vlmfast.patches import attention
from vlmfast.patches.plan import find_sites

HEAD_DIM, TOKENS = 32, 5
CLASSES = (
    "llama.LlamaAttention",
    "qwen2.Qwen2Attention",
    "qwen3.Qwen3Attention",
    "qwen3_moe.Qwen3MoeAttention",
    "mistral.MistralAttention",
    "mixtral.MixtralAttention",
    "qwen2_vl.Qwen2VLAttention",
    "qwen2_5_vl.Qwen2_5_VLAttention",
    "qwen3_vl.Qwen3VLTextAttention",
    "qwen3_vl_moe.Qwen3VLMoeTextAttention",
    "gemma2.Gemma2Attention",
    "gemma3.Gemma3Attention",
    "qwen3_next.Qwen3NextAttention",
    "qwen3_5.Qwen3_5Attention",
    "qwen3_5_moe.Qwen3_5MoeAttention",
)
NORMED = [name for name in CLASSES if "wen3" in name or "gemma3" in name]


def attention_of(name: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make the second of two attention modules of a class, with random weights of norms and a sliding window."""
    folder, class_name = name.split(".")
    try:
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {folder}")
    cls = getattr(modeling, class_name)
    config_class = inspect.signature(cls.__init__).parameters["config"].annotation
    if isinstance(config_class, str):
        config_class = getattr(modeling, config_class)
    config_class = getattr(modeling, config_class.__name__.replace("Config", "TextConfig"), config_class)
    sizes = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6]} if "_vl" in folder else None
    config = config_class(**sizes, head_dim=HEAD_DIM, **({"rope_scaling": rope} if rope else {}))
    config._attn_implementation = implementation
    torch.manual_seed(0)
    module = cls(config, layer_idx=1)
    for norm_name in ("q_norm", "k_norm"):
        if hasattr(module, norm_name):
            nn.init.normal_(getattr(module, norm_name).weight)
    return module.to(dtype).eval()


def inputs_of(module: nn.Module, tokens: int = TOKENS, first: int = 0) -> dict[str, Any]:
    """Make the inputs of two prompts whose positions begin at ``first``."""
    dtype = next(module.parameters()).dtype
    size = HEAD_DIM // 4 if "Next" in type(module).__name__ or "3_5" in type(module).__name__ else HEAD_DIM
    angles = (first + torch.arange(tokens))[None, :, None] * 100.0 ** -torch.linspace(0, 1, size // 2)
    angles = torch.cat([angles, angles], -1)
    if hasattr(module, "rope_scaling"):  # Qwen2-VL of transformers 4.57
        angles = torch.stack([angles, 2 * angles, 3 * angles])
    hidden_states = torch.randn(2, tokens, 4 * HEAD_DIM, dtype=dtype)
    mask = torch.zeros(2, 1, tokens, first + tokens, dtype=dtype).masked_fill(
        torch.ones(tokens, first + tokens, dtype=torch.bool).triu(first + 1), torch.finfo(dtype).min
    )
    positions = angles.cos().to(dtype), angles.sin().to(dtype)
    return {"hidden_states": hidden_states, "position_embeddings": positions, "attention_mask": mask}


def steps(module: nn.Module) -> list[Tensor]:
    """Run a prompt and two further tokens with a cache; return outputs, attention weights and the cache."""
    torch.manual_seed(1)
    cache, found = DynamicCache(), []
    for tokens, first in ((TOKENS, 0), (1, TOKENS), (1, TOKENS + 1)):
        output, weights, *_ = module(**inputs_of(module, tokens, first), past_key_values=cache)
        found += [output, *([] if weights is None else [weights])]
    return [*found, *cache[1][:2]] if hasattr(cache, "__getitem__") else [*found, cache.layers[1].keys]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CLASSES)
def test_it_gives_what_upstream_gives(name: str, implementation: str, dtype: torch.dtype):
    if implementation == "sdpa" and "gemma2" in name:
        pytest.skip("upstream refuses it, for its cap")
    module = attention_of(name, implementation, dtype)
    with torch.no_grad():
        want = steps(module)
        with vlmfast.patch(module) as patch:
            assert f"{name}.forward" in patch.replaced
            got = steps(module)
    assert len(got) == len(want) > 3
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", CLASSES)
def test_gradients(name: str):
    module = attention_of(name, "eager")
    inputs = inputs_of(module)

    def gradients() -> list[Tensor]:
        leaf = inputs["hidden_states"].clone().requires_grad_()
        output = module(**{**inputs, "hidden_states": leaf})[0]
        return list(torch.autograd.grad(output.square().sum(), [leaf, *module.parameters()]))

    want = gradients()
    with vlmfast.patch(module):
        got = gradients()
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record, for each call of the op, whether it includes the norms."""
    seen: list[bool] = []
    op = attention.qk_norm_rope

    def watch(query: Tensor, key: Tensor, query_weight: Tensor | None, *rest: Any) -> Any:
        seen.append(query_weight is not None)
        return op(query, key, query_weight, *rest)

    monkeypatch.setattr(attention, "qk_norm_rope", watch)
    return seen


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize("hooked", ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"])
@pytest.mark.parametrize("name", ["qwen3_vl.Qwen3VLTextAttention", "gemma3.Gemma3Attention"])
def test_hooks_run(name: str, hooked: str, monkeypatch: pytest.MonkeyPatch):
    """A hook on one norm makes both norms run as modules, and the report says so."""
    module = attention_of(name)
    plain = steps(module)[0]
    with vlmfast.patch(module) as patch:
        seen = count_calls(monkeypatch)
        handle = getattr(module, hooked).register_forward_hook(double)
        got = steps(module)
        assert seen == [hooked not in ("q_norm", "k_norm")] * 3
        row = next(line for line in patch.report().splitlines() if f"{name}.forward" in line)
        assert ("1 with norms apart: " + hooked in row) == (hooked in ("q_norm", "k_norm"))
        handle.remove()
        assert torch.equal(steps(module)[0], plain)
        assert seen[-1]
    getattr(module, hooked).register_forward_hook(double)
    assert all(map(torch.equal, got, steps(module)))
    assert not torch.equal(got[0], plain)


@pytest.mark.parametrize("name", NORMED)
def test_a_norm_of_somebody_else_is_called(name: str, monkeypatch: pytest.MonkeyPatch):
    """A norm with an unknown body, or with a forward of its own on the instance, is called as a module."""

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((HEAD_DIM,), 0.5))

        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states * self.weight

    module = attention_of(name)
    module.k_norm = Halved()
    want = steps(module)
    with vlmfast.patch(module) as patch:
        seen = count_calls(monkeypatch)
        assert all(map(torch.equal, steps(module), want))
        assert seen == [False] * 3
        assert "1 with norms apart: k_norm is a Halved whose forward is not replaced" in patch.report()


def test_norms_that_a_pattern_leaves_out_are_called(monkeypatch: pytest.MonkeyPatch):
    module = attention_of("qwen3_vl.Qwen3VLTextAttention")
    want = steps(module)
    with vlmfast.patch(module, exclude="*RMSNorm*"):
        seen = count_calls(monkeypatch)
        assert all(map(torch.equal, steps(module), want))
        assert seen == [False] * 3


def test_angles_of_another_dtype_take_the_lines_of_upstream(monkeypatch: pytest.MonkeyPatch):
    """For example under autocast, which gives bfloat16 projections and float32 cos and sin."""
    module = attention_of("llama.LlamaAttention")
    inputs = inputs_of(module)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = module(**inputs)[0]
        with vlmfast.patch(module):
            seen = count_calls(monkeypatch)
            assert torch.equal(module(**inputs)[0], want)
    assert not seen


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_are_those_of_upstream(name: str):
    module = attention_of(name)
    want = {key: (p.kind, p.default) for key, p in inspect.signature(type(module).forward).parameters.items()}
    (site,) = [site for site in find_sites(module) if site.name == f"{name}.forward"]
    assert {k: (p.kind, p.default) for k, p in inspect.signature(site.body.function).parameters.items()} == want


def test_a_compiled_graph_has_no_break():
    module = attention_of("qwen3_vl.Qwen3VLTextAttention")
    inputs = inputs_of(module)
    with torch.no_grad():
        want = module(**inputs)[0]
        with vlmfast.patch(module):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(**inputs)[0], want)
