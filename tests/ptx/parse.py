"""Parse PTX text into kernels: parameters, registers, variables, labels and instructions."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.ptx.values import TYPES, Type

VERSIONS = ((7, 0), (9, 4))  # the oldest and the newest supported version of PTX
TARGETS = {"sm_80", "sm_90", "sm_90a", "sm_100a"}


class PtxError(Exception):
    """A kernel does what no kernel may do, or uses something that is not supported here."""


@dataclass
class Instruction:
    """One instruction; ``flags`` are the modifiers between its name and its types."""

    name: str  # for example "add" of add.rn.f32
    flags: tuple[str, ...]  # for example "rn"
    types: tuple[Type, ...]  # for example f32
    args: list[str]
    predicate: str | None = None
    negated: bool = False
    text: str = ""
    line: str = ""  # "file:number" in the source that it was compiled from

    @property
    def opcode(self) -> str:
        return ".".join([self.name, *self.flags, *(t.name for t in self.types)])


@dataclass
class Variable:
    """A variable in memory that a module or a kernel declares."""

    size: int
    align: int
    data: bytes = b""


@dataclass
class Kernel:
    """One entry of a module, with those variables of the module that it uses."""

    name: str
    params: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset and size in bytes
    param_types: dict[str, Type] = field(default_factory=dict)
    divisible: set[str] = field(default_factory=set)  # parameters that were multiples of 16 in every launch so far
    threads: tuple[int, ...] | None = None  # block size, if the kernel requires one
    most_threads: int | None = None  # of a block, if the kernel has a limit
    registers: dict[str, Type] = field(default_factory=dict)
    spaces: dict[str, dict[str, Variable]] = field(default_factory=dict)  # shared, local, global -> name -> variable
    dynamic_shared: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def param_size(self) -> int:
        return max((offset + size for offset, size in self.params.values()), default=0)


def split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    if not re.search(r"[{\[(]", text):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    return [*parts, text[begin:].strip()] if text[begin:].strip() else parts


def names_of(text: str) -> list[str]:
    """Return the registers of a vector operand, or the single register of a scalar one."""
    return split(text.strip("{} ")) if text.startswith("{") else [text]


_DECLARATION = re.compile(
    r"(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([$\w]+)(?:\[(\d*)\])?\s*(?:=\s*(.+))?$",
    re.S,
)


def _declare(statement: str, kernel: Kernel) -> bool:
    """Add the variable that a statement declares; return False if it declares none."""
    found = _DECLARATION.match(statement)
    if found is None:
        return False
    space, align, kind, name, count, values = found.groups()
    if count == "":
        kernel.dynamic_shared.append(name)
        return True
    size = TYPES[kind].size
    data = b"".join(
        (int(v, 0) % (1 << 8 * size)).to_bytes(size, "little") for v in split((values or "").strip("{} \n"))
    )
    variable = Variable(size * int(count or 1), int(align or size), data)
    kernel.spaces.setdefault("global" if space == "const" else space, {})[name] = variable
    return True


def _statements(body: str) -> Iterator[str]:
    """Yield statements without semicolons, labels as "name:", and the braces of scopes."""
    text, depth = "", 0
    for piece in re.split(r"([{};]|(?<!:):(?!:))", body):
        begins = not text.strip()
        if (piece == "{" and begins) or (piece == "}" and depth == 0):
            if not begins:
                yield text.strip()
            yield piece
            text = ""
        elif piece == ";" and depth == 0:
            if not begins:
                yield text.strip()
            text = ""
        elif piece == ":" and re.fullmatch(r"\s*[$\w]+\s*", text):
            yield text.strip() + ":"
            text = ""
        else:
            depth += {"{": 1, "}": -1}.get(piece, 0)
            text += piece
    if text.strip():
        raise PtxError(f"a statement without an end: {text.strip()}")


@functools.cache
def _opcode(text: str) -> tuple[str, tuple[str, ...], tuple[Type, ...]]:
    """Split an opcode into its name, flags and types."""
    parts = text.replace("::cta", "").split(".")
    first = len(parts)
    while first > 1 and parts[first - 1] in TYPES:
        first -= 1
    return parts[0], tuple(parts[1:first]), tuple(TYPES[name] for name in parts[first:])


_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_NAME = re.compile(r"[%$A-Za-z_][\w$@]*")


def _instruction(statement: str, line: str, renamed: list[dict[str, str]]) -> Instruction:
    """Parse an instruction; ``renamed`` has the unique names of registers of each scope around it."""
    found = _INSTRUCTION.match(statement)
    if found is None:
        raise PtxError(f"not an instruction: {statement}")
    negated, predicate, opcode, operands = found.groups()
    if any(renamed):
        unique = {name: other for scope in renamed for name, other in scope.items()}
        predicate = unique.get(predicate, predicate)
        operands = _NAME.sub(lambda found: unique.get(found[0], found[0]), operands)
    text = " ".join(statement.split())
    return Instruction(*_opcode(opcode), split(operands), predicate, negated == "!", text, line)


def _registers(statement: str, kernel: Kernel, scopes: list[dict[str, str]]) -> None:
    found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
    kind = TYPES[found[1]]
    for name in split(found[2]):
        many = re.match(r"(.*)<(\d+)>", name)
        if many:
            kernel.registers |= {f"{many[1]}{index}": kind for index in range(int(many[2]))}
        else:  # inline assembly declares registers of the same name in several scopes
            unique = f"{name}@{len(kernel.registers)}" if len(scopes) > 1 else name
            scopes[-1][name] = unique
            kernel.registers[unique] = kind


def _body(kernel: Kernel, text: str, files: dict[str, str]) -> None:
    scopes: list[dict[str, str]] = [{}]
    line = ""
    for statement in _statements(re.sub(r"^\s*(\.loc[^\n]*)$", r"\1;", text, flags=re.M)):
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.instructions)
        elif statement.split()[0] == ".loc":
            _, file, number = statement.split()[:3]
            line = f"{files.get(file, file)}:{number}" if number != "0" else line  # 0 stands for several lines or none
        elif statement.startswith(".reg"):
            _registers(statement, kernel, scopes)
        elif _declare(statement, kernel) or statement.startswith((".param", ".pragma")):
            continue
        else:
            kernel.instructions.append(_instruction(statement, line, scopes))


def _parameters(kernel: Kernel, text: str) -> None:
    offset = 0
    for declaration in split(text):
        words = declaration.split()
        name, _, count = words[-1].partition("[")
        kind = TYPES[next(word[1:] for word in words if word[1:] in TYPES)]
        given = int(words[words.index(".align") + 1]) if ".align" in words and ".ptr" not in words else 1
        align, size = max(given, kind.size), kind.size * int(count.rstrip("]") or 1)
        offset = -(-offset // align) * align
        kernel.params[name], kernel.param_types[name] = (offset, size), kind
        kernel.divisible.add(name)
        offset += size


def _check(text: str) -> None:
    version, target = re.search(r"^\.version (\d+)\.(\d+)", text, re.M), re.search(r"^\.target (\w+)", text, re.M)
    if version is None or target is None:
        raise PtxError("PTX without a version or a target")
    if not VERSIONS[0] <= (int(version[1]), int(version[2])) <= VERSIONS[1]:
        raise PtxError(f"PTX {version[1]}.{version[2]} is not known here, only 7.0 to 9.4")
    if target[1] not in TARGETS:
        raise PtxError(f"the target {target[1]} is not known here, only {', '.join(sorted(TARGETS))}")


def parse(text: str, name: str) -> Kernel:
    """Read one kernel of a module.

    Raises:
        PtxError: for an unsupported version, target or statement.
    """
    _check(text)
    files = {number: path.rpartition("/")[2] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.section\b.*?^\s*\}", "", text, flags=re.S | re.M)  # debug information
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)([^{{]*)\{{(.*?)^\}}", text, re.S | re.M)
    if entry is None:
        raise PtxError(f"the PTX has no kernel {name}")
    parameters, directives, body = entry.groups()
    kernel = Kernel(name)
    outside = re.sub(r"^\{.*?^\}", "", text, flags=re.S | re.M)
    for declaration in re.findall(r"^[^\n;]*\.(?:global|const|shared)\s[^;]*;", outside, re.M):
        found = _DECLARATION.match(declaration[:-1].strip())
        if found and re.search(rf"{re.escape(found[4])}(?![$\w])", body):
            _declare(declaration[:-1].strip(), kernel)
    if demanded := re.search(r"\.reqntid\s+([\d, ]+)", directives):
        kernel.threads = tuple(int(n) for n in demanded[1].split(","))
    if limit := re.search(r"\.maxntid\s+([\d, ]+)", directives):
        kernel.most_threads = math.prod(int(n) for n in limit[1].split(","))
    _parameters(kernel, parameters)
    _body(kernel, body, files)
    return kernel
