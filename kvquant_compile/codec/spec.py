"""What a quantised cache layer stores: the static format and the calibrated constants.

The dequantised value has one definition, shared by the CPU path and every kernel::

    key[h, n, c]   = key_scale[h, c] * (a[h, n] * key_table[h, code] + key_zero[h, c]) + r
    value[h, n, c] = value_gain[h, c] * (s[h, n] * value_table[h, code] + z[h, n] + r)
                     + value_offset[h, c]

``key`` is the key before RoPE. ``r`` is the float16 residual of the (token, head)'s outlier
slots and zero elsewhere; ``a`` is a float16 token scale (1 when the format has none); ``s`` and
``z`` are float16, per (token, head). Tables hold small integers, so that kernels can look codes
up with byte permutes, and ``key_zero`` is an integer, so that a block's constant is exact.

The remaining constants (weight, norm, gain, feedback) steer the encoder only; a reader of the
cache never sees them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

LOSSLESS = 16
PAGE_TOKENS = 64


def table_limit(bits: int) -> int:
    """Largest magnitude of a table entry: 7-bit entries at 4 bits, 8-bit entries elsewhere."""
    return 63 if bits == 4 else 127


@dataclass(frozen=True)
class CodecSpec:
    """The static format of one layer's cache.

    Attributes:
        key_bits, value_bits: 1..8 bits a code, or 16 for raw storage in the model's dtype.
        key_slots, value_slots: elements of every (token, head) kept exactly, each stored as
            a channel index and a float16 residual.
        key_token_scale: whether keys carry a float16 scale per (token, head).
        sink_tokens: leading tokens of every sequence stored exactly, outside the pages.
        recent_tokens: last tokens of every sequence kept exactly besides, until they are older.
    """

    key_bits: int
    value_bits: int
    key_slots: int = 1
    value_slots: int = 1
    key_token_scale: bool = False
    sink_tokens: int = 1
    recent_tokens: int = 0

    @property
    def lossless(self) -> bool:
        """Whether pages hold raw keys and values."""
        return self.key_bits == LOSSLESS


@dataclass(frozen=True, eq=False)
class LayerTables:
    """The calibrated constants of one layer (H = kv heads, all on one device).

    Attributes:
        key_table: int8 [H, 2**key_bits], ascending.
        key_scale: float32 [H, key_dim], float16-representable, > 0.
        key_zero: float32 [H, key_dim], integers of magnitude <= 1024.
        key_weight: float32 [H, key_dim], sensitivity by which outlier slots are chosen.
        value_table: int8 [H, 2**value_bits], ascending.
        value_gain, value_offset: float32 [H, value_dim], static channel transform.
        key_norm: float32 [H] or [], weighted root mean square of a token (its outliers left
            out) in table units that a token scale of 1 stands for.
        key_stretch: float32 [H] or [], factor on the least-squares token scale that undoes its
            shrinkage.
        key_feedback, value_feedback: int8 [H, D, D] in units of 1 / 64, strictly upper block
            triangular: how the coding error of a channel, in table units, moves the later ones
            (rows: from). Empty: every channel is coded on its own. Keys are coded as pages store
            them, so ``key_feedback`` is in pair order with its padding (zeros), unlike the
            constants per channel, which follow the model.
    """

    key_table: Tensor
    key_scale: Tensor
    key_zero: Tensor
    key_weight: Tensor
    value_table: Tensor
    value_gain: Tensor
    value_offset: Tensor
    key_norm: Tensor = field(default_factory=lambda: torch.ones(()))
    key_stretch: Tensor = field(default_factory=lambda: torch.ones(()))
    key_feedback: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int8))
    value_feedback: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int8))

    def __repr__(self) -> str:
        heads, keys = self.key_table.shape
        total = sum(t.nbytes for t in self.tensors().values())
        return (
            f"LayerTables({heads} heads x {self.key_scale.shape[1]}/{self.value_gain.shape[1]}, "
            f"{keys}/{self.value_table.shape[1]} levels, {total:,} bytes)"
        )

    def to(self, device: torch.device | str) -> LayerTables:
        """The same constants on another device."""
        return LayerTables(**{name: t.to(device) for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, in declaration order."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
