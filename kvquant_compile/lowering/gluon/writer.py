"""A writer of Gluon modules whose statements are mostly blocks of PTX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvquant_compile.lowering.triton.emit import Source

_TYPES = {"r": "gl.int32", "f": "gl.float32", "l": "gl.int64"}


@dataclass(frozen=True)
class Block:
    """A block of PTX: ``$0..`` are its outputs, then its inputs.

    Attributes:
        text: the instructions.
        outputs, inputs: one constraint letter each: r (int32), f (float32), l (int64).
        pure: whether calls may be moved, merged or dropped.
    """

    text: str
    outputs: str
    inputs: str
    pure: bool

    @property
    def constraints(self) -> str:
        """As LLVM wants them."""
        return ",".join([f"=&{x}" for x in self.outputs] + list(self.inputs))


class KernelWriter(Source):
    """Lines of a kernel's body, and the blocks that they use."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[str, Block] = {}

    def ptx(
        self,
        text: str,
        outputs: Sequence[str],
        inputs: Sequence[str],
        *,
        kinds: str = "",
        into: str = "",
        pure: bool = False,
        scoped: bool = True,
        name: str,
    ) -> None:
        """Append ``outputs = block(inputs)``; equal texts under one name become one constant.

        Args:
            text: the instructions.
            outputs: variables assigned; "_" for a block that gives nothing.
            inputs: expressions of one element per thread, or scalars.
            kinds: constraint letters of the inputs, all "r" by default.
            into: letters of the outputs, all "r" by default.
            pure: as in :class:`Block`.
            scoped: whether registers and labels of the text are its own.
            name: of the block; a number is appended where texts differ.
        """
        into = into or "r" * len(outputs)
        kinds = kinds or "r" * len(inputs)
        assert len(kinds) == len(inputs), name
        assert len(into) == len(outputs), name
        if list(outputs) == ["_"]:
            text += " mov.u32 $0, 0;"
        block = Block("{ " + text + " }" if scoped else text, into, kinds, pure)
        constant = self._constant(name, block)
        types = [_TYPES[x] for x in into]
        dtype = types[0] if len(types) == 1 else f"({', '.join(types)})"
        self(
            f"{', '.join(outputs)} = gl.inline_asm_elementwise({constant}, "
            f'"{block.constraints}", [{", ".join(inputs)}], dtype={dtype}, '
            f"is_pure={pure}, pack=1)"
        )

    def _constant(self, name: str, block: Block) -> str:
        number = 0
        while True:
            constant = f"{name}_{number}" if number else name
            if self._blocks.setdefault(constant, block) == block:
                return constant
            number += 1

    def constants(self) -> str:
        """Definitions of the blocks."""
        return "".join(
            f'{name} = gl.constexpr("""{block.text}""")\n' for name, block in self._blocks.items()
        )


def registers(first: int, count: int) -> list[str]:
    """Operand names ``$first ..``."""
    return [f"${first + i}" for i in range(count)]


def listed(names: Sequence[str]) -> str:
    """A vector operand."""
    return "{" + ", ".join(names) + "}"


def approximate(out: KernelWriter, op: str, target: str, value: str) -> None:
    """``target``: the hardware's approximation of exp2, log2 or 1 / x, flushing denormals."""
    text = f"{op}.approx.ftz.f32 $0, $1;"
    out.ptx(text, [target], [value], kinds="f", into="f", pure=True, name=op.upper())
