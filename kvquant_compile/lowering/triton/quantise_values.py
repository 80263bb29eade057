"""Generated source that quantises a program's values, as :mod:`kvquant_compile.codec.values`."""

from __future__ import annotations

from kvquant_compile.codec.spec import table_limit
from kvquant_compile.lowering.triton.emit import Source
from kvquant_compile.lowering.triton.quantise_emit import Half

ARGUMENTS = "at, sink_at, live, exact, head, channels, levels, feedback"


def quantise_values(out: Source, half: Half, sinks: bool) -> None:
    """Write ``quantise_values``, which leaves codes in ``codes`` and the rest in the page."""
    half.define_nearest(out)
    out("@triton.jit")
    with out.block(f"def quantise_values({ARGUMENTS}, {half.arguments}):"):
        out(half.column(), f"channels += head * {3 * half.width}")
        known = "" if half.dim == half.width else f" & (c < {half.dim})"
        out(f"v = tl.load(at + c, mask=live{known}, other=0.0).to(tl.float32)")
        half.load_levels(out)
        half.load_early(out, 3)
        if sinks:
            out(f"tl.store(sink_at + c, v.to(sink_at.dtype.element_ty), mask=exact{known})")
        out(f"u = quotient(v - {half.constant(2)}, {half.constant(0)}, {half.constant(1)}, FUSED)")
        half.load_address(out)
        _range(out, half)
        out("low = clamped(low, -FLOAT16_MAX, FLOAT16_MAX)")
        out("high = clamped(high, -FLOAT16_MAX, FLOAT16_MAX)")
        out(f"scale = to_half((high - low) * {1 / (2 * table_limit(half.bits))!r})")
        out("zero = to_half((high + low) * 0.5)")
        out("place = page_byte.to(tl.pointer_type(tl.float16)) + SCALE // 2 + 2 * token")
        out("tl.store(place, scale, mask=live)", "tl.store(place + 1, zero, mask=live)")
        out("a, z = scale.to(tl.float32), zero.to(tl.float32)")
        out("step = tl.where(a == 0.0, 1.0, a)")
        out("x = quotient(u - z, step, tl.div_rn(1.0, step), FUSED)")
        half.load_words(out)
        index = half.largest(out, f"tl.abs(x - {half.level('x')})", "i")
        half.sort(out, index)
        half.encode(out, index, "u - (level * a + z)")
    out("", "")


def _range(out: Source, half: Half) -> None:
    """``low`` and ``high`` [T, 1] of the narrowest range that leaves the slots' number out."""
    for name, best, end in (("hi", "max", "-2147483648"), ("lo", "min", "2147483647")):
        known = half.dim == half.width
        out("keys = order_key(u)" if known
            else f"keys = tl.where(c < {half.dim}, order_key(u), {end})")  # fmt: skip
        for i in range(half.slots + 1):
            out(f"extreme = tl.{best}(keys, 1)[:, None]")
            out(f"{name}{i} = from_order_key(extreme)")
            if i < half.slots:
                out(f"keys = tl.where(c == first_of(keys, extreme, c), {end}, keys)")
    _narrowest(out, half.slots)


def _narrowest(out: Source, slots: int) -> None:
    """The split of the removed elements between the ends; a NaN range is taken first."""
    out(f"low, high = lo0, hi{slots}")
    if slots == 0:
        out("low = tl.where(high != high, high, low)")
        return
    out("width = high - low")
    for i in range(1, slots + 1):
        out(f"other = hi{slots - i} - lo{i}")
        out("take = (width == width) & ((other < width) | (other != other))")
        out("width = tl.where(take, other, width)", f"low = tl.where(take, lo{i}, low)")
        out(f"high = tl.where(take, hi{slots - i}, high)")
