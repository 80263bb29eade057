"""Caches with random pages on any device, and float64 attention over what they hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvquant_compile.codec.keys import dequantise_keys
from kvquant_compile.codec.layout import PageLayout, padded, unpack_keys, unpack_values
from kvquant_compile.codec.spec import PAGE_TOKENS, CodecSpec, LayerTables, table_limit
from kvquant_compile.codec.values import dequantise_values
from kvquant_compile.lowering.attend import CacheView, Site
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.lowering.recent import ring_span
from kvquant_compile.plan import AttendPlan, LayerPlan, RopeSpec

TOLERANCE = 2e-3
"""Of an output in float16, relative to its norm."""


@dataclass
class Case:
    """One attention step over random pages.

    Attributes:
        spec: the format; ``dims`` are key and value width.
        heads, rep: kv heads, and query heads of each.
        lengths: stored tokens of every row before the step.
        steps: tokens of the step.
        rope: rotation, or None.
        exact: whether the step's tokens are read exactly.
        start: position of every row's first token.
        slabs: slabs that the pages are spread over.
        cropped: so many fewer tokens than it could are in the ring of exact last ones.
    """

    spec: CodecSpec
    dims: tuple[int, int]
    rope: RopeSpec | None
    heads: int = 2
    rep: int = 3
    lengths: tuple[int, ...] = (70, 5)
    steps: int = 1
    exact: bool = True
    start: int = 0
    slabs: int = 2
    softcap: float = 0.0
    window: int = 0
    sink_logits: bool = False
    hidden: int = 0
    scattered: bool = False
    padding: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    sharpness: float = 1.0
    cropped: int = 0
    tolerance: float = TOLERANCE

    def build(self) -> Built:
        """Random tensors for every argument of the op."""
        g = torch.Generator("cpu").manual_seed(self.seed)
        plan = LayerPlan(
            0, self.heads, *self.dims, self.rope, (AttendPlan(self.heads * self.rep, 1.0),)
        )
        tables = random_tables(self.spec, self.heads, *self.dims, g)
        constants = lower_layer(plan, self.spec, tables, self.dtype, self.device)
        columns = max(self.lengths) + self.steps
        pages = -(-columns // PAGE_TOKENS)
        batch = len(self.lengths)
        slots = torch.stack([
            torch.arange(n, n + self.steps) for n in self.lengths]).int()  # fmt: skip
        slots[:, : self.padding] = -1
        if self.padding:
            slots[:, self.padding :] -= self.padding
        positions = torch.arange(pages * PAGE_TOKENS).repeat(batch, 1).int() + self.start
        if self.scattered:
            jumps = torch.randint(0, 3, positions.shape, generator=g) // 2
            positions += jumps.cumsum(1).int()
        if self.hidden:
            at = torch.randint(0, min(self.lengths), (batch, self.hidden), generator=g)
            positions.scatter_(1, at, -1 - positions.gather(1, at))
        layout = constants.layout
        slabs = random_pages(layout, batch * pages, g).to(self.device).chunk(self.slabs)
        order = torch.randperm(batch * pages, generator=g).view(batch, pages).int()
        width = padded(self.dims[0]) + self.dims[1]
        sinks = torch.randn(batch, self.heads, layout.exact_rows, width, generator=g)
        sinks[..., self.dims[0] : padded(self.dims[0])] = 0
        sinks = sinks.to(self.device, self.dtype)
        if layout.ring:
            end = torch.maximum(torch.tensor(self.lengths), slots.amax(1) + 1)
            low = ((end - layout.ring).clamp(min=0) + self.cropped).minimum(end)
            state = torch.stack([low, end], 1).int().view(self.dtype).to(self.device)
            sinks[:, 0, -1, : state.shape[1]] = state
        query_heads = self.heads * self.rep

        def random(heads: int, width: int) -> Tensor:
            x = torch.randn(batch, self.steps, heads, width, generator=g).transpose(1, 2)
            return x.to(self.device, self.dtype)

        args, geometry = constants.arguments()
        cache = CacheView(
            order.to(self.device), positions.to(self.device), list(slabs),
            sinks, args, geometry, str(layout),
        )  # fmt: skip
        logits = torch.randn(query_heads, generator=g).to(self.device) if self.sink_logits else None
        site = Site(self.dims[0] ** -0.5, self.softcap, self.window, logits)
        query = random(query_heads, self.dims[0]) * self.sharpness
        return Built(
            self, constants.layout, query, random(self.heads, self.dims[0]),
            random(self.heads, self.dims[1]), slots.to(self.device),
            torch.tensor(self.lengths, dtype=torch.int32, device=self.device), cache, site,
        )  # fmt: skip


@dataclass
class Built:
    """Arguments of ``attend``, and what it should return."""

    case: Case
    layout: PageLayout
    query: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor
    history: Tensor
    cache: CacheView
    site: Site

    def arguments(self) -> tuple:
        """Positional arguments of the lowering's attend functions."""
        return (self.query, self.key, self.value, self.slots, self.history, self.cache, self.site,
                self.case.exact)  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor]:
        """Float64 output [B, S, Hq, Dv] and log-sum-exp [B, Hq, S]."""
        rows = [self._row(b) for b in range(len(self.case.lengths))]
        return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])

    def _row(self, b: int) -> tuple[Tensor, Tensor]:
        c, cache, dk = self.case, self.cache, self.case.dims[0]
        slots = self.slots[b].long()
        limit = c.lengths[b] if c.exact else max(c.lengths[b], int(slots.max()) + 1)
        pages = torch.cat(cache.pages)[cache.table[b].long()].transpose(0, 1)[None]
        tables = LayerTables(*cache.tables)
        keys = dequantise_keys(unpack_keys(self.layout, pages), tables, c.spec)[0].double()
        values = dequantise_values(unpack_values(self.layout, pages), tables, c.spec)[0].double()
        n = c.spec.sink_tokens
        keys[:, :n], values[:, :n] = (
            cache.sinks[b, :, :n, : keys.shape[-1]],
            cache.sinks[b, :, :n, keys.shape[-1] :],
        )
        ring = self.layout.ring
        if ring:
            low = int(ring_span(cache.sinks)[0][b])
            held = torch.arange(min(max(low, n), limit), limit, device=keys.device)
            rows = cache.sinks[b, :, n + held % ring].double()
            keys[:, held], values[:, held] = (
                rows[..., : keys.shape[-1]],
                rows[..., keys.shape[-1] :],
            )
        keys, values = keys[:, :limit], values[:, :limit]
        positions = cache.positions[b, :limit].long()
        keys = self._rotate(keys, torch.where(positions < 0, -1 - positions, positions))
        place = torch.arange(limit, device=keys.device)
        seen = (place <= slots[:, None]) & (positions >= 0)
        if c.window:
            seen &= place > slots[:, None] - c.window
        near = c.window
        if ring and not c.exact:  # the last tokens before every query are exact
            seen &= (place < c.lengths[b]) | (place <= slots[:, None] - ring)
            near = min(ring, c.window or ring)
        if c.exact or ring:
            keys = torch.cat([keys, self.key[b].double()], 1)
            values = torch.cat([values, self.value[b].double()], 1)
            steps = torch.arange(c.steps, device=keys.device)
            own = (steps <= steps[:, None]) & (slots >= 0) & (slots >= 0)[:, None]
            if near:
                own &= slots > slots[:, None] - near
            seen = torch.cat([seen, own], 1)
        query = self.query[b].double().unflatten(0, (c.heads, c.rep))
        scores = query @ keys[:, None].transpose(-1, -2) * dk**-0.5
        if c.softcap:
            scores = torch.tanh(scores / c.softcap) * c.softcap
        scores = scores.masked_fill(~seen, -torch.inf).flatten(0, 1)
        extra = scores.new_empty(scores.shape[0], c.steps, 0)
        if self.site.sink_logits is not None:
            extra = self.site.sink_logits.double()[:, None, None].expand(-1, c.steps, 1)
        lse = torch.cat([scores, extra], -1).logsumexp(-1)
        weights = torch.nan_to_num((scores - lse[..., None]).exp())
        out = weights.unflatten(0, (c.heads, c.rep)) @ values[:, None]
        return out.flatten(0, 1).transpose(0, 1), lse

    def _rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Exact rotation of keys in pair order, then the model's channels."""
        order, frequencies, scale = self.cache.geometry[1:]
        if frequencies.numel():
            angle = positions[:, None].double() * frequencies.double()
            cos, sin = angle.cos() * scale, angle.sin() * scale
            a, b = keys.unflatten(-1, (2, -1)).unbind(-2)
            keys = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        if order.numel() == 0:
            return keys
        out = keys.new_zeros(*keys.shape[:-1], self.case.dims[0] + 1)
        return out.index_add_(-1, order, keys)[..., :-1]


def random_tables(
    spec: CodecSpec, heads: int, key_dim: int, value_dim: int, g: torch.Generator
) -> LayerTables:
    """Random ascending tables, one per head, and channel constants."""

    def table(bits: int) -> Tensor:
        limit = table_limit(bits)
        rows = [torch.randperm(2 * limit + 1, generator=g)[: 2**bits] - limit for _ in range(heads)]
        if 2**bits > 2 * limit + 1:
            rows = [torch.linspace(-limit, limit, 2**bits).round() for _ in range(heads)]
        return torch.stack(rows).sort(-1).values.to(torch.int8)

    return LayerTables(
        table(spec.key_bits),
        (torch.rand(heads, key_dim, generator=g) * 0.03 + 0.003).half().float(),
        torch.randint(-60, 60, (heads, key_dim), generator=g).float(),
        torch.rand(heads, key_dim, generator=g) + 0.1,
        table(spec.value_bits),
        torch.rand(heads, value_dim, generator=g) + 0.5,
        torch.randn(heads, value_dim, generator=g) * 0.1,
    )


def random_pages(layout: PageLayout, count: int, g: torch.Generator) -> Tensor:
    """Random pages uint8 [count, H, page_bytes] with sensible scales and slots."""
    where = {"generator": g, "device": g.device}
    pages = torch.randint(
        0, 256, (count, layout.heads, layout.page_bytes), dtype=torch.uint8, **where
    )

    def put(name: str, x: Tensor) -> None:
        data = x.contiguous().view(torch.uint8).flatten(2)
        start, end = layout.offsets[name]
        pages[..., start:end] = data

    lead = (count, layout.heads)
    s = layout.spec
    if s.key_token_scale:
        put("key_token_scale", (torch.rand(*lead, 64, **where) + 0.5).half())
    zero = torch.randn(*lead, 64, **where) * 0.3
    scale = torch.rand(*lead, 64, **where) * 0.02 + 0.002
    put("value_scale_zero", torch.stack([scale, zero], -1).half())
    for kind, slots, dim in (("key", s.key_slots, 2 * (padded(layout.key_dim) // 2)),
                             ("value", s.value_slots, layout.value_dim)):  # fmt: skip
        if slots:
            index = torch.rand(*lead, 64, dim, **where).topk(slots, -1).indices
            put(f"{kind}_slot_index", index.transpose(-1, -2).to(torch.uint8))
            put(f"{kind}_slot_residual", torch.randn(*lead, slots, 64, **where).half())
    return pages


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; infinite where anything is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.double() - expected).norm() / expected.norm())
