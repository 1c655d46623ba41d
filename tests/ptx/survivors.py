"""Reasons why no test notices certain changes of an instruction.

Each reason states the fate of such a change, which is checked: "same" if it gave the number of the unchanged
instruction in every thread of every call, "hidden" if it gave other numbers, on which no result depends.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from tests.ptx.parse import Instruction

KERNELS = Path(__file__).parents[2] / "kernels"


@dataclass(frozen=True)
class Reason:
    """A reason, and the changes it applies to: regular expressions of opcodes, source line and kernel name."""

    fate: str
    change: str
    source: str
    why: str
    kernel: str = ""


CHOOSING = "^(farthest|dpp_map|coverage)_kernel$"
BEHIND = "a thread has every 256th position, and this one is behind the tokens of all calls of this specialisation"

REASONS = (
    Reason(
        "same",
        r"^setp\.lt\.\w+ -> setp\.le\.",
        r"^entry = tl\.load\(ptr \+ last",
        "step k of the search looks just behind the last number only where their count is 2^k - 1 modulo 2^(k + 1)",
    ),
    Reason(
        "hidden",
        r"^(add\.s32 -> add\.s32|or\.b32 -> or\.b32)",
        r"^last = count \+ \(1 << ",
        "the address is computed apart from it; step k then leaves out the last number only where their count is 2^k "
        "modulo 2^(k + 1)",
    ),
    Reason(
        "hidden",
        r"^add\.s64",
        r"^entry = tl\.load\(ptr \+ last",
        "where there are fewer than 2^k numbers, nothing is read at the address of step k",
    ),
    Reason(
        "hidden",
        r"^setp\.ge\.s32 -> setp\.gt",
        r"^count = tl\.where\(\(last < size\)",
        "these ranks only spare the metrics of kept tokens, whose slots come from ranks that other threads hold",
        "^merge_slots_kernel$",
    ),
    Reason(
        "same",
        r"^shl\.b64",
        r"^grad_ptr \+= batch \* grad_batch_stride",
        "the calls of this specialisation have one image; those of others have two",
        "^mine_backward_kernel$",
    ),
    Reason(
        "same",
        r"^add\.s32 -> sub\.s32",
        r"^column = start \+ tl\.arange",
        "a row is one block of columns, which begins at 0, in each call of this specialisation",
    ),
    Reason(
        "same",
        r"^setp\.\w+\.[su]",
        r"^for .* in .*range\(|= tl\.zeros\(",  # the compiler puts the test for no rounds before the loop
        "the loop runs at least once in each call of this specialisation, and no row ends one place further",
    ),
    Reason(
        "hidden",
        r"^setp\.lt\.\w+ -> setp\.le\.",
        r"^for (first in range\(start, stop, BLOCK\)|start in tl\.range\(0, partials,)",
        "a round more, behind the end, loads nothing and adds zeros",
    ),
    Reason(
        "same",
        r"^setp\.(lt|le|gt|ge)\.[su]\d+ -> setp\.(lt|le|gt|ge)\.[su]",
        r"<|>|centre|_flags|aligned|^peak = higher$",  # the last: comparisons behind the loop have the line of its end
        "a thread compares its own places of a block with the end: no call ends just there, and where a block is more "
        "than half full, or a program's first row, none can",
    ),
    Reason(
        "same",
        r"^(add|sub|bfe|shr|and)\.",
        r"[%/]",
        "what is divided is never negative, and the correction of a signed division always zero",
    ),
    Reason(
        "hidden",
        r"^setp\.eq\.\w+ -> setp\.ne\.",
        r"^tl\.store\(\w+ \+ tl\.program_id\(0\), \w+\)|^standard\.py: return core\.reduce\(",
        "each thread of the block or warp has the number, so others than the first may store it",
    ),
    Reason(
        "same",
        "",
        r"^(tl\.device_assert\(|is_within )",
        "what is asserted holds in every sample: no sum of violations changes",
    ),
    Reason(
        "same",
        r"^selp\.b32 -> selp\.b32",
        r"tl\.where\(both == 0, 1\.0, both\)",
        "the real shape has no row of zeros, for which the quotient is not used either",
    ),
    Reason(
        "hidden",
        r"^setp",
        r"tl\.program_id\(0\) == 0",
        "which program counts the rows makes no difference to a call whose count is right",
    ),
    Reason(
        "hidden",
        r"^setp\.(gt|ge)",
        r"rank >= 0",
        "the placeholder before the first row is given a row too: zeros, which its own mask loads",
    ),
    Reason(
        "hidden",
        r"^(add|or)\.\w+ -> (add|or)\.",
        r"_flags\(|tl\.arange",
        "a thread's places begin at multiples of a vector, where blocks and rows end too: one place further, a mask "
        "says the same",
    ),
    Reason(
        "hidden",
        r"^(mul|add|shl)\.",
        r"^partial_ptr \+ row",
        "a fifth step has more than 320 partial sums, which only GPUs with more than 160 multiprocessors make",
        "^sum_partials_kernel$",
    ),
    Reason(
        "hidden",
        r"^shfl\.sync\.up\.b32 -> shfl\.sync\.down",
        r"^standard\.py: return core\.associative_scan",
        "nothing reads what the last shuffle of the scan gives",
        "^top_tokens_kernel$",
    ),
    Reason(
        "same",
        r"^and\.pred -> or\.pred",
        r"^(mask =|return row, column,) \(row < rows\) & \(column < hidden\)",
        "the first row of a program always exists, and so does the first half of a block of columns",
    ),
    Reason("hidden", r"^mov\.", r"offset_of|tl\.load", "what a masked load gives instead is stored nowhere"),
    Reason(
        "hidden",
        r"^(add|sub|shfl|mul|fma)\.",
        r"error|_row_sum|standard\.py",
        "what the first mean was off is a rounding of float32, far below one of bfloat16",
        "pixel_shuffle_norm",
    ),
    Reason(
        "hidden",
        r"^add\.f32 -> sub\.f32",
        r"standard\.py",
        "the mean of some channels, which is subtracted before the sums and added after them, need not be exact: in "
        "bfloat16 no rounding of float32 shows",
        "^mine_kernel$",
    ),
    Reason(
        "hidden",
        r"^((mul|min)\.f32|add\.s64)",
        r"^(both = inverse|nearest = tl\.minimum|tl\.store\(new_ptr)",
        BEHIND,
        CHOOSING,
    ),
    Reason("same", r"^add\.s32 -> sub\.s32", r"^standard\.py: return core\.associative_scan", BEHIND, CHOOSING),
    Reason(
        "hidden",
        r"^selp\.b32 -> selp\.b32",
        r"^best = .*tl\.where\(bound == most, position, ",
        "some token has the highest bound, so the position that stands for the others is never the smallest",
        "^coverage_kernel$",
    ),
    Reason(
        "hidden",
        r"^shl\.b16 -> shr\.b16",
        r"tl\.where\(tl\.abs\(wide\) < ",
        "all ones have the bit after either shift; the lowest of these packed flags, which changes, is not read",
        "^coverage_kernel$",
    ),
    Reason(
        "hidden",
        r"^(and\.b32 -> and|shr\.u32 -> shr)\.",
        r"tl\.where\(tl\.abs\(wide\) < ",
        "the test finds the same: rows behind the last one are 0, and the flag that a 0 is finite is always set",
        "^coverage_kernel$",
    ),
    Reason(
        "hidden",
        r"^mov\.b64",
        r"^for start in tl\.range\(0, step",
        "rows are counted in the upper half of the number; the lower one is shifted out",
        "^dpp_map_kernel$",
    ),
    Reason(
        "never ran",
        r"^(and|mov)\.",
        r"standard\.py",
        "it runs in place of the loop over no tokens; but without tokens there are no rows, and no launch",
        "^merge_rows_kernel$",
    ),
    Reason(
        "hidden",
        r"^(selp\.b32 -> selp|shfl\.sync\.bfly\.b32 -> shfl\.sync\.up|redux\.sync\.add\.s32 -> redux\.sync\.max)\.",
        r"standard\.py",
        "of the number of sums that are NaN it matters only whether it is zero: 0 times an infinite number makes those "
        "of all other targets NaN, and finite sums are the same row by row",
        "^merge_rows_kernel$",
    ),
)


@functools.cache
def _line(kernel: str, line: str) -> str:
    """Return the text of a source line "file:number", of Triton's own files with the name; itself without a number."""
    from triton import language

    file, _, number = line.partition(":")
    home = next(path.parent for path in KERNELS.rglob("*.py") if f"def {kernel}(" in path.read_text())
    own = Path(language.__file__).parent / file
    found = [path for path in (home / file, KERNELS / "common" / file, *KERNELS.rglob(file), own) if path.exists()]
    if not found or not int(number):
        return line
    text = found[0].read_text().splitlines()[int(number) - 1].strip()
    return f"{file}: {text}" if found[0] == own else text


def explain(kernel: str, was: Instruction, changed: Instruction, fate: str) -> str | None:
    """Return the reason why a change of a kernel was not noticed, or None if none applies."""
    source, change = _line(kernel, was.line), f"{was.opcode} -> {changed.opcode}"
    for one in REASONS:
        places = ((one.change, change), (one.source, source), (one.kernel, kernel))
        if one.fate == fate and all(re.search(pattern, text) for pattern, text in places):
            return one.why
    return None
