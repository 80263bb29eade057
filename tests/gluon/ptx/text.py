"""The text of a module, taken apart: statements, registers and labels with their scopes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.gluon.ptx.errors import UnknownInstruction

KINDS = {
    "pred": "pred", "b16": "half", "u16": "half", "s16": "half", "f16": "half", "b32": "word",
    "u32": "word", "s32": "word", "f32": "word", "f16x2": "word", "b64": "long", "u64": "long",
    "s64": "long", "f64": "long",
}  # fmt: skip
"""Register kinds by declared type: PTX tells them apart by size alone."""

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LINE_DIRECTIVE = re.compile(r"^\s*\.(?:loc|file|section)\b[^\n]*$", re.M)
_TOKEN = re.compile(r"\s*(?:(?P<label>[$A-Za-z_][\w$]*):(?!:)|(?P<brace>[{}])|(?P<text>[^;]+);)")
_GUARD = re.compile(r"@(?P<not>!?)(?P<name>[%\w]+)\s+(?P<rest>.*)", re.S)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\b[^,)]*?\s)?([\w$]+)\s*(?=[,)])")


@dataclass
class Scope:
    """Names between two braces; inner ones hide outer ones."""

    outer: Scope | None
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def declaring(self, name: str) -> Scope | None:
        """The innermost scope that declares a register."""
        scope: Scope | None = self
        while scope is not None and name not in scope.registers:
            scope = scope.outer
        return scope

    def label(self, name: str) -> int:
        """The statement that a label stands before."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.outer
        raise UnknownInstruction(f"no label {name} is in scope")


@dataclass(frozen=True)
class Statement:
    """One instruction: ``@guard opcode operands;``, where ``guard`` is (register, negated)."""

    guard: tuple[str, bool] | None
    opcode: str
    operands: tuple[str, ...]
    scope: Scope

    def __str__(self) -> str:
        guard = f"@{'!' if self.guard[1] else ''}{self.guard[0]} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Entry:
    """A kernel: parameters (name, type) in order, and its statements."""

    parameters: tuple[tuple[str, str], ...]
    statements: tuple[Statement, ...]


def parse(ptx: str, name: str) -> Entry:
    """The kernel ``name`` of a module."""
    ptx = _LINE_DIRECTIVE.sub("", _COMMENT.sub("", ptx))
    found = re.search(rf"\.entry\s+{re.escape(name)}\s*\(", ptx)
    if not found:
        raise UnknownInstruction(f"the module has no entry {name}")
    start = ptx.index("{", found.end())
    parameters = tuple((n, kind) for kind, n in _PARAMETER.findall(ptx[found.end() - 1 : start]))
    return Entry(parameters, tuple(_statements(ptx[start:])))


def _statements(body: str) -> Iterator[Statement]:
    """Statements of a function's body, which begins with its brace.

    A brace opens or closes a scope only where a statement could begin; others belong to operands.
    """
    scope: Scope | None = None
    position = count = 0
    while position == 0 or scope is not None:
        token = _TOKEN.match(body, position)
        if token is None:
            raise UnknownInstruction(f"cannot read {body[position : position + 60]!r}")
        position = token.end()
        if token["brace"] == "{":
            scope = Scope(scope)
            continue
        assert scope is not None, "a body begins with a brace"
        if token["brace"] == "}":
            scope = scope.outer
        elif token["label"]:
            scope.labels[token["label"]] = count
        elif token["text"].strip().startswith("."):
            _directive(token["text"].strip(), scope)
        else:
            yield _statement(token["text"].strip(), scope)
            count += 1


def _directive(text: str, scope: Scope) -> None:
    if text.startswith(".pragma"):
        return
    found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
    if not found or found[1] not in KINDS:
        raise UnknownInstruction(f"directive {text!r}")
    for name in found[2].split(","):
        many = re.fullmatch(r"([%\w$]+)<(\d+)>", name.strip())
        names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
        scope.registers.update(dict.fromkeys(names, KINDS[found[1]]))


def _statement(text: str, scope: Scope) -> Statement:
    guard = _GUARD.fullmatch(text)
    text = guard["rest"] if guard else text
    opcode, *tail = re.split(r"\s+", text, maxsplit=1)
    rest = tail[0] if tail else ""
    return Statement(
        (guard["name"], bool(guard["not"])) if guard else None, opcode, _operands(rest), scope
    )


def _operands(text: str) -> tuple[str, ...]:
    """Split at commas outside braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return tuple(part.strip() for part in parts if part.strip())
