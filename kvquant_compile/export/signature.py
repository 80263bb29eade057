"""What goes in and comes out of an exported function: names, dtypes, and shapes with free sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Size = int | str


@dataclass(frozen=True)
class Argument:
    """One tensor.

    Attributes:
        name: of the input or output.
        dtype: of the elements.
        shape: sizes; a free one is named, and the same wherever it has the same name.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]

    def example(self, sizes: dict[str, int]) -> Tensor:
        """A tensor of ones to trace with."""
        shape = [sizes[size] if isinstance(size, str) else size for size in self.shape]
        return torch.ones(shape, dtype=self.dtype)

    def dynamic(self, sizes: dict[str, torch.export.Dim]) -> dict[int, torch.export.Dim]:
        """Free sizes by axis, as ``torch.export`` takes them."""
        return {i: sizes[size] for i, size in enumerate(self.shape) if isinstance(size, str)}


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a function; every free size of an output is one of an input."""

    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]

    @property
    def free_sizes(self) -> tuple[str, ...]:
        """Names of the free sizes, in order of appearance."""
        shapes = (argument.shape for argument in self.inputs)
        return tuple(dict.fromkeys(s for shape in shapes for s in shape if isinstance(s, str)))

    def output_shapes(self, given: Sequence[Tensor]) -> list[list[int | torch.SymInt]]:
        """Shapes of the outputs for these inputs."""
        found: dict[str, int | torch.SymInt] = {}
        for argument, tensor in zip(self.inputs, given, strict=True):
            for size, actual in zip(argument.shape, tensor.shape, strict=True):
                if isinstance(size, str):
                    found.setdefault(size, actual)
        return [[found[s] if isinstance(s, str) else s for s in o.shape] for o in self.outputs]


def tensors_like(named: dict[str, Tensor]) -> tuple[Argument, ...]:
    """Arguments of fixed shape, one for every tensor."""
    return tuple(Argument(name, x.dtype, tuple(x.shape)) for name, x in named.items())
