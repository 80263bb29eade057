"""``attend`` as a function of an exported graph: one softmax over the cache and the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kvquant_compile.codec.layout import padded
from kvquant_compile.codec.order import reorder
from kvquant_compile.export.cache_steps import LayerStore, reader
from kvquant_compile.export.codec_steps import (
    KEY_READ,
    VALUE_READ,
    Emit,
    Function,
    Outputs,
)
from kvquant_compile.export.signature import Argument, Signature, tensors_like

_I64, _F32 = torch.int64, torch.float32
_TURNS = ("frequencies", "rope_scale")


@dataclass(frozen=True)
class Attention:
    """What one attention site does; see :class:`kvquant_compile.plan.AttendPlan`.

    Attributes:
        query_heads: query heads.
        scale, softcap, window, chunk: as there.
        exact_chunk: read the step's own tokens exactly instead of from the cache.
        extras: learned constants per head by name: ``sink_logits``, ``slopes``.
    """

    query_heads: int
    scale: float
    softcap: float
    window: int
    chunk: int
    exact_chunk: bool
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[tuple[str, float | int], ...]:
        """What a node of the site carries as attributes."""
        optional = (("softcap", self.softcap), ("window", self.window), ("chunk", self.chunk))
        return (("scale", self.scale), *((name, x) for name, x in optional if x))

    def __str__(self) -> str:
        names = [name for name, _ in self.settings[1:]] + list(self.extras)
        names.append("exact" if self.exact_chunk else "quantised")
        return f"heads{self.query_heads} {'+'.join(names)}"


class _Step(NamedTuple):
    """The inputs of ``attend``."""

    query: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor
    lengths: Tensor
    pages: Tensor
    sinks: Tensor


def attender(store: LayerStore, site: Attention) -> Function:
    """``attend``: attention of a step's queries over the cache and the step's own tokens.

    Inputs: rotated queries [batch, Hq, sequence, key_dim], the step's rotated keys and its values,
    slots, lengths before the step int64 [batch], pages and sinks with the step appended, constants.
    Output: [batch, sequence, Hq, value_dim]; zeros for padding.
    """
    layout = store.layout
    named = store.only(("query_order", *KEY_READ, *VALUE_READ, *_TURNS)) | site.extras
    settings = [name for name, _ in site.settings]
    step = ("batch", layout.heads, "sequence")
    inputs = (
        Argument("query", store.dtype, ("batch", site.query_heads, "sequence", layout.key_dim)),
        Argument("key", store.dtype, (*step, layout.key_dim)),
        Argument("value", store.dtype, (*step, layout.value_dim)),
        Argument("slots", _I64, ("batch", "sequence")),
        Argument("lengths", _I64, ("batch",)),
        *store.cache,
        *tensors_like(named),
    )
    count = len(_Step._fields)

    def body(emit: Emit, given: Sequence[Tensor]) -> Outputs:
        known = dict(zip([*named, *settings], given[count:], strict=True))
        return (_attend(emit, store, site, _Step(*given[:count]), known),)

    shape = ("batch", "sequence", site.query_heads, layout.value_dim)
    return Function(
        "attend",
        f"{layout} {'+'.join(named)} {site}",
        "Attention over the quantised cache and the step's own tokens.",
        Signature(inputs, (Argument("output", store.dtype, shape),)),
        body,
        site.settings,
    )


def rotator(store: LayerStore) -> Function:
    """``rotate``: RoPE on stored keys [batch, H, tokens, 2 P] in pair order, token n at n."""

    def body(emit: Emit, given: Sequence[Tensor]) -> Outputs:
        keys, frequencies, scale = given
        angle = torch.arange(keys.shape[2])[:, None].float() * frequencies
        cos, sin = angle.cos() * scale, angle.sin() * scale
        a, b = keys.chunk(2, -1)
        return (torch.cat([a * cos - b * sin, a * sin + b * cos], -1),)

    layout = store.layout
    shape = ("batch", layout.heads, "tokens", padded(layout.key_dim))
    return Function(
        "rotate",
        str(shape[1:]),
        "RoPE on stored keys, a token's position being its place.",
        Signature(
            (Argument("keys", _F32, shape), *tensors_like(store.only(_TURNS))),
            (Argument("rotated", _F32, shape),),
        ),
        body,
    )


def _attend(
    emit: Emit, store: LayerStore, site: Attention, step: _Step, known: dict[str, Tensor]
) -> Tensor:
    heads, order = store.layout.heads, known.get("query_order", torch.empty(0))
    keys, values = _history(emit, store, step, known)
    query = reorder(step.query, order).float().unflatten(1, (heads, -1)) * known["scale"]
    slots, places = step.slots[..., None], torch.arange(keys.shape[2])
    stored = torch.maximum(step.lengths, step.slots.amax(1) + 1)
    limit = step.lengths if site.exact_chunk else stored
    seen = (places <= slots) & (places < limit[:, None, None])
    seen = _near(seen, slots, places, known)
    scores = [_scores(query, keys, seen, slots, places, known)]
    read = [values]
    if site.exact_chunk:
        steps = torch.arange(step.slots.shape[1])
        own = step.slots[:, None]
        seen = _near((steps <= steps[:, None]) & (own >= 0), slots, own, known)
        keys = reorder(step.key, order).float()
        scores.append(_scores(query, keys, seen, slots, own, known))
        read.append(step.value.float())
    output = _softmax_sum(torch.cat(scores, -1), torch.cat(read, 2), known)
    return output.flatten(1, 2).transpose(1, 2).to(store.dtype)


def _history(
    emit: Emit, store: LayerStore, step: _Step, known: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotated keys in pair order and values of every slot there is, float32 [B, H, N, D]."""
    tables = [known[name] for name in (*KEY_READ, *VALUE_READ)]
    keys, values = (x.flatten(2, 3) for x in emit(reader(store), [step.pages, step.sinks, *tables]))
    if "frequencies" in known:
        (keys,) = emit(rotator(store), [keys, *(known[name] for name in _TURNS)])
    return keys, values


def _near(seen: Tensor, queries: Tensor, keys: Tensor, known: dict[str, Tensor]) -> Tensor:
    """Leave out the slots of keys that a window or chunks hide from the slots of queries."""
    if "window" in known:
        seen = seen & (keys > queries - known["window"])
    if "chunk" in known:
        size = known["chunk"]
        same = queries.div(size, rounding_mode="floor") == keys.div(size, rounding_mode="floor")
        seen = seen & same
    return seen


def _scores(
    query: Tensor,
    keys: Tensor,
    seen: Tensor,
    slots: Tensor,
    places: Tensor,
    known: dict[str, Tensor],
) -> Tensor:
    """Scores [B, H, G, S, N], minus infinity where hidden."""
    scores = query @ keys.transpose(-1, -2)[:, :, None]
    if "softcap" in known:
        scores = torch.tanh(scores / known["softcap"]) * known["softcap"]
    if "slopes" in known:
        slopes = known["slopes"].float().view(1, query.shape[1], -1, 1, 1)
        scores = scores + slopes * (places - slots)[:, None, None]
    return scores.masked_fill(~seen[:, None, None], -torch.inf)


def _softmax_sum(scores: Tensor, values: Tensor, known: dict[str, Tensor]) -> Tensor:
    """Softmax-weighted values [B, H, G, S, D]; zeros where nothing is seen."""
    peak = scores.amax(-1, keepdim=True)
    shift = torch.where(peak == -torch.inf, 0.0, peak)
    weights = (scores - shift).exp()
    mass = weights.sum(-1, keepdim=True)
    if "sink_logits" in known:
        logits = known["sink_logits"].float().view(1, scores.shape[1], -1, 1, 1)
        mass = mass + (logits - shift).exp()
    return (weights @ values[:, :, None]) / torch.where(mass > 0, mass, 1.0)
