"""What a saved cache is bound to: the model's weights and what its pages were coded with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kvquant_compile.calib.fingerprint import fingerprint
from kvquant_compile.codec.formats import Layout, Tables
from kvquant_compile.files import checksum


@dataclass(frozen=True)
class Identity:
    """Caches of programs with equal identities can be exchanged.

    Attributes:
        model: fingerprint of the model, as it is now.
        formats: page format of every cache layer, in order.
        tables: digest of the calibrated tables.
        dtype: of the model and of exact tokens.
    """

    model: str
    formats: tuple[str, ...]
    tables: str
    dtype: str

    @staticmethod
    def of(
        model: nn.Module,
        layouts: Sequence[Layout],
        tables: Mapping[int, Tables | None],
        dtype: torch.dtype,
    ) -> Identity:
        """The identity of a rewritten model; ``tables`` by cache index, None where lossless."""
        named = {
            f"{index}.{name}": tensor
            for index, constants in tables.items()
            if constants is not None
            for name, tensor in constants.tensors().items()
        }
        return Identity(
            fingerprint(model),
            tuple(str(layout) for layout in layouts),
            checksum("", named),
            str(dtype).removeprefix("torch."),
        )

    def differences(self, other: Identity) -> list[str]:
        """What of the two differs, in words."""
        parts = {
            "the model (config, parameter shapes, weight samples)": self.model != other.model,
            f"the dtype ({self.dtype}, {other.dtype})": self.dtype != other.dtype,
            "the page format": self.formats != other.formats,
            "the tables": self.tables != other.tables,
        }
        return [what for what, differs in parts.items() if differs]
