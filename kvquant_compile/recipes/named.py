"""Published recipes as compositions of blocks; each names its paper and what differs here.

Every function takes the keys' and the values' width, and returns a :class:`Recipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvquant_compile.codec.algebra import (
    Affine,
    ChannelScale,
    Fp8,
    Hadamard,
    Interleave,
    LowRank,
    Normalise,
    Outliers,
    Recipe,
    Reorder,
    Tail,
    Vq,
    repeated,
)
from kvquant_compile.errors import OptionError

CODEBOOK_BITS = 11
CODEBOOK_DIM = 32


def int_per_token(bits: int = 4, value_bits: int | None = None, *, group: int = 0) -> Recipe:
    """Asymmetric round-to-nearest per (token, head), or per ``group`` of channels, after RoPE."""
    widths = _widths(bits, value_bits)
    keys, values = (Affine(b, group=group) for b in widths)
    return Recipe(_name("int", widths), keys, values, pre_rope=False)


def fp8(bits: int = 8, value_bits: int | None = None, *, kind: str = "e4m3") -> Recipe:
    """8-bit floats after RoPE, one calibrated scale a layer for keys and one for values; what
    vLLM stores with ``kv_cache_dtype="fp8"`` and calibrated scales."""
    if _widths(bits, value_bits) != (8, 8):
        raise OptionError(
            f"recipe 'fp8' at {bits} bits",
            why="its elements are 8-bit floats",
            do="Leave bits out.",
        )
    return Recipe(f"fp8 {kind}", Fp8(kind), Fp8(kind), pre_rope=False)


def kivi(
    bits: int = 2, value_bits: int | None = None, *, group: int = 32, window: int = 128
) -> Recipe:
    """KIVI (arXiv 2402.02750): keys per channel in groups of tokens, packed ``window`` at a time;
    values per token in groups of channels, the last ``window`` exact; after RoPE."""
    keys, values = _widths(bits, value_bits)
    return Recipe(
        _name("kivi", (keys, values)),
        Affine(keys, axis="channel", group=group),
        Affine(values, group=group),
        pre_rope=False,
        key_tail=Tail(flush=window),
        value_tail=Tail(recent=window),
    )


def rotatekv(bits: int = 2, value_bits: int | None = None, *, sinks: int = 1) -> Recipe:
    """RotateKV (arXiv 2501.16383): keys before RoPE, rotated by a Hadamard matrix over four heads
    and sorted by magnitude; values rotated within the head; ranges per (token, head), clipped to
    0.8 at 2 bits. Exact tokens are the first ones here, not those with massive activations."""
    widths = _widths(bits, value_bits)
    coded = [Affine(b, clip=0.8 if b <= 2 else 1.0) for b in widths]
    keys, values = Hadamard(heads=4) >> Reorder() >> coded[0], Hadamard() >> coded[1]
    return Recipe(_name("rotatekv", widths), keys, values, sinks=sinks)


def qserve(bits: int = 4, value_bits: int | None = None) -> Recipe:
    """QServe's KV4 (arXiv 2405.04532): keys after RoPE divided by the square root of their
    channel's largest magnitude (SmoothAttention, tied over RoPE pairs), then ranges per
    (token, head). The scales stay here instead of being folded into the projections."""
    widths = _widths(bits, value_bits)
    keys = ChannelScale(0.5, tied=True) >> Affine(widths[0])
    return Recipe(_name("qserve", widths), keys, Affine(widths[1]), pre_rope=False)


def gear(
    bits: int = 2, value_bits: int | None = None, *, group: int = 64, rank: int = 2,
    outliers: int = 2,
) -> Recipe:  # fmt: skip
    """GEAR (arXiv 2403.05527) on KIVI's axes: outliers exact, the rest in ``bits``, and a low-rank
    approximation of the error of every ``group`` tokens. The paper also takes rank 4 over the
    whole prompt; here a prompt is so many groups."""
    widths = _widths(bits, value_bits)
    error = LowRank(rank, group)
    keys = Outliers(outliers, "channel", group) >> Affine(widths[0], "channel", group)
    values = Outliers(outliers) >> Affine(widths[1], group=group)
    return Recipe(_name("gear", widths), keys + error, values + error, pre_rope=False)


def rvq(
    bits: int = 3,
    value_bits: int | None = None,
    *,
    entries: int = 1 << CODEBOOK_BITS,
    steps: int = 50,
) -> Recipe:
    """Residual vector quantisation (arXiv 2410.15704) before RoPE: tokens over their deviation,
    groups of 32 channels (every fourth one for keys) by the sum of entries of several codebooks,
    2048 vectors each, fitted in ``steps`` moving averages. As many codebooks as fit into ``bits``;
    3 bits take the paper's eight."""
    widths = _widths(bits, value_bits)
    index = (entries - 1).bit_length()
    depths = [max(1, b * CODEBOOK_DIM // index) for b in widths]
    coded = [repeated(Vq(entries, CODEBOOK_DIM, steps), depth) for depth in depths]
    keys, values = Interleave(4) >> Normalise() >> coded[0], Normalise() >> coded[1]
    return Recipe(_name("rvq", widths), keys, values)


NAMED: Mapping[str, Callable[..., Recipe]] = MappingProxyType(
    {
        "int": int_per_token,
        "fp8": fp8,
        "kivi": kivi,
        "rotatekv": rotatekv,
        "qserve": qserve,
        "gear": gear,
        "rvq": rvq,
    }
)
"""What ``recipe="..."`` may name, besides ``kvquant+`` and ``kvquant``."""


def _widths(bits: int, value_bits: int | None) -> tuple[int, int]:
    return bits, bits if value_bits is None else value_bits


def _name(name: str, widths: tuple[int, int]) -> str:
    return f"{name} k{widths[0]}v{widths[1]}"
