"""Cases that the Gluon kernel has to get right, one of every format and feature."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvquant_compile.codec.spec import CodecSpec
from tests.lowering.reference import half_rope, interleaved_rope
from tests.triton.cases import Case

PLAIN = CodecSpec(3, 3, 0, 0, False, 0)
DEFAULT = CodecSpec(3, 3, 1, 1, True, 1)
RECENT = replace(DEFAULT, value_slots=0, recent_tokens=16)  # as `optimize` makes it
BASE = Case(
    PLAIN, (128, 128), half_rope(128, 128), heads=1, rep=4, lengths=(300,), start=1000,
    dtype=torch.float16,
)  # fmt: skip

FAR = half_rope(128, 128, 5e5)
FAST = half_rope(128, 128, 10.0)
"""Frequencies of which no pair has a series, and more groups are explicit than share rotations."""

SLOW = replace(FAR, frequencies=tuple(f / 20 for f in half_rope(128, 128).frequencies))
"""Frequencies of which the first pairs turn by less than two radians in half a page."""

FORMATS = {
    "3 bit": BASE,
    "3 bit, far frequencies": replace(BASE, rope=FAR),
    "3 bit, no RoPE": replace(BASE, rope=None),
    "default": replace(BASE, spec=DEFAULT),
    "default, no RoPE": replace(BASE, rope=None, spec=DEFAULT, hidden=9),
    "token scale": replace(BASE, spec=CodecSpec(3, 3, 0, 0, True, 0)),
    "key slot": replace(BASE, spec=CodecSpec(3, 3, 1, 0, False, 0)),
    "value slot": replace(BASE, spec=CodecSpec(3, 3, 0, 1, False, 0)),
    "1 bit": replace(BASE, spec=CodecSpec(1, 1, 0, 0, False, 0)),
    "2 bit": replace(BASE, spec=CodecSpec(2, 2, 1, 1, True, 1)),
    "4 bit": replace(BASE, spec=CodecSpec(4, 4, 1, 1, True, 1)),
    "2/4 bit, two slots, 96/64": replace(
        BASE, spec=CodecSpec(2, 4, 2, 2, True, 2), dims=(96, 64), rope=half_rope(96, 48)
    ),
    "4/2 bit, four slots, 64/128": replace(
        BASE, spec=CodecSpec(4, 2, 4, 4, False, 2), dims=(64, 128), rope=half_rope(64, 64)
    ),
    "96 channels, key slots": replace(
        BASE, spec=CodecSpec(3, 3, 2, 1, False, 1), dims=(96, 96), rope=half_rope(96, 96)
    ),
    "256 channels": replace(BASE, dims=(256, 256), rope=half_rope(256, 256), spec=DEFAULT),
    "32 channels": replace(BASE, dims=(32, 32), rope=half_rope(32, 32)),
    "interleaved, scaled": replace(BASE, rope=interleaved_rope(128)),
}  # fmt: skip

FEATURES = {
    "a million tokens in": replace(BASE, start=999_000),
    "ragged": replace(BASE, lengths=(1, 300, 63), rep=1, heads=2, slabs=3),
    "empty": replace(BASE, lengths=(0, 1)),
    "window": replace(BASE, window=9),
    "window over pages": replace(BASE, window=70, lengths=(200, 64), rep=1),
    "soft-cap": replace(BASE, softcap=1.5),
    "hidden": replace(BASE, hidden=20),
    "scattered positions": replace(BASE, scattered=True, rep=1, lengths=(20, 3)),
    "scattered and hidden": replace(BASE, scattered=True, hidden=5, rep=2, lengths=(100,)),
    "one query": replace(BASE, rep=1, heads=2, spec=DEFAULT, start=999_000),
    "two queries": replace(BASE, rep=2, rope=FAR, spec=RECENT),
    "rep 8": replace(BASE, rep=8),
    "rep 16": replace(BASE, rep=16),
    "four steps": replace(BASE, steps=4, spec=DEFAULT),
    "four steps, padding": replace(BASE, steps=4, padding=2),
    "own tokens from pages": replace(BASE, exact=False),
    "window, steps, own tokens": replace(BASE, steps=3, exact=False, rep=2, window=40),
    # scores of 80: what they are off by moves weights, outputs by 2e-4 to 6e-3 from draw to draw;
    # in this draw rotated keys rounded to halves, and nothing else, make 2.1e-3
    "peaked": replace(BASE, sharpness=16.0, tolerance=8e-3),
    "peaked, far frequencies": replace(BASE, sharpness=16.0, rope=FAR),
    "one query, fast frequencies": replace(BASE, rep=1, rope=FAST),
    "three queries, fast, token scales": replace(BASE, rep=3, rope=FAST, spec=RECENT, hidden=3),
    "far frequencies, token scales": replace(BASE, spec=DEFAULT, rope=FAR),
    "three queries, slow frequencies": replace(
        BASE, spec=RECENT, rep=3, rope=SLOW, hidden=9
    ),
    "a step over a page's edge": replace(BASE, steps=2, rep=2, exact=False, lengths=(127,), seed=1),
    "recent": replace(BASE, spec=RECENT, lengths=(300, 7), steps=2, rep=2),
    "recent, cropped, window": replace(
        BASE, spec=RECENT, lengths=(150, 64), window=70, cropped=9, rep=2, softcap=1.5
    ),
    "large scores": replace(
        BASE, spec=CodecSpec(2, 1, 0, 0, False, 0), dims=(32, 32), rope=None, rep=8, heads=8,
        lengths=(2,) * 8, sharpness=64.0,
    ),
}  # fmt: skip
