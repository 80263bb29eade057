"""Frozen descriptions of what the passes proved about a model; pure data, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RopeSpec:
    """A proved rotary embedding of one head vector (RoFormer, arXiv 2104.09864, eq. 34).

    With ``t = position * frequencies[i]`` (a float32 product, as the model computes it)::

        y[out_pairs[i][0]] = scale * (cos(t) * x[in_pairs[i][0]] - sin(t) * x[in_pairs[i][1]])
        y[out_pairs[i][1]] = scale * (sin(t) * x[in_pairs[i][0]] + cos(t) * x[in_pairs[i][1]])

    and ``y[o] = x[i]`` for every ``(i, o)`` of ``passthrough``.

    Attributes:
        in_pairs: channels of the un-rotated key that turn together.
        out_pairs: channels of the rotated key (and of the query) that hold the results.
        frequencies: radians per position, one float32 value per pair.
        passthrough: (input channel, output channel) of the channels that do not turn.
        scale: factor folded into cos and sin (the attention factor of YaRN and longrope).
    """

    in_pairs: Pairs
    out_pairs: Pairs
    frequencies: tuple[float, ...]
    passthrough: Pairs = ()
    scale: float = 1.0

    def __repr__(self) -> str:
        scale = "" if self.scale == 1.0 else f", scale {self.scale:.6g}"
        return f"RopeSpec({self.pairing}, {2 * len(self.in_pairs)}/{self.width} channels{scale})"

    @property
    def width(self) -> int:
        """Channels of the head vector."""
        return 2 * len(self.in_pairs) + len(self.passthrough)

    @property
    def pairing(self) -> str:
        """``half``, ``interleaved``, ``interleaved->half`` or ``irregular``; for reports."""
        kinds = [_pairing(pairs) for pairs in (self.in_pairs, self.out_pairs)]
        return kinds[0] if kinds[0] == kinds[1] else "->".join(kinds)


def _pairing(pairs: Pairs) -> str:
    low = min(min(pair) for pair in pairs)
    ordered = sorted((a - low, b - low) for a, b in pairs)
    n = len(ordered)
    if ordered == [(i, i + n) for i in range(n)]:
        return "half"
    if ordered == [(2 * i, 2 * i + 1) for i in range(n)]:
        return "interleaved"
    return "irregular"


@dataclass(frozen=True)
class AttendPlan:
    """One attention site that reads a layer's cache.

    Attributes:
        query_heads: query heads; a multiple of the layer's kv heads.
        scale: factor of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        window: key j is visible to query i iff ``i - window < j <= i``; 0 for no window.
        chunk: key j is visible to query i iff ``j <= i`` and both are in one chunk of so many
            tokens of their sequence; 0 for no chunks.
        sink_logits: whether a learned per-head logit joins the softmax (gpt-oss).
        position_bias: whether scores of head h change by ``slope[h] * (key's place - query's)``
            (ALiBi).
        selects: whether every query attends to some keys only, chosen by data (sparse attention).
        query_sinks: whether every query computes a logit per head that joins the softmax.
        bias_extent: every query computes a bias per head for keys that are fewer than so many
            tokens before it; 0 if it computes none.
    """

    query_heads: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    sink_logits: bool = False
    position_bias: bool = False
    chunk: int = 0
    selects: bool = False
    query_sinks: bool = False
    bias_extent: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """Everything that is known about one KV-append site and the attentions that read it.

    Attributes:
        index: the cache layer's index (not the module's order).
        kv_heads, key_dim, value_dim: shape of the appended tensors [B, kv_heads, S, dim].
        rope: the rotation between the stored key and the attended key; None when keys are
            not rotated, or when the rotation could not be moved behind the cache (then
            ``refusal`` says why and keys are stored as they are attended).
        attends: attention sites reading this cache, in graph order.
        certificate: JSON-able evidence of the proof (method, pairing, points, residual,
            source lines, versions).
        refusal: why pre-RoPE storage was refused; empty when it was not.
        latent: channels of a head that these pages hold twice and the original caches once: what
            key and value share (latent attention), or values that several key heads are read
            with (differential attention).
        kept: the proved rotation that keys are stored behind, because their format asks for it;
            ``rope`` is None then.
    """

    index: int
    kv_heads: int
    key_dim: int
    value_dim: int
    rope: RopeSpec | None
    attends: tuple[AttendPlan, ...]
    certificate: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""
    kept: RopeSpec | None = None
    latent: int = 0

    def __repr__(self) -> str:
        rope = repr(self.rope) if self.rope else f"keeps {self.kept!r}" if self.kept else "no RoPE"
        if self.refusal:
            rope = f"refused: {self.refusal}"
        queries = "+".join(str(site.query_heads) for site in self.attends)
        return (
            f"LayerPlan({self.index}: {queries} query heads, {self.kv_heads} kv heads x "
            f"{self.key_dim}/{self.value_dim}, {rope})"
        )
