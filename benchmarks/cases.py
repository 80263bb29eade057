"""What the decode table measures: sizes, and formats of the cache."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.config import FormatOptions
from kvquant_compile.plan import AttendPlan, LayerPlan
from tests.lowering.reference import half_rope

K = 1024
DISTINCT_UP_TO = 131072
"""Caches of up to so many tokens are rotated, so that the L2 cache does not serve reads."""


@dataclass(frozen=True)
class Size:
    """One row of the table: attention of one new token of every sequence."""

    query_heads: int
    kv_heads: int
    tokens: int
    batch: int = 1
    dim: int = 128

    @property
    def name(self) -> str:
        """Such as ``32/8 x 128k``."""
        units = ((K * K, "M"), (K, "k"), (1, ""))
        unit, letter = next(u for u in units if self.tokens >= u[0])
        tokens = f"{self.tokens // unit}{letter}"
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        dim = f", {self.dim} channels" if self.dim != 128 else ""
        return f"{self.query_heads}/{self.kv_heads} x {tokens}{batch}{dim}"

    def dense_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values, unquantised."""
        return 2 * self.batch * self.kv_heads * self.tokens * self.dim * itemsize

    def sets(self, nbytes: int) -> int:
        """How many different caches of ``nbytes`` to rotate over: three, and as many as keep
        150 MB between two uses of one, up to 96."""
        if self.tokens * self.batch > DISTINCT_UP_TO:
            return 1
        return max(3, min(96, -(-150_000_000 // nbytes)))


@dataclass(frozen=True)
class Format:
    """One of our contenders."""

    name: str
    spec: CodecSpec
    rope: bool = True

    def plan(self, size: Size) -> LayerPlan:
        """A layer of this size; Llama 3's frequencies."""
        rope = half_rope(size.dim, size.dim, 5e5) if self.rope else None
        site = AttendPlan(size.query_heads, size.dim**-0.5)
        return LayerPlan(0, size.kv_heads, size.dim, size.dim, rope, (site,))


def plain(bits: int) -> CodecSpec:
    """Codes, scales and zero points only."""
    return CodecSpec(bits, bits, 0, 0, False, 0)


DEFAULT = Format("3 bit default", FormatOptions().spec(0))
"""What ``optimize`` stores when nothing is asked of it."""
FORMATS = (
    Format("3 bit", plain(3)),
    DEFAULT,
    Format("3 bit, one K and one V slot", CodecSpec(3, 3, 1, 1, False, 0)),
    Format("3 bit, last 16 exact", CodecSpec(3, 3, 0, 0, False, 0, 16)),
    Format("3 bit, token scales, last 16 exact", CodecSpec(3, 3, 0, 0, True, 0, 16)),
    Format("2 bit", plain(2)),
    Format("4 bit", plain(4)),
    Format("3 bit, no RoPE", plain(3), rope=False),
)

GROUPED = tuple(Size(32, 8, n * K) for n in (1, 4, 8, 16, 32, 64, 128, 512, 1024))
MULTI_HEAD = tuple(Size(32, 32, n * K) for n in (4, 32, 128))
WIDE_GROUP = tuple(Size(64, 8, n * K) for n in (128, 512))
WIDE_HEAD = (Size(16, 8, 256 * K, dim=256),)
BATCHES = (Size(32, 8, 16 * K, 32), Size(32, 8, 32 * K, 16), Size(32, 8, 4 * K, 8))

GROUPS = {
    "grouped": GROUPED,
    "multi-head": MULTI_HEAD,
    "wide-group": WIDE_GROUP,
    "wide-head": WIDE_HEAD,
    "batch": BATCHES,
}
"""Sizes by name, so that a run can take some of them."""

TINY = (Size(4, 2, 200, dim=32), Size(4, 2, 130, 2, dim=32))
"""For the interpreter, to see that the script works."""
