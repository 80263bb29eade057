"""Generated source that puts one token's codes into the words that hold them.

Every word of a page mixes codes of several tokens. The words are read long before their new bits
are known, so that the load is over by then.
"""

from __future__ import annotations

from kvquant_compile.lowering.triton.emit import CodeWords, Source


def load_words(out: Source, words: CodeWords, base: str) -> None:
    """``at{i}`` and ``old{i}``, a word of every group of selectors that holds the token's codes.

    Args:
        out: the source; knows ``first``, the token's place in its page, and ``used``.
        words: of keys or values.
        base: pointer to them, int32.
    """
    keys = words.prefix == "key"
    rows = 4 if keys else 8
    groups = words.sections * words.per_lane // words.bits
    width = 1 << (groups - 1).bit_length()
    out(f"every = tl.arange(0, {rows * width})", f"row, every = every % {rows}, every // {rows}")
    each = groups // words.sections
    out(f"section, group = every // {each}, every % {each}")
    # Of keys the token fixes g and the lanes run over t, of values the other way round.
    lane = "first % 32 // 4 * 4 + row" if keys else "4 * row + first % 32 // 8"
    inside = f"used & (every < {groups})"
    if words.sections == 2:
        inside += " & (section == first // 32)"
    out(f"inside = {inside}", f"to = {base} + section * {32 * words.per_lane}")
    out(f"to += ({lane}) * {words.width}")
    for i in range(words.bits):
        out(f"nth = group * {words.bits} + {i}")
        out(f"at{i} = to + nth // {words.width} * {32 * words.width} + nth % {words.width}")
        out(f"old{i} = tl.load(at{i}, mask=inside, other=0)")


def store_words(out: Source, words: CodeWords, shared: bool) -> None:
    """Put the codes of ``codes`` (see ``code_bytes``) into the words that were read.

    In ``shared`` words nobody else changes the token's bits, so what differs can be flipped.
    """
    keys, apart = words.prefix == "key", words.sections == 2
    options = f"{keys}, {words.selectors}, {apart}"
    for q in range(4):
        names = f"low{q}, high{q}, bits{q}"
        out(f"{names} = token_codes(codes, first, row, section, 4 * group + {q}, {options})")
    for half, start, size in (("low", 0, min(words.bits, 4)), ("high", 4, words.bits - 4)):
        selectors = ", ".join(f"{half}{q}" for q in range(4))
        masks = ", ".join(f"bits{q} * {2 ** max(size, 0) - 1}" for q in range(4))
        for i in range(size):
            fresh, mask = (f"packed({x}, {size}, {i})" for x in (selectors, masks))
            at, old = f"at{start + i}", f"old{start + i}"
            out(f"mask = {mask}", f"flips = ({old} & mask) ^ {fresh}")
            out("ours = inside & (mask != 0)")
            if shared:
                out(f"tl.atomic_xor({at}, flips, mask=ours & (flips != 0), sem='relaxed')")
            else:
                out(f"tl.store({at}, {old} ^ flips, mask=ours)")
