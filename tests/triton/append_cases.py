"""Named cases of append: the kernel against torch on the same device, to the byte."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kvquant_compile.codec.layout import PageLayout, padded, unpack_keys, unpack_values
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.append import append as torch_append
from kvquant_compile.lowering.triton import append as kernels
from tests.codec.cases import random_feedback
from tests.lowering.reference import half_rope, interleaved_rope
from tests.triton.cases import Case


@dataclass(frozen=True)
class Append:
    """Appends in uneven steps; ``steps`` are (tokens, padding in front of the first row).

    A negative number takes tokens back, whose places the next ones overwrite.
    """

    spec: CodecSpec
    dims: tuple[int, int]
    heads: int = 1
    feedback: bool = False
    strange: float = 0.0
    steps: tuple[tuple[int, int], ...] = ((5, 2), (61, 0), (1, 0))
    interleaved: bool = False
    dtype: torch.dtype = torch.float32


APPENDS = {
    "k3v3 default": Append(CodecSpec(3, 3, 1, 1, True, 1), (32, 32), 1, True),
    "k2v2 d128": Append(CodecSpec(2, 2, 1, 1, True, 1), (128, 128), 2, True, 0.01, ((1, 0), (3, 1)),
                        dtype=torch.float16),
    "k4v4 not finite": Append(CodecSpec(4, 4, 1, 1, True, 0), (32, 48), 2, True, 0.1, ((9, 3),)),
    "k3v4 three slots": Append(CodecSpec(3, 4, 3, 2, True, 2), (64, 32), 1, True, 0.05,
                               ((1, 0), (1, 1), (7, 0))),
    "k2v4 d80": Append(CodecSpec(2, 4, 2, 0, False, 3), (80, 48), steps=((5, 2), (1, 0))),
    "k1v8 d40": Append(CodecSpec(1, 8, 0, 1, True, 0), (40, 24), steps=((66, 0), (1, 0))),
    "k6v5": Append(CodecSpec(6, 5, 0, 4, False, 0), (16, 96), 1, True, 0.02, ((4, 1), (1, 0))),
    "k3v2 recent": Append(CodecSpec(3, 2, 1, 1, True, 1, 4), (16, 16), 1, steps=(
                          (5, 1), (9, 2), (-3, 0), (1, 0)), dtype=torch.float16),
    "k4v4 recent": Append(CodecSpec(4, 4, 0, 0, False, 2, 2), (16, 16), 2, steps=(
                          (4, 1), (3, 3)), dtype=torch.bfloat16),
    "k8v7 interleaved": Append(CodecSpec(8, 7, 4, 0, True, 1), (32, 32), 1, True, 0.02,
                               ((1, 0), (2, 0)), True, torch.bfloat16),
}  # fmt: skip


# Steps of up to so many tokens take a token a program; the cases have some on either side of 8.
SINGLE_STEPS = {"cpu": (8,), "cuda": (8, 256)}


def check_append(name: str, case: Append, device: torch.device) -> bool:
    """Append by both kinds of program and in torch, step after step: the same bytes."""
    kept, same = kernels.SINGLE_STEPS, True
    for kernels.SINGLE_STEPS in SINGLE_STEPS[device.type]:
        same &= _check(f"{name}, {kernels.SINGLE_STEPS}", case, device)
    kernels.SINGLE_STEPS = kept
    return same


def _check(name: str, case: Append, device: torch.device, seed: int = 0) -> bool:
    g = torch.Generator().manual_seed(seed)
    rope = (interleaved_rope if case.interleaved else half_rope)(*[case.dims[0]] * (
        1 if case.interleaved else 2))  # fmt: skip
    built = Case(case.spec, case.dims, rope, case.heads, lengths=(140, 100), dtype=case.dtype,
                 device=device).build()  # fmt: skip
    cache, began, layout = built.cache, time.perf_counter(), built.layout
    tables = list(cache.tables)
    if case.feedback:
        for field, dim in ((-2, padded(case.dims[0])), (-1, case.dims[1])):
            tables[field] = random_feedback(case.heads, dim, seed).to(device)
    stores = [
        ([torch.zeros_like(p) for p in cache.pages], torch.zeros_like(cache.sinks)) for _ in "kt"
    ]
    at = torch.zeros(2, dtype=torch.int32)
    for steps, padding in case.steps:
        if steps < 0:
            at = at + steps
            continue
        slots = (
            at[:, None] + torch.arange(steps, dtype=torch.int32) - torch.tensor([[padding], [0]])
        )
        slots = torch.where(slots < at[:, None], -1, slots)
        at = torch.maximum(at, slots.amax(1) + 1)
        k, v = (_tokens(case, steps, dim, g).to(device) for dim in case.dims)
        for run, (pages, sinks) in zip((kernels.append, torch_append), stores, strict=True):
            run(k, v, slots.to(device), cache.table, pages, sinks, tables, cache.geometry,
                cache.format)  # fmt: skip
    (ours, our_sinks), (theirs, their_sinks) = stores
    said = _differences(layout, ours, theirs)
    if not case.strange and not all(map(torch.equal, ours, theirs)):
        said = said or "unused bytes differ"
    if not _equal(our_sinks, their_sinks).all():
        said = f"{said} sinks differ"
    seconds = time.perf_counter() - began
    print(f"{name:28s} {said + '  <-- wrong' if said else 'same'} {seconds:5.1f} s", flush=True)
    return not said


def _tokens(case: Append, steps: int, dim: int, g: torch.Generator) -> torch.Tensor:
    """Keys or values [2, H, S, dim] of one step, laid out as projections leave them."""
    x = torch.randn(2, steps, case.heads, dim, generator=g)
    x *= torch.randn(2, steps, 1, 1, generator=g).exp()
    bad = torch.rand(x.shape, generator=g) < case.strange
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6e4, 1e-7])
    x = torch.where(bad, values[torch.randint(0, 7, x.shape, generator=g)], x)
    return x.to(case.dtype).transpose(1, 2)


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where elements are equal; the sign and payload of a NaN mean nothing."""
    return (a == b) | (a.isnan() & b.isnan())


def _differences(layout: PageLayout, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    """How many codes, scales and slots differ; empty where none does."""
    pages = [torch.cat(side).transpose(0, 1)[None] for side in (ours, theirs)]
    found = []
    for kind, unpack in (("key", unpack_keys), ("value", unpack_values)):
        a, b = (unpack(layout, side) for side in pages)
        for name, x in vars(a).items():
            if x is not None and (wrong := int((~_equal(x, getattr(b, name))).sum())):
                found.append(f"{kind} {name} {wrong} of {x.numel()}")
    return ", ".join(found)
