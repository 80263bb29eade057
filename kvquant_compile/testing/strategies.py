"""Hypothesis strategies: tensors of keys and values, pieces, codecs. Needs hypothesis."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.codec.algebra import (
    Affine,
    Centre,
    ChannelScale,
    Codec,
    Fp8,
    Hadamard,
    LowRank,
    Lut,
    Normalise,
    Outliers,
    Rotation,
    Stage,
)
from kvquant_compile.errors import MissingDependencyError
from kvquant_compile.testing.tensors import CONSTANTS, Profile

try:
    from hypothesis import note
    from hypothesis import strategies as st
except ImportError as error:
    raise MissingDependencyError(
        "the strategies of kvquant_compile.testing need hypothesis",
        why="it is not installed",
        do='Install it with: pip install "kvquant-compile[test]".',
    ) from error

Range = tuple[int, int]
# What overflows, underflows or is exact in half precision, and what is ordinary.
SCALES = (1.0, 1e-3, 100.0, 0.0, 1e-6, 1e-40, 1e4, 1e30)


@st.composite
def profiles(
    draw: Any,
    batch: Range = (1, 2),
    heads: Range = (1, 3),
    tokens: Range = (1, 80),
    dims: tuple[int, ...] = (16, 32),
    multiple: int = 1,
    scales: tuple[float, ...] = SCALES,
) -> Profile:
    """Kinds of tensors, the plainest first: failures shrink towards a small normal one.

    Args:
        draw: given by hypothesis.
        batch, heads, tokens: least and most.
        dims: channels to choose from.
        multiple: of the tokens.
        scales: of everything, to choose from.
    """
    count = draw(st.integers(-(-tokens[0] // multiple), max(1, tokens[1] // multiple))) * multiple
    dim = draw(st.sampled_from(dims))
    return Profile(
        batch=draw(st.integers(*batch)),
        heads=draw(st.integers(*heads)),
        tokens=count,
        dim=dim,
        tail=draw(st.sampled_from((math.inf, 8.0, 3.0, 1.0))),
        channel_spread=draw(st.sampled_from((0.0, 0.3, 1.0))),
        offset=draw(st.sampled_from((0.0, 3.0, 13.0))),
        outlier_channels=draw(st.integers(0, 2)),
        token_spread=draw(st.sampled_from((0.0, 0.1, 0.5))),
        sink=draw(st.sampled_from((1.0, 100.0))),
        massive_tokens=draw(st.integers(0, min(2, count))),
        constant=draw(st.sampled_from(CONSTANTS)),
        scale=draw(st.sampled_from(scales)),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def kv_tensors(draw: st.DrawFn, /, nonfinite: bool = False, **limits: Any) -> Tensor:
    """Keys or values, float32 [B, H, N, D]; the profile is shown with a failing example.

    Args:
        draw: given by hypothesis.
        nonfinite: put up to three NaNs and infinities somewhere.
        limits: as of :func:`profiles`.
    """
    profile = draw(profiles(**limits))
    note(repr(profile))
    x = profile.tensor()
    if nonfinite:
        places = st.integers(0, x.numel() - 1)
        for bad in draw(st.lists(st.sampled_from((torch.nan, torch.inf, -torch.inf)), max_size=3)):
            x.view(-1)[draw(places)] = bad
    return x


@st.composite
def splits(draw: Any, count: int, multiple: int = 1) -> list[int]:
    """Pieces of ``count`` tokens, each a multiple of ``multiple``; one piece is the plainest."""
    units = count // multiple
    cuts = sorted(draw(st.sets(st.integers(1, max(1, units - 1)), max_size=8))) if units > 1 else []
    ends = [0, *cuts, units]
    return [(b - a) * multiple for a, b in itertools.pairwise(ends) if b > a]


def stages() -> st.SearchStrategy[Stage]:
    """Single stages of every kind that fits any head of 16 channels or more."""
    return st.one_of(
        st.builds(Hadamard, heads=st.integers(1, 2)),
        st.builds(Rotation, seed=st.integers(0, 3)),
        st.just(Centre()),
        st.builds(ChannelScale, st.sampled_from((0.5, 1.0)), st.sampled_from(("absmax", "std"))),
        st.builds(Normalise, st.sampled_from(("std", "rms", "absmax"))),
        st.builds(Outliers, count=st.integers(1, 3)),
    )


def leaves() -> st.SearchStrategy[Codec]:
    """Single codecs of every kind, in units of 1, 16 or 32 tokens."""
    widths = st.integers(1, 8)
    return st.one_of(
        st.builds(Affine, widths, group=st.sampled_from((0, 8)), symmetric=st.booleans()),
        st.builds(Affine, widths, st.just("channel"), st.sampled_from((16, 32))),
        st.builds(Affine, widths, group=st.just(8), two_level=st.just(True)),
        st.builds(Lut, st.integers(1, 5)),
        st.builds(Fp8, st.sampled_from(("e4m3", "e5m2"))),
        st.builds(LowRank, st.integers(1, 2), st.just(16)),
    )


@st.composite
def codecs(draw: Any) -> Codec:
    """Compositions of up to two stages and up to two terms."""
    codec: Codec = draw(leaves())
    if draw(st.booleans()):
        codec = codec + draw(leaves())
    for stage in draw(st.lists(stages(), max_size=2)):
        codec = stage >> codec
    return codec
