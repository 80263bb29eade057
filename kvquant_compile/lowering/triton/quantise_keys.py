"""Generated source that quantises a program's keys, as :mod:`kvquant_compile.codec.keys` does."""

from __future__ import annotations

from kvquant_compile.lowering.triton.emit import Source
from kvquant_compile.lowering.triton.quantise_emit import Half

ARGUMENTS = "at, sink_at, live, exact, head, order, channels, rows, levels, feedback"


def quantise_keys(out: Source, half: Half, token_scale: bool, reorder: bool, sinks: bool) -> None:
    """Write ``quantise_keys``, which leaves codes in ``codes`` and the rest in the page.

    Args:
        out: the source.
        half: what is quantised.
        token_scale: whether keys carry a scale.
        reorder: whether channels have to be brought into pair order.
        sinks: whether there are exact leading tokens.
    """
    half.define_nearest(out)
    out("@triton.jit")
    with out.block(f"def quantise_keys({ARGUMENTS}, {half.arguments}):"):
        out(half.column(), f"channels += head * {5 * half.width}")
        _load(out, half, reorder)
        half.load_levels(out)
        half.load_early(out, 5)
        if sinks:
            kept = "exact" if half.dim == half.width else f"exact & (c < {half.dim})"
            out(f"tl.store(sink_at + c, k.to(sink_at.dtype.element_ty), mask={kept})")
        out(f"scale = {half.constant(0)}", f"zero = {half.constant(2)}")
        out(f"x = quotient(k, scale, {half.constant(1)}, FUSED) - zero")
        half.load_address(out)
        if token_scale:
            _token_scale(out, half)
            out("place = page_byte.to(tl.pointer_type(tl.float16)) + SCALE // 2 + token")
            out("tl.store(place, token_scale, mask=live)")
            out("a = token_scale.to(tl.float32)", "x = quotient(x, a, tl.div_rn(1.0, a), FUSED)")
        half.load_words(out)
        level = "level * a" if token_scale else "level"
        residual = f"k - ({level} + zero) * scale"
        if half.slots:
            out(f"level = {half.level('x')}", f"residual = {residual}")
        index = half.largest(out, f"residual * residual * {half.constant(3)}", "i")
        half.sort(out, index)
        half.encode(out, index, residual)
    out("", "")


def _load(out: Source, half: Half, reorder: bool) -> None:
    """Keys ``k`` [T, W] in pair order, zeros for padding."""
    channel, mask = "c", "live"
    if reorder:
        out(f"source = tl.load(order + c, mask=c < {half.dim}, other={half.source_dim})")
        channel, mask = "source", f"live & (source < {half.source_dim})"
    elif half.dim < half.width:
        mask = f"live & (c < {half.dim})"
    out(f"k = tl.load(at + {channel}, mask={mask}, other=0.0).to(tl.float32)")


def _token_scale(out: Source, half: Half) -> None:
    """``token_scale`` [T, 1]: root mean square, then least squares, outliers left out."""
    out(f"share = {half.constant(4)}", "kept = finite(x)", "energy = kept * kept * share")
    for name in half.largest(out, "energy", "o"):
        out(f"energy = tl.where(c == {name}, 0.0, energy)")
    out("norm = tl.load(rows + 2 * head)", "stretch = tl.load(rows + 2 * head + 1)")
    out("start = tl.div_rn(tl.sqrt_rn(row_sum(energy)), norm)")
    out("start = clamped(start, 1e-4, FLOAT16_MAX)")
    out(f"level = {half.level('quotient(kept, start, tl.div_rn(1.0, start), FUSED)')}")
    out("error = kept - level * start")
    for name in half.largest(out, "error * error * share", "o"):
        out(f"share = tl.where(c == {name}, 0.0, share)")
    out("share = level * share")
    out("fit = tl.div_rn(row_sum(share * kept), row_sum(share * level))")
    out("fit = tl.where(fit != fit, 1.0, fit) * stretch")
    out("token_scale = to_half(clamped(fit, 1e-4, FLOAT16_MAX))")
