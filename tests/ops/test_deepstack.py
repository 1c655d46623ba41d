"""DeepStack's additions against hooks that index with the mask."""

from __future__ import annotations

import contextlib
import warnings
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vlmfast
from tests.helpers import tiny_models as tiny

WIDTH = 64  # hidden size of the tiny language models
PROMPT = torch.tensor([[1, 3, 3, 9, 3, 8], [0, 0, 3, 7, 3, 3]])  # the second prompt is padded on the left
POSITIONS = PROMPT == tiny.IMAGE


# ---- deepstack, in a language model ----


@contextlib.contextmanager
def naive(layers, levels, positions, start: int = 1, interval: int = 1):
    def add(level):
        def hook(layer, args):
            hidden = args[0]
            if hidden.shape[1] != positions.shape[1]:
                return None
            hidden = hidden.clone()
            hidden[positions] += level.to(hidden.dtype)
            return (hidden, *args[1:])

        return hook

    handles = [layers[start + k * interval].register_forward_pre_hook(add(level)) for k, level in enumerate(levels)]
    yield
    for handle in handles:
        handle.remove()


def language_model(model_type: str = "llama", layers: int = 5) -> nn.Module:
    return tiny.model(model_type, **tiny.text(num_hidden_layers=layers))


def random_levels(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 3 * torch.randn(number, int(POSITIONS.sum()), WIDTH, dtype=dtype)


def hooks(layers) -> list[int]:
    return [len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in layers]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=PROMPT, attention_mask=(PROMPT != 0).long()).logits


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize(("start", "interval", "number"), [(1, 1, 4), (0, 2, 3), (2, 1, 1), (1, 3, 2)])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_levels_are_added_before_their_layers(model_type: str, start: int, interval: int, number: int, dtypes: tuple):
    model, levels = language_model(model_type).to(dtypes[0]), random_levels(number, dtypes[1])
    layers = model.model.layers
    plain = logits(model)
    with naive(layers, levels, POSITIONS, start, interval):
        want = logits(model)
    with vlmfast.deepstack(layers, levels, POSITIONS, start=start, interval=interval) as handle:
        hooked = [max(level - 1, 0) for level in range(start, start + number * interval, interval)]
        assert hooks(layers) == [hooked.count(i) for i in range(5)]
        got = logits(model)
        assert repr(handle) == f"<DeepStack: {number} layers>"
    assert torch.equal(got, want)
    assert not torch.equal(got, plain)
    assert torch.equal(logits(model), plain)
    assert repr(handle) == "<DeepStack: removed>"


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_generate(model_type: str):
    """Only the prefill sees the levels."""
    model, levels = language_model(model_type), random_levels(3)
    arguments = {"input_ids": PROMPT, "attention_mask": (PROMPT != 0).long(), "do_sample": False, "max_new_tokens": 8}
    plain = model.generate(**arguments)
    with naive(model.model.layers, levels, POSITIONS):
        want = model.generate(**arguments)
    handle = vlmfast.deepstack(model.model.layers, levels, POSITIONS)
    got = model.generate(**arguments)
    handle.remove()
    handle.remove()
    assert torch.equal(got, want)
    assert not torch.equal(got, plain)
    assert torch.equal(model.generate(**arguments), plain)


def gradients(model: nn.Module, levels: Tensor, context) -> list[Tensor]:
    weights = dict(model.named_parameters())
    wanted = [levels, weights["model.embed_tokens.weight"], weights["model.layers.1.mlp.up_proj.weight"]]
    model.zero_grad()
    levels.grad = None
    with context:
        model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    return [value.grad for value in wanted]


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_gradients(reentrant: bool | None):
    model, levels = language_model().train(), random_levels(3).requires_grad_()
    want = gradients(model, levels, naive(model.model.layers, levels, POSITIONS))
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, levels, vlmfast.deepstack(model.model.layers, levels, POSITIONS))
    for gradient, expected in zip(got, want, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(gradient, expected)


@torch.no_grad()
def test_compiled_model():
    """torch.compile would not notice by itself that hooks were added or removed."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    compiled, hidden = torch.compile(model, backend="eager"), torch.randn(2, 6, WIDTH)
    plain = model(hidden)
    assert torch.equal(compiled(hidden), plain)
    for levels in (random_levels(1), random_levels(1)):
        with naive(model, levels, POSITIONS):
            want = model(hidden)
        with vlmfast.deepstack(list(model), levels, POSITIONS):
            assert torch.equal(compiled(hidden), want)
    assert torch.equal(compiled(hidden), plain)


class Checkpointed(nn.Sequential):
    """Runs its layers, with their hooks, under torch.utils.checkpoint."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self:
            hidden_states = checkpoint(layer.__call__, hidden_states, use_reentrant=False)
        return hidden_states


@pytest.mark.filterwarnings("error:vlmfast.deepstack")
def test_compiled_and_checkpointed_model():
    model, hidden, levels = Checkpointed(nn.Linear(WIDTH, WIDTH)), torch.randn(2, 6, WIDTH), random_levels(1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for run, context in ((model, naive), (compiled, vlmfast.deepstack)):
        leaf = levels.clone().requires_grad_()
        with context(list(model), leaf, POSITIONS, start=0):
            run(hidden).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0])


class Layer(nn.Module):
    """A layer that takes its hidden states by keyword."""

    def forward(self, scale: float = 1.0, hidden_states: Tensor | None = None) -> Tensor:
        return hidden_states * scale


class Returning(nn.Module):
    """A layer that returns a tuple of the hidden states and something else."""

    def forward(self, hidden_states: Tensor | None = None) -> tuple:
        return hidden_states, "cache"


def test_layers_that_return_tuples():
    (level,) = random_levels(1)
    want = torch.zeros(2, 6, WIDTH)
    want[POSITIONS] = level
    first = Returning()
    with vlmfast.deepstack([first, Layer()], [level], POSITIONS):
        added, cache = first(torch.zeros(2, 6, WIDTH))
    assert torch.equal(added, want)
    assert cache == "cache"


def test_keyword_and_layouts():
    layer = Layer()
    hidden = torch.randn(2, 6, 2 * WIDTH)[..., ::2]
    before = hidden.clone()
    (level,) = random_levels(1)
    want = hidden.clone()
    want[POSITIONS] += level
    for levels in (level[None], [level], (level,)):
        with vlmfast.deepstack([layer], levels, POSITIONS, start=0):
            assert torch.equal(layer(hidden_states=hidden, scale=2.0), 2 * want)
    assert torch.equal(hidden, before)


def test_cached_step_is_left_alone():
    layer, (level,), positions = Layer(), random_levels(1), torch.tensor([[True]])
    step = torch.randn(2, 1, WIDTH)
    with vlmfast.deepstack([layer], [level], POSITIONS, start=0):
        layer(hidden_states=torch.zeros(2, 6, WIDTH))
        assert torch.equal(layer(hidden_states=step), step)
    with vlmfast.deepstack([layer], [level[:1]], positions, start=0):
        assert torch.equal(layer(hidden_states=step[:1]), step[:1] + level[0])


def test_positions_are_copied():
    layer, levels, positions = Layer(), random_levels(1), POSITIONS.clone()
    want = torch.zeros(2, 6, WIDTH)
    want[POSITIONS] = levels[0]
    with vlmfast.deepstack([layer], levels, positions, start=0):
        positions.copy_(positions.flip(1))
        assert torch.equal(layer(hidden_states=torch.zeros_like(want)), want)


def test_remove_twice(monkeypatch: pytest.MonkeyPatch):
    """torch.compile is reset once when the hooks are set and once when they are removed."""
    traced = Mock()
    monkeypatch.setattr("vlmfast.deepstack_hooks.trace_anew", traced)
    layer = Layer()
    handle = vlmfast.deepstack([layer], random_levels(1), POSITIONS, start=0)
    layer(hidden_states=torch.zeros(2, 6, WIDTH))
    assert traced.call_count == 1
    handle.remove()
    handle.remove()
    assert traced.call_count == 2


def test_warns_if_nothing_was_added():
    layer, levels = Layer(), random_levels(1)
    warns = pytest.warns(UserWarning, match="vlmfast.deepstack added nothing")
    with warns as caught, vlmfast.deepstack([layer], levels, POSITIONS, start=0):
        layer(hidden_states=torch.zeros(2, 1, WIDTH))
    assert caught[0].filename == __file__
    handle = vlmfast.deepstack([layer], levels, POSITIONS, start=0)
    with warns as caught:
        handle.remove()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), vlmfast.deepstack([layer], levels, POSITIONS, start=0):
            raise KeyError
        with vlmfast.deepstack([layer], levels, POSITIONS, start=0):
            layer(hidden_states=torch.zeros(2, 6, WIDTH))


def test_row_index_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    """It is cached on every device but a CPU, where computing it costs less than checking the cache."""
    computed, layers = Mock(wraps=vlmfast.row_index), [Layer() for _ in range(3)]
    added = Mock(wraps=vlmfast.deepstack_add)
    monkeypatch.setattr("vlmfast.deepstack_hooks.row_index", computed)
    monkeypatch.setattr("vlmfast.deepstack_hooks.deepstack_add", added)
    with vlmfast.deepstack(layers, random_levels(3).to("meta"), POSITIONS.to("meta"), start=0):
        for layer in layers:
            layer(hidden_states=torch.zeros(2, 6, WIDTH, device="meta"))
    assert computed.call_count == 1
    indices = [call.args[3] for call in added.call_args_list]
    assert [index.dtype for index in indices] == [torch.int32] * 3
    assert all(index is indices[0] for index in indices)


@pytest.mark.gpu
def test_on_a_gpu():
    model, levels, positions = language_model().cuda(), random_levels(3).cuda(), POSITIONS.cuda()
    with naive(model.model.layers, levels, positions):
        want = model(PROMPT.cuda()).logits
    with vlmfast.deepstack(model.model.layers, levels, positions):
        positions.zero_()
        assert torch.equal(model(PROMPT.cuda()).logits, want)


# ---- deepstack, in a vision tower ----


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model"])
def test_vision_tower(model_type: str):
    """DeepStack-V: four crops run the first half, and their patches are added to the overview in the second."""
    from transformers import AutoConfig, AutoModel

    config = {**tiny.vision(num_hidden_layers=8), **({"vision_use_head": False} if "siglip" in model_type else {})}
    tower = AutoModel.from_config(AutoConfig.for_model(model_type, **config)).eval()
    tower = getattr(tower, "vision_model", tower)  # holds the encoder in transformers 4 and 5.17
    layers, pixels, half, entered = tower.encoder.layers, torch.randn(1 + 4, 3, 28, 28), 4, []
    recorder = layers[half].register_forward_pre_hook(lambda layer, args: entered.append(args[0]))
    has_cls = int("clip" in model_type)
    positions = torch.ones(1, has_cls + 16, dtype=torch.bool)
    positions[:, :has_cls] = False
    with torch.no_grad():
        tower(pixels[1:])
        recorder.remove()
        crops = entered[0][:, has_cls:]
        plain = tower(pixels[:1]).last_hidden_state
        levels = vlmfast.deepstack_levels(crops, (2, 2), 4)
        with naive(layers, levels, positions, start=half):
            want = tower(pixels[:1]).last_hidden_state
        with vlmfast.deepstack(layers, levels, positions, start=half):
            got = tower(pixels[:1]).last_hidden_state
    assert torch.equal(got, want)
    assert not torch.equal(got, plain)


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": 5}, TypeError, "layers must be a sequence of torch.nn.Module, got int"),
        ({"layers": nn.Linear(2, 2)}, TypeError, "layers must be a sequence of torch.nn.Module, got Linear"),
        ({"layers": [Layer(), None]}, TypeError, "layers must be a sequence of torch.nn.Module, got list"),
        ({"levels": None}, TypeError, "levels must be a tensor .* or a sequence of tensors .*, got NoneType"),
        ({"levels": [1.0]}, TypeError, r"levels\[0\] must be a torch.Tensor, got float"),
        ({"levels": random_levels(2).double()}, TypeError, r"levels\[0\] must be float32, float16 or bfloat16"),
        ({"levels": []}, ValueError, "levels must hold one level or more, got none"),
        ({"levels": random_levels(1)[0]}, ValueError, r"levels\[0\] must have shape \(V, D\), got \(64,\)"),
        ({"levels": [*random_levels(1), random_levels(1)[0, 1:]]}, ValueError, r"levels\[1\] must have the shape of"),
        ({"levels": random_levels(1).to("meta")}, ValueError, r"levels\[0\] must be on the device of positions, cpu"),
        ({"levels": random_levels(2)[:, 1:]}, ValueError, "positions must be true at as many .* 5, got 6"),
        ({"levels": random_levels(5)}, ValueError, "levels must fit into layers: the last of 5 would go to layer 5"),
        ({"levels": random_levels(3), "interval": 2}, ValueError, r"layer 5 \(start 1, interval 2\).* 5 layers"),
        ({"positions": PROMPT}, TypeError, "positions must be bool, got torch.int64"),
        ({"positions": POSITIONS[0]}, ValueError, r"positions must have shape \(B, T\), got \(6,\)"),
        ({"start": -1}, ValueError, "start must be at least 0, got -1"),
        ({"start": 1.0}, TypeError, "start must be an int, got float"),
        ({"start": 4}, ValueError, "the last of 2 would go to layer 5"),
        ({"interval": 0}, ValueError, "interval must be at least 1, got 0"),
    ],
)
def test_bad_calls(arguments: dict, error: type[Exception], message: str):
    layers = nn.ModuleList(Layer() for _ in range(5))
    with pytest.raises(error, match=message):
        vlmfast.deepstack(**{"layers": layers, "levels": random_levels(2), "positions": POSITIONS, **arguments})
    assert hooks(layers) == [0] * 5


@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        (torch.ones(1, 6, WIDTH), ValueError, r"positions must be those of the pass, \(1, 6\), got \(2, 6\)"),
        (torch.ones(2, 5, WIDTH), ValueError, r"positions must .* \(2, 5\), got \(2, 6\): run the prefill in one"),
        (torch.ones(2, 7, WIDTH), ValueError, r"positions must be those of the pass, \(2, 7\), got \(2, 6\)"),
        (torch.ones(2, 6, 8), ValueError, "levels must have the width of the hidden states, 8, got 64"),
        (torch.ones(2, 6, WIDTH).double(), TypeError, "hidden_states must be float32, float16 or bfloat16"),
        (torch.ones(6, WIDTH), TypeError, r"must be called with hidden states \(B, T, D\).* Layer was not"),
        (None, TypeError, r"must be called with hidden states \(B, T, D\).* Layer was not"),
    ],
)
@pytest.mark.parametrize("start", [0, 1])
def test_bad_passes(hidden: Tensor | None, error: type[Exception], message: str, start: int):
    layers = [Layer() if start == 0 else Returning(), Layer()]
    message = (
        message
        if start == 0
        else message.replace("called with", "such as return").replace("Layer was", "Returning does")
    )
    with pytest.raises(error, match=message), vlmfast.deepstack(layers, random_levels(1), POSITIONS, start=start):
        layers[0](hidden_states=hidden)
    assert hooks(layers) == [0, 0]


def test_failure_half_way_leaves_no_hook():
    class Refusing(Layer):
        def register_forward_hook(self, *args, **kwargs):
            raise RuntimeError("no hooks here")

    layers = [Layer(), Layer(), Refusing(), Layer()]
    with pytest.raises(RuntimeError, match="no hooks here"):
        vlmfast.deepstack(layers, random_levels(4), POSITIONS, start=0)
    assert hooks(layers) == [0, 0, 0, 0]
