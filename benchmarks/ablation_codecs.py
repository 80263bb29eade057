"""Variants of the default codec for :mod:`benchmarks.ablation`: what each ingredient is worth.

A variant is the default with one thing taken out, or with one that the default does not have.
Everything is simulated by round trips at the places of the graph where pages are read, so that an
ingredient needs no kernel to be judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kvquant_compile.calib import fit_keys
from kvquant_compile.calib.fit import fit_layer
from kvquant_compile.calib.nuq import weighted_kmeans
from kvquant_compile.calib.observe import Observed
from kvquant_compile.calib.sensitivity import feedback_matrix
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec import values as values_module
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.order import gather_index, key_order, reorder
from kvquant_compile.codec.slots import inlier_range, largest
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit
from kvquant_compile.evaluate.stored import KEYS, VALUES, Trip, round_trip
from kvquant_compile.plan import LayerPlan

Change = Callable[["Layer", LayerTables], LayerTables]
Wrap = Callable[["Layer", LayerTables, CodecSpec, str, Trip], Trip]


@dataclass(frozen=True, eq=False)
class Layer:
    """What a variant may look at: the layer's plan, its calibration tokens, the default's tables
    by width."""

    plan: LayerPlan
    seen: Observed
    defaults: dict[int, LayerTables] = field(default_factory=dict)

    def default(self, bits: int) -> LayerTables:
        if bits not in self.defaults:
            self.defaults[bits] = fitted(self, CodecSpec(bits, bits, 1, 1, True, 1), FitSettings())
        return self.defaults[bits]


def fitted(layer: Layer, spec: CodecSpec, fit: FitSettings) -> LayerTables:
    """A layer's tables, all of them."""
    x, ignore = layer.seen, layer.seen.places < max(1, spec.sink_tokens)
    found = (x.keys, x.values, x.key_gradients, x.value_gradients)
    return fit_layer(*found, spec, fit, ignore, layer.plan.rope)


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
        name: of it.
        fit: switches of the fit.
        form: changes of the format.
        more_bits: what it stores beyond its format, in effective bits.
        token_bits: the same, in bits of a (token, head), key and value together.
        parts: whose constants are fitted for it; the others are the default's.
        rotate: "", "keys" or "values": coded after a random orthogonal map of the channels.
        fitting: patches that hold during the fit.
        change: of the tables, after the fit.
        wrap: of the round trips.
    """

    name: str
    fit: FitSettings = field(default_factory=FitSettings)
    form: Mapping[str, Any] = field(default_factory=dict)
    more_bits: float = 0.0
    token_bits: float = 0.0
    parts: tuple[str, ...] = ()
    rotate: str = ""
    fitting: Callable[[], AbstractContextManager[Any]] = nullcontext
    change: Change | None = None
    wrap: Wrap | None = None

    def spec(self, bits: int) -> CodecSpec:
        return replace(CodecSpec(bits, bits, 1, 1, True, 1), **self.form)

    def effective_bits(self, layer: Layer, bits: int, window: int) -> float:
        p, spec = layer.plan, self.spec(bits)
        layout = PageLayout(spec, p.kv_heads, p.key_dim, p.value_dim, 2)
        more = self.more_bits + self.token_bits / (p.key_dim + p.value_dim)
        return layout.effective_bits + more + 16 * spec.sink_tokens / window

    def trips(self, layer: Layer, bits: int) -> dict[str, Trip]:
        """Round trips of the keys (before RoPE) and the values of a layer."""
        spec = self.spec(bits)
        maps = {p: _rotation(layer, p) if p == self.rotate else None for p in (KEYS, VALUES)}
        inside = Layer(layer.plan, _turned(layer.seen, maps))
        tables = layer.default(bits)
        if self.parts:
            quick = self.fit if KEYS in self.parts else replace(self.fit, refine=0, stretch=0.0)
            with self.fitting():
                own = fitted(inside, spec, quick).tensors()
            changed = {n: t for n, t in own.items() if n.split("_")[0] + "s" in self.parts}
            tables = replace(tables, **changed)
        if self.change is not None:
            tables = self.change(inside, tables)
        trips = {p: round_trip(layer.plan, spec, tables, p) for p in (KEYS, VALUES)}
        if self.wrap is not None:
            trips = {p: self.wrap(inside, tables, spec, p, t) for p, t in trips.items()}
        return {p: _between(trips[p], maps[p]) for p in trips}


def _rotation(layer: Layer, part: str) -> Tensor:
    """A random orthogonal matrix [D, D]."""
    dim = layer.plan.key_dim if part == KEYS else layer.plan.value_dim
    generator = torch.Generator().manual_seed(layer.plan.index)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]


def _turned(seen: Observed, maps: Mapping[str, Tensor | None]) -> Observed:
    fields = {KEYS: ("keys", "key_gradients"), VALUES: ("values", "value_gradients")}
    changes = {f: getattr(seen, f) @ m for p, m in maps.items() if m is not None for f in fields[p]}
    return replace(seen, **changes)


def _between(trip: Trip, turn: Tensor | None) -> Trip:
    return trip if turn is None else lambda x: trip(x.float() @ turn) @ turn.T


def _table_of_all_heads(x: Tensor, weight: Tensor, count: int, limit: float) -> Tensor:
    pooled = weighted_kmeans(x.reshape(1, -1), weight.reshape(1, -1), count, limit)
    return pooled.repeat(x.shape[0], 1)


def _one_table() -> AbstractContextManager[Any]:
    return patch.object(fit_keys, "weighted_kmeans", _table_of_all_heads)


def _pair_shared(layer: Layer, tables: LayerTables) -> LayerTables:
    """One scale for the two channels that RoPE turns together."""
    assert layer.plan.rope is not None
    scale = tables.key_scale.clone()
    for a, b in layer.plan.rope.in_pairs:
        scale[:, [a, b]] = (scale[:, a] * scale[:, b]).sqrt()[:, None]
    placed = fit_keys.grid(scale, tables.key_scale * tables.key_zero)
    tables = replace(tables, **placed)
    grad, dim = layer.seen.key_gradients, scale.shape[1]
    assert grad is not None
    order = gather_index(key_order(layer.plan.rope, dim), dim)
    ordered = reorder(grad, order), reorder(tables.key_scale, order)
    return replace(tables, key_feedback=feedback_matrix(*ordered, FitSettings().damping))


def _cheap_range(u: Tensor, spec: CodecSpec) -> tuple[Tensor, Tensor]:
    """A byte each: scales rounded up to a sixteenth of an octave, zeros in 1 / 64 of the range."""
    low, high = inlier_range(u, spec.value_slots)
    limit = table_limit(spec.value_bits)
    scale = ((high - low) / (2 * limit)).clamp_min(2.0**-14)
    scale = torch.exp2((scale.log2() * 16).ceil() / 16)
    unit = scale * (limit / 64)
    zero = ((high + low) / 2 / unit).round().clamp(-128, 127) * unit
    return scale.half(), zero.half()


def _with_cheap_range(
    layer: Layer, tables: LayerTables, spec: CodecSpec, part: str, trip: Trip
) -> Trip:
    def read(x: Tensor) -> Tensor:
        with patch.object(values_module, "token_range", _cheap_range):
            return trip(x)

    return trip if part == KEYS else read


def _key_slots_by_range(layer: Layer, tables: LayerTables) -> LayerTables:
    """Outliers are what is farthest out of range, whatever it costs."""
    return replace(tables, key_weight=tables.key_scale**-2)


def _value_slots_by_damage(
    layer: Layer, tables: LayerTables, spec: CodecSpec, part: str, trip: Trip
) -> Trip:
    grad = layer.seen.value_gradients
    assert grad is not None
    weight = grad.square().mean(1).sqrt()[:, None]

    def read(x: Tensor) -> Tensor:
        with patch.object(values_module, "largest", lambda s, m: largest(s * weight, m)):
            return trip(x)

    return trip if part == KEYS else read


def _far_tokens_exact(share: float) -> Wrap:
    """Keys and values of tokens whose keys are largest stay exact: sinks found at run time."""

    def wrap(layer: Layer, tables: LayerTables, spec: CodecSpec, part: str, trip: Trip) -> Trip:
        x = layer.seen.keys if part == KEYS else layer.seen.values
        middle = x.mean(1, keepdim=True)
        spread = (x - middle).square().mean(1, keepdim=True).sqrt()

        def size(y: Tensor) -> Tensor:
            return ((y.float() - middle) / spread).square().mean(-1, keepdim=True)

        limit = size(x).flatten(1).quantile(1 - share, dim=1)[:, None, None]
        return lambda y: torch.where(size(y) > limit, y.float(), trip(y))

    return wrap


def variants() -> list[Variant]:
    """The default first."""
    full = FitSettings()
    keys: dict[str, dict[str, Any]] = {
        "evenly spaced keys": {"key_nuq": False},
        "no weights at all in the key fit": {"sensitivity": False, "token_power": 0.0},
        "no Q-Norm": {"stretch": 0.0},
        "whole Q-Norm": {"stretch": 1.0},
        "no key feedback": {"key_feedback": False},
    }
    values: dict[str, dict[str, Any]] = {
        "value range by width alone": {"value_clip": False},
        "no value feedback": {"value_feedback": False},
        "k-means value tables": {"value_nuq": True},
        "static value channel transform": {"value_transform": True},
    }
    both = (KEYS, VALUES)
    return [
        Variant("default"),
        *(Variant(name, replace(full, **x), parts=(VALUES,)) for name, x in values.items()),
        Variant("values rotated", parts=(VALUES,), rotate=VALUES),
        Variant("no value slot", form={"value_slots": 0}, parts=(VALUES,)),
        Variant("value slots by damage", wrap=_value_slots_by_damage),
        Variant("value range in two bytes", token_bits=-16, wrap=_with_cheap_range),
        Variant("key slots by range, not damage", change=_key_slots_by_range),
        Variant("pair-shared key scales", change=_pair_shared),
        Variant("largest 1 % of tokens exact", more_bits=0.16, wrap=_far_tokens_exact(0.01)),
        Variant("no exact first token", form={"sink_tokens": 0}),
        Variant("4 exact first tokens", form={"sink_tokens": 4}),
        Variant("no slots", form={"key_slots": 0, "value_slots": 0}, parts=both),
        Variant("2 slots each", form={"key_slots": 2, "value_slots": 2}, parts=both),
        Variant("no token scale of keys", form={"key_token_scale": False}, parts=(KEYS,)),
        Variant("keys rotated", parts=(KEYS,), rotate=KEYS),
        Variant("one key table for all heads", parts=(KEYS,), fitting=_one_table),
        *(Variant(name, replace(full, **x), parts=(KEYS,)) for name, x in keys.items()),
    ]
