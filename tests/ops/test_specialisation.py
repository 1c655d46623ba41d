"""Triton never compiles a kernel for a number that may change with the next prompt."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.cases import PRIMITIVE, each, require
from vlmfast.registry import OPS, Op

pytest.importorskip("triton")

from tests.helpers.specialisation import key_of, launched

D, HEAD_DIM, HEADS, CHANNELS = 2048, 72, 16, 1152


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(batch: int, tokens: int, rng: random.Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield every op call of a prompt with random length, images and kept tokens."""
    visual, kept = rng.randint(16, tokens), rng.randint(1, tokens - 1)
    contextual = min(tokens // 40, tokens - kept)
    hidden, decoded, weight = meta(batch, tokens, D), meta(batch, 1, D), meta(D)
    mask, rows = meta(batch, tokens, dtype=torch.bool), meta(visual, D)
    yield "row_index", (mask,)
    yield "deepstack_add", (hidden, mask, rows)
    yield "place_embeddings", (hidden, mask, rows)
    yield "split_rows", (hidden, mask, visual)
    yield "compact_tokens", (hidden, mask, kept)
    yield "compact_tokens_backward", (meta(batch, kept, D), mask)
    for x in (hidden, decoded, hidden[:, -1:], hidden[:, 3:]):
        yield "rms_norm", (x, weight)
        yield "add_rms_norm", (x, x, weight)
        yield "rms_norm_backward", (x, x, weight)
    for heads in (meta(batch, tokens, HEADS, 128), meta(batch, HEADS, tokens, 128).transpose(1, 2)):
        yield "rms_norm", (heads, meta(128))
        rotary = heads, heads, meta(128), meta(128), meta(1, tokens, 128), meta(1, tokens, 128)
        yield "qk_norm_rope", rotary
        yield "qk_norm_rope_backward", (heads, heads, *rotary)
    for rows_of_heads in (meta(HEADS, visual, HEAD_DIM), meta(visual, HEADS, HEAD_DIM).transpose(0, 1)):
        bounds = meta(rng.randint(2, 500), dtype=torch.int32)
        yield "received_attention", (rows_of_heads, rows_of_heads, bounds)
    crops = meta(batch, visual, HEADS, HEAD_DIM).transpose(1, 2)
    yield "cls_attention", (crops[:, :, 0], crops)
    keys = meta(batch, HEADS // 4, tokens, 128)
    for valid in (None, mask):
        yield "last_row_attention", (meta(batch, HEADS, 128), keys, valid)
    grid = (2 * rng.randint(1, 40), 2 * rng.randint(1, 40))
    patches = meta(batch, grid[0] * grid[1], CHANNELS)
    yield "pixel_shuffle", (patches, grid)
    yield "pixel_unshuffle", (meta(batch, grid[0] * grid[1] // 4, 4 * CHANNELS), grid)
    norm = meta(4 * CHANNELS)
    yield "pixel_shuffle_norm", (patches, norm, norm, grid)
    yield "pixel_shuffle_norm_backward", (meta(batch, grid[0] * grid[1] // 4, 4 * CHANNELS), patches, norm, grid)
    positions = meta(batch, kept, dtype=torch.int64)
    slots = meta(batch, tokens, dtype=torch.int32)
    yield "top_tokens", (meta(batch, tokens, dtype=torch.float32), kept)
    yield "merge_slots", (meta(batch, tokens, HEAD_DIM), positions, contextual)
    yield "merge_rows", (hidden, positions, slots, contextual)
    yield "merge_rows_backward", (meta(batch, kept + contextual, D), slots, contextual)
    features, few = meta(batch, visual, D), min(visual, kept)
    bounds = meta(4, dtype=torch.int32)
    for images in ((), (bounds, bounds, rng.randint(1, visual))):
        in_a_row = features[:1] if images else features
        yield "farthest", (in_a_row, few, None, True, *images)
        yield "dpp_map", (in_a_row, few, None, *images)
        yield "coverage", (meta(len(in_a_row), visual, visual, dtype=torch.float32), few, None, None, *images)
    yield "silu_mul", (hidden, hidden)
    yield "silu_mul_backward", (hidden, hidden, hidden)
    video = meta(batch, rng.randint(2, 64), visual, D)
    yield "frame_novelty", (video,)
    yield "frame_change", (video,)
    mined, pixels, blocks = (
        meta(batch, few, CHANNELS),
        meta(batch, CHANNELS, 96, 96),
        meta(batch, few, dtype=torch.int64),
    )
    yield "mine_patches", (mined, pixels, 4, blocks)
    yield "mine_patches_backward", (mined, mined, pixels, 4, blocks)


def test_prompts_compile_nothing_new() -> None:
    """A batch of short prompts and a long one compile all: `top_tokens` and merging have two sizes of blocks."""
    rng = random.Random(0)
    prompts = [(2, 100), (1, 3000), *((rng.choice((1, 1, 1, 2, 4)), rng.randint(40, 3000)) for _ in range(300))]
    compiled, new, ran = set(), [], set()
    for number, (batch, tokens) in enumerate(prompts):
        for name, args in calls(batch, tokens, rng):
            ran.add(name)
            with launched(execute=False) as found:
                OPS[name].backend("triton").run(*args)
            for kernel, key in found:
                if (kernel, key) not in compiled and number >= 2:
                    new.append((kernel.fn.__name__, number, batch, tokens))
                compiled.add((kernel, key))
    assert not new
    assert ran == {op.name for op in PRIMITIVE}


@pytest.mark.parametrize("op", each(PRIMITIVE))
def test_kernels_are_compiled_for_no_number(op: Op) -> None:
    """This holds for kernels of all families, because `kernels/common/kernel.py` makes all of them."""
    require(op, "triton")
    on_meta = [
        [a.to("meta") if isinstance(a, Tensor) else a for a in args]
        for _, args in op.cases.workloads("cpu", torch.bfloat16)
    ]
    with launched(execute=False) as found:
        for args in on_meta:
            op.backend("triton").run(*args)
    assert found
    for kernel in {kernel for kernel, _ in found}:
        parameters = inspect.signature(kernel.fn).parameters
        numbers = {name for name, p in parameters.items() if "constexpr" not in str(p.annotation)}
        assert {name for name in numbers if not name.endswith("_ptr")} == set(kernel.kwargs["do_not_specialize"])


def test_keys_are_those_of_the_jit() -> None:
    """The key does not depend on counts, but on dtype, alignment, missing tensors, constants and options."""
    from vlmfast.kernels.rms_norm import rms_norm_kernel

    def key(warps: int = 4, target: str = "sm_90", **changes: Any) -> str:
        operands = {f"{name}_ptr": meta(4, 64) for name in ("x", "residual", "weight", "y", "new_residual")}
        numbers = dict.fromkeys(("x_row_stride", "residual_row_stride", "hidden"), 64) | {"rows": 4}
        constants = {"ROUNDED": True, "ALIGNED": 16, "BLOCK_ROWS": 1, "BLOCK_COLUMNS": 64}
        given = {**operands, **numbers, "eps": 1e-6, "weight_offset": 0.0, **constants, **changes}
        return key_of(rms_norm_kernel, given, {"num_warps": warps}, target)

    same = [key(), key(rows=1), key(rows=16), key(hidden=72), key(x_row_stride=1), key(eps=1.0)]
    assert len(set(same)) == 1
    odd = torch.empty(65, dtype=torch.bfloat16)[1:]
    others = [key(residual_ptr=None), key(x_ptr=meta(4, 64, dtype=torch.float32)), key(x_ptr=odd), key(ALIGNED=8)]
    different = [key(), *others, key(warps=8), key(rows=2**33)]
    assert all(a != b for a, b in itertools.combinations(different, 2))
    large = meta(2**16, 2**14)  # 2 GB: on AMD smaller tensors are accessed by offsets of 32 bits
    assert key(x_ptr=large) == key()
    assert key(x_ptr=large, target="gfx942") != key(target="gfx942")


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmfast.kernels.common import launch

    asked: list[torch.device] = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(multi_processor_count=132, shared_memory_per_block=48, shared_memory_per_block_optin=227)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    launch.properties_of.cache_clear()
    on_first, on_second = (SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in (0, 1))
    for x in (on_first, on_first, on_second):
        assert (launch.processors(x), launch.shared_memory(x)) == (132, 227)
    launch.properties_of.cache_clear()
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 1)]
