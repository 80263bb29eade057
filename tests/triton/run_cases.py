"""Runs named cases through the kernels and exits with 1 where one is off; see ``python -m``.

Arguments: the part to run (``formats``, ``features``, ``append``, ``prefill``, or ``flash``:
prefill where torch's flash kernels apply), and the device (default ``cpu``, in Triton's
interpreter).
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvquant_compile.codec.spec import PAGE_TOKENS, CodecSpec
from kvquant_compile.lowering.triton import attend as kernels
from kvquant_compile.lowering.triton import prefill
from kvquant_compile.lowering.triton.dispatch import SWITCH
from tests.lowering.reference import half_rope, interleaved_rope
from tests.triton.append_cases import APPENDS, check_append
from tests.triton.cases import TOLERANCE, Case, relative_error

BASE = Case(CodecSpec(3, 3, 0, 0, False, 0), (32, 32), half_rope(32, 32))
FORMATS = {
    "none": replace(BASE, rope=None),
    "k1v1": replace(BASE, spec=CodecSpec(1, 1, 0, 0, False, 0)),
    "k2v4 one of each": replace(BASE, spec=CodecSpec(2, 4, 1, 1, True, 1)),
    "k4v2 four slots": replace(BASE, spec=CodecSpec(4, 2, 4, 4, False, 2), rep=1),
    "k8v3": replace(BASE, spec=CodecSpec(8, 3, 0, 2, True, 0)),
    "k5v8": replace(BASE, spec=CodecSpec(5, 8, 1, 0, False, 0)),
    "d80": replace(
        BASE, dims=(80, 80), rope=half_rope(80, 80), spec=CodecSpec(3, 3, 1, 1, True, 1)
    ),
    "d96x32 partial": replace(BASE, dims=(96, 32), rope=half_rope(96, 24)),
    "d40 padded": replace(BASE, dims=(40, 24), rope=half_rope(40, 40)),
    "d128 series": replace(
        BASE, dims=(128, 128), rope=half_rope(128, 128, 5e5), heads=1, rep=4, lengths=(66,)
    ),
    "d128 token scales": replace(
        BASE, dims=(128, 128), rope=half_rope(128, 128), heads=1, rep=5, lengths=(66,),
        spec=CodecSpec(3, 4, 0, 1, True, 1),
    ),
    "none, token scales": replace(BASE, rope=None, spec=CodecSpec(4, 2, 0, 0, True, 0)),
    "d80 series, token scales": replace(
        BASE, dims=(80, 80), rope=half_rope(80, 80), spec=CodecSpec(2, 3, 0, 0, True, 1)
    ),
    "d48 fast, token scales": replace(
        BASE, dims=(48, 48), rope=half_rope(48, 48, 2.0), spec=CodecSpec(3, 3, 0, 0, True, 0)
    ),
    "d48 fast": replace(BASE, dims=(48, 48), rope=half_rope(48, 48, 2.0)),
    "interleaved scaled": replace(BASE, rope=interleaved_rope(32)),
    "d128 default": replace(
        BASE, dims=(128, 128), rope=half_rope(128, 128), heads=1, rep=4, lengths=(66,),
        spec=CodecSpec(3, 3, 1, 1, True, 1),
    ),
}  # fmt: skip
FEATURES = {
    "not exact": replace(BASE, exact=False),
    "ragged": replace(BASE, lengths=(1, 300, 63), heads=1, rep=1, slabs=3),
    "empty": replace(BASE, lengths=(0, 1)),
    "far positions": replace(BASE, start=999_000),
    "window": replace(BASE, window=9),
    "window over pages": replace(BASE, window=70, lengths=(200, 64), rep=1),
    "softcap": replace(BASE, softcap=1.5),
    "sink logits": replace(BASE, sink_logits=True),
    "hidden": replace(BASE, hidden=20),
    "scattered positions": replace(BASE, scattered=True, rep=1, lengths=(20, 3)),
    "rep 16": replace(BASE, rep=16, heads=1),
    "four steps": replace(BASE, steps=4, spec=CodecSpec(3, 3, 0, 0, False, 1)),
    "padding": replace(BASE, steps=4, padding=2),
    "sharp": replace(BASE, sharpness=16.0),
    "half": replace(BASE, dtype=torch.float16),
}
RECENT = replace(BASE, spec=CodecSpec(3, 2, 1, 1, True, 1, 16), lengths=(150, 7), heads=1, rep=2)
FEATURES |= {
    "recent": RECENT,
    "recent, window": replace(RECENT, window=9, steps=4),
    "recent, wide window": replace(RECENT, window=70, steps=2, hidden=5),
    "recent, ragged": replace(RECENT, lengths=(0, 64, 16), steps=4, padding=2, softcap=1.5),
    "recent, cropped": replace(RECENT, cropped=9, dtype=torch.float16, sink_logits=True),
    "recent, all cropped": replace(RECENT, cropped=16, steps=3),
    "recent, many sinks, no rope": replace(
        RECENT, spec=CodecSpec(2, 4, 0, 0, False, 20, 48), rope=None, lengths=(30, 130), rep=1
    ),
}
CHUNK = replace(BASE, steps=20, rep=1, heads=1, lengths=(150, 150))
ONE_OF_EACH = CodecSpec(3, 3, 1, 1, True, 1)
PREFILL = {
    "a chunk": CHUNK,
    "not exact": replace(CHUNK, exact=False),
    "not exact, ragged": replace(CHUNK, exact=False, lengths=(0, 70), padding=3, rep=2),
    "first prompt": replace(CHUNK, lengths=(0,), steps=70, heads=2),
    "first prompt, window": replace(CHUNK, lengths=(0,), steps=140, window=9),
    "first prompt, padding": replace(CHUNK, lengths=(0, 0), padding=18, sink_logits=True),
    "window": replace(CHUNK, window=9, lengths=(200, 64)),
    "window over pages": replace(CHUNK, window=70, lengths=(200, 190), exact=False),
    "window that reaches all": replace(CHUNK, window=500),
    "softcap": replace(CHUNK, softcap=1.5, sharpness=4.0),
    "padding": replace(CHUNK, padding=5, lengths=(90, 30)),
    "hidden": replace(CHUNK, hidden=20),
    "ragged": replace(CHUNK, lengths=(1, 300, 63), slabs=3),
    "empty": replace(CHUNK, lengths=(0, 1)),
    "scattered, far": replace(CHUNK, scattered=True, start=999_000, lengths=(20, 3)),
    "rep 4, sink logits": replace(CHUNK, rep=4, sink_logits=True, spec=ONE_OF_EACH),
    "200 steps": replace(CHUNK, steps=200, lengths=(64,), window=100),
    "one of each, many sinks": replace(
        CHUNK, spec=CodecSpec(2, 4, 2, 1, True, 5), lengths=(3, 70), exact=False
    ),
    "interleaved": replace(CHUNK, rope=interleaved_rope(32), spec=CodecSpec(4, 2, 1, 0, True, 2)),
    "no rope, k1v1": replace(CHUNK, rope=None, spec=CodecSpec(1, 1, 0, 0, False, 0)),
    "k5v8": replace(CHUNK, spec=CodecSpec(5, 8, 1, 0, False, 1)),
    "k8v6": replace(CHUNK, spec=CodecSpec(8, 6, 0, 1, False, 0)),
    "d80": replace(CHUNK, dims=(80, 80), rope=half_rope(80, 80), spec=ONE_OF_EACH),
    "d96x32 partial": replace(CHUNK, dims=(96, 32), rope=half_rope(96, 24)),
    "d40 padded": replace(CHUNK, dims=(40, 24), rope=half_rope(40, 40)),
    "half, d128": replace(
        CHUNK, dims=(128, 128), rope=half_rope(128, 128), spec=ONE_OF_EACH, dtype=torch.float16
    ),
    "half, ragged, softcap": replace(
        CHUNK, dtype=torch.float16, rep=4, lengths=(150, 64), softcap=5.0
    ),
    "half, first prompt": replace(CHUNK, dtype=torch.float16, lengths=(0, 0), rep=4),
    "recent": replace(CHUNK, spec=RECENT.spec, lengths=(150, 90), padding=6),
    "recent, window": replace(CHUNK, spec=CodecSpec(3, 3, 1, 1, True, 1, 32), window=25, steps=18),
    "recent, not exact": replace(CHUNK, spec=RECENT.spec, exact=False, lengths=(0,), steps=150),
    "recent, not exact, ragged": replace(
        CHUNK, spec=RECENT.spec, exact=False, lengths=(0, 70, 130), padding=3, softcap=2.0
    ),
    "recent, not exact, window": replace(
        CHUNK, spec=RECENT.spec, exact=False, lengths=(50, 3), steps=100, window=40
    ),
    "recent, not exact, narrow window": replace(
        CHUNK, spec=RECENT.spec, exact=False, lengths=(50, 3), window=9, dtype=torch.float16
    ),
    "bfloat16": replace(CHUNK, dtype=torch.bfloat16, rep=2),
    "bfloat16, not exact": replace(CHUNK, dtype=torch.bfloat16, exact=False),
}
HALF = replace(CHUNK, dtype=torch.float16, rep=2, dims=(64, 64), rope=half_rope(64, 64))
FLASH = {
    "a chunk": HALF,
    "whole blocks": replace(HALF, steps=64, lengths=(128, 128)),
    "first prompt": replace(HALF, steps=128, lengths=(0,)),
    "window that reaches all": replace(HALF, window=500),
    "rep 4, sink logits": replace(HALF, rep=4, sink_logits=True, spec=ONE_OF_EACH),
}


def plain_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, new_shape: bool = False
) -> tuple[Tensor, Tensor]:
    """What torch's flash kernels compute on a device, in plain torch."""
    rep = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(rep, 1).float() for x in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ value).to(query.dtype), scores.logsumexp(-1)


def check_flash(device: torch.device) -> int:
    """Prefill where torch's flash kernels apply: with each of them on a GPU, and with a stand-in
    elsewhere. The number of cases that are off."""
    calls: list[bool] = []
    found = prefill.device_flash if device.type == "cuda" else plain_flash

    def counted(*args: Any, **options: Any) -> tuple[Tensor, Tensor] | None:
        out = found(*args, **options)
        calls.append(out is not None)
        return out

    prefill.device_flash = counted
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    wrong = 0
    for _ in range(2 if device.type == "cuda" else 1):
        with sdpa_kernel(backends, set_priority=True):
            print(f"{backends[0]} first", flush=True)
            wrong += sum(not check(n, replace(c, device=device)) for n, c in FLASH.items())
        backends.reverse()
    assert calls, "no flash kernel was asked for"
    return wrong + calls.count(False)


def check(name: str, case: Case) -> bool:
    """Run one case and print its errors."""
    built = case.build()
    began = time.perf_counter()
    poison = torch.full((1 << 20,), torch.nan, device=case.device)
    del poison
    output, lse = kernels.attend(*built.arguments())
    seconds = time.perf_counter() - began
    expected, expected_lse = built.expected()
    real = (built.slots >= 0)[:, :, None, None].expand_as(expected)
    error = relative_error(output[real], expected[real])
    there = torch.isfinite(expected_lse) & (built.slots >= 0)[:, None]
    gap = (lse.double() - expected_lse)[there].abs().max() if there.any() else torch.zeros(())
    padding = output[~real]
    clean = bool((padding == 0).all())
    wider = 4 if case.dtype == torch.bfloat16 else 1
    furthest = 2.5 * TOLERANCE * wider * max(1.0, case.sharpness)
    good = error <= case.tolerance * wider and float(gap) < furthest and clean
    mark = "" if good else "  <-- wrong"
    print(f"{name:24s} error {error:.1e} lse {float(gap):.1e} {seconds:5.1f} s{mark}", flush=True)
    return good


def main(part: str, device: str = "cpu") -> int:
    """Run a part; the number of cases that are off."""
    torch.set_num_threads(1)
    if part in ("prefill", "flash"):  # several blocks of history
        prefill.BLOCK_TOKENS = PAGE_TOKENS
    if part == "flash":
        return check_flash(torch.device(device))
    if part == "append":
        return sum(not check_append(n, c, torch.device(device)) for n, c in APPENDS.items())
    cases = {"formats": FORMATS, "features": FEATURES, "prefill": PREFILL}[part]
    if device == "cpu":  # Triton's interpreter multiplies the bits of bfloat16 matrices as integers
        cases = {name: case for name, case in cases.items() if case.dtype != torch.bfloat16}
    good = [check(name, replace(case, device=torch.device(device))) for name, case in cases.items()]
    return len(good) - sum(good)


if __name__ == "__main__":
    os.environ.setdefault(SWITCH, "portable")
    sys.exit(min(1, main(*sys.argv[1:])))
