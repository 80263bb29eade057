"""Random use of a cache: steps, crops, rows, forks, files, turns and failures in any order.

Two oracles judge it. Losslessly, every step's logits are those of the original model with
transformers' own cache, led through the same history. Always, what a row's pages give back is what
those of a fresh cache do that was given the row's tokens alone, step by step. At 3 bits that is
equal to the bit in the first layer and in float64. Otherwise projections, and attention before the
other layers, round differently with padding and batch, which turns a code now and then.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, fx
from transformers import DynamicCache, PreTrainedModel

import kvquant_compile
from kvquant_compile import QuantizedCache
from kvquant_compile.lowering.attend import CacheView, read_block
from kvquant_compile.runtime.installed import installed
from kvquant_compile.runtime.layer import QuantizedLayer
from tests.fuzz.history import History, Row
from tests.zoo import VOCAB

MOST_COLUMNS, MOST_ROWS, MOST_CACHES, CHUNK = 260, 4, 3, 24
seeds = st.integers(0, 2**16)
indices = st.lists(st.integers(0, MOST_ROWS - 1), min_size=1, max_size=MOST_ROWS)
flips = st.lists(st.tuples(st.integers(0, MOST_ROWS - 1), st.integers(0, 40)), max_size=3)


class Injected(Exception):
    """What a failing step raises."""


class Tracked:
    """A cache under test, its history, and the original's cache (losslessly only)."""

    def __init__(self, cache: QuantizedCache, history: History, shadow: DynamicCache | None):
        self.cache, self.history, self.shadow = cache, history, shadow

    def both(self, change: Callable[[Any], None]) -> None:
        change(self.cache)
        if self.shadow is not None:
            change(self.shadow)


class CacheMachine(RuleBasedStateMachine):
    """Base of the two machines: ``optimised`` and ``original`` come from the subclass."""

    optimised: PreTrainedModel
    original: PreTrainedModel | None = None

    def __init__(self) -> None:
        super().__init__()
        self.pool: list[Tracked] = []
        self.now: Tracked
        installed(self.optimised).prefill_chunk = CHUNK

    @initialize(rows=st.integers(1, 3))
    def begin(self, rows: int) -> None:
        self.now = self.new(rows)
        self.pool = [self.now]

    def new(self, rows: int) -> Tracked:
        shadow = None if self.original is None else DynamicCache(config=self.original.config)
        return Tracked(kvquant_compile.new_cache(self.optimised), History(rows), shadow)

    # -- steps

    @rule(seed=seeds, steps=st.sampled_from([1, 1, 1, 2, 5, 17, 63, 64]), flips=flips,
          padding=st.sampled_from(["none", "left", "any"]))  # fmt: skip
    def step(self, seed: int, steps: int, flips: list, padding: str) -> None:
        """Prefill, decode, the next turn: with padding, with tokens hidden and shown again."""
        tracked = self.now
        history = tracked.history
        if history.columns + steps > MOST_COLUMNS:
            return
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB, (len(history.rows), steps), generator=generator)
        real = _real(len(history.rows), steps, padding, generator)
        history.hide(flips)
        positions = history.append(ids, real, CHUNK)
        self.check_logits(tracked, ids, torch.tensor(real), positions, history.mask())

    @rule(seed=seeds, steps=st.sampled_from([1, 1, 3, 30]))
    def step_without_a_mask(self, seed: int, steps: int) -> None:
        """No mask hides nothing."""
        history = self.now.history
        if history.padded or history.columns + steps > MOST_COLUMNS:
            return
        history.show_all()
        shape = len(history.rows), steps
        ids = torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
        real = torch.ones(shape, dtype=torch.bool)
        positions = history.append(ids, real.tolist(), CHUNK)
        self.check_logits(self.now, ids, real, positions, None)

    @rule(seed=seeds, new=st.integers(1, 4), prompt=st.integers(1, 30))
    def turn(self, seed: int, new: int, prompt: int) -> None:
        """``generate`` goes on from the cache."""
        history, tracked = self.now.history, self.now
        if history.columns + prompt + new > MOST_COLUMNS:
            return
        shape = len(history.rows), prompt
        ids = torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
        history.append(ids, torch.ones(shape, dtype=torch.bool).tolist(), CHUNK)
        whole = torch.tensor([[c.token for c in row.columns] for row in history.rows])
        mask, options = history.mask(), {"max_new_tokens": new, "do_sample": False}
        options |= {"pad_token_id": 0, "eos_token_id": None}
        out = self.optimised.generate(
            whole, attention_mask=mask, past_key_values=tracked.cache, **options
        )
        if self.original is not None:
            expected = self.original.generate(
                whole, attention_mask=mask, past_key_values=tracked.shadow, **options
            )
            assert torch.equal(out, expected)
        for token in out[:, whole.shape[1] : -1].unbind(1):
            history.append(token[:, None], [[True]] * len(history.rows), CHUNK)

    def check_logits(
        self, tracked: Tracked, ids: Tensor, real: Tensor, positions: Tensor, mask: Tensor | None
    ) -> None:
        given = {"position_ids": positions, "attention_mask": mask}
        with torch.no_grad():
            got = self.optimised(ids, past_key_values=tracked.cache, **given).logits
            if self.original is not None:
                expected = self.original(ids, past_key_values=tracked.shadow, **given).logits
                torch.testing.assert_close(got[real], expected[real], rtol=1e-3, atol=1e-3)
        assert bool(got[real].isfinite().all())

    @rule(seed=seeds, layer=st.integers(0, 1), op=st.sampled_from(["append", "attend"]))
    def failing_step(self, seed: int, layer: int, op: str) -> None:
        """An op raises in the middle of a step: nothing has happened."""
        cache, rows = self.now.cache, len(self.now.history.rows)
        ids = torch.randint(3, VOCAB, (rows, 40), generator=torch.Generator().manual_seed(seed))
        mask = torch.cat([self.now.history.mask(), torch.ones_like(ids)], 1)
        before = cache.get_seq_length()
        with failing(self.optimised, op, layer), torch.no_grad():
            try:
                self.optimised(ids, past_key_values=cache, attention_mask=mask)
            except Injected:
                pass
            else:
                raise AssertionError("the step did not fail")
        assert cache.get_seq_length() == before

    # -- rows and lengths

    @rule(count=st.integers(0, 70))
    def crop(self, count: int) -> None:
        tracked = self.now
        count = min(count, tracked.history.columns)
        if count < tracked.history.columns or self.original is None:
            tracked.both(lambda cache: cache.crop(-count))
            tracked.history.crop(count)

    @precondition(lambda self: self.now.history.columns)
    @rule(order=indices, whole=st.booleans())
    def reorder(self, order: list[int], whole: bool) -> None:
        """Beams (as many rows as before), or a selection of rows."""
        count = len(self.now.history.rows)
        order = [i % count for i in (order * count)[:count] if whole] or [i % count for i in order]
        self.now.both(lambda cache: cache.batch_select_indices(torch.tensor(order)))
        self.now.history.select(order)

    @precondition(lambda self: self.now.history.columns)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        count = len(self.now.history.rows)
        if count * repeats <= MOST_ROWS:
            self.now.both(lambda cache: cache.batch_repeat_interleave(repeats))
            self.now.history.select([i for i in range(count) for _ in range(repeats)])

    # -- caches

    @rule(rows=st.integers(1, 3))
    def reset(self, rows: int) -> None:
        self.now.cache.reset()
        fresh = self.new(rows)
        self.now.history, self.now.shadow = fresh.history, fresh.shadow

    @rule()
    def fork(self) -> None:
        """A copy that goes its own way."""
        if len(self.pool) < MOST_CACHES:
            tracked = self.now
            shadow = copy.deepcopy(tracked.shadow)
            self.now = Tracked(copy.deepcopy(tracked.cache), tracked.history.copied(), shadow)
            self.pool.append(self.now)

    @rule(index=st.integers(0, MOST_CACHES - 1))
    def switch(self, index: int) -> None:
        self.now = self.pool[index % len(self.pool)]

    @rule()
    def drop(self) -> None:
        if len(self.pool) > 1:
            self.pool.remove(self.now)
            self.now = self.pool[0]

    @precondition(lambda self: self.now.history.columns)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            self.now.cache.save(path)
            self.now.cache = kvquant_compile.load_cache(path, self.optimised)

    # -- what always holds

    @invariant()
    def lengths_are_right(self) -> None:
        for tracked in self.pool:
            rows = tracked.history.rows
            assert tracked.cache.get_seq_length() == tracked.history.columns
            if tracked.history.columns:
                assert tracked.cache.lengths.tolist() == [len(row.tokens) for row in rows]

    @precondition(lambda self: self.now.history.columns)
    @rule(index=st.integers(0, MOST_ROWS - 1))
    def row_equals_row_alone(self, index: int) -> None:
        """Pages of a row are those of its tokens alone, appended to a fresh cache."""
        index %= len(self.now.history.rows)
        row = self.now.history.rows[index]
        fresh = _replayed(self.optimised, row)
        count = len(row.tokens)
        for layer in range(len(fresh.pages)) if count else ():
            ours = _contents(self.optimised, self.now.cache, layer, index, count)
            alone = _contents(self.optimised, fresh, layer, 0, count)
            for a, b in zip(ours, alone, strict=True):
                self.assert_same_contents(a, b, layer)
            self.assert_same_ring(self.now.cache.pages[layer], fresh.pages[layer], layer, index)

    def assert_same_contents(self, ours: Tensor, alone: Tensor, layer: int) -> None:
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-3)

    def assert_same_ring(
        self, ours: QuantizedLayer, alone: QuantizedLayer, layer: int, row: int
    ) -> None:
        """Exact last tokens of row ``row``, and of a cache with nothing else."""


def _real(rows: int, steps: int, padding: str, generator: torch.Generator) -> list[list[bool]]:
    """Which columns of a step are no padding; its last one never is in every row."""
    if padding == "none":
        return [[True] * steps for _ in range(rows)]
    if padding == "left":
        counts = torch.randint(0, steps, (rows,), generator=generator).tolist()
        return [[False] * n + [True] * (steps - n) for n in counts]
    chosen = torch.rand(rows, steps, generator=generator) < 0.7
    chosen[0, -1] = True
    return chosen.tolist()


def _replayed(model: PreTrainedModel, row: Row) -> QuantizedCache:
    """A fresh cache with a row's tokens, in the steps in which they came."""
    cache, done = kvquant_compile.new_cache(model), 0
    for part in row.steps():
        ids = torch.tensor([[column.token for column in part]])
        positions = torch.tensor([[column.position for column in part]])
        mask = torch.ones(1, done + len(part), dtype=torch.int64)
        mask[0, sorted(slot for slot in part[0].hidden if slot < done)] = 0
        with torch.no_grad():
            model(ids, past_key_values=cache, position_ids=positions, attention_mask=mask)
        done += len(part)
    return cache


def _contents(
    model: PreTrainedModel, cache: QuantizedCache, layer: int, row: int, count: int
) -> tuple[Tensor, Tensor]:
    """Keys and values that a layer's pages give back for a row's first ``count`` tokens; without
    the last ones that are kept exactly besides."""
    program, pages = installed(model).program, cache.pages[layer]
    module = program.graph_module
    append = _calls(model, "append")[layer]
    tables, geometry = ([getattr(module, n.target) for n in append.args[i]] for i in (6, 7))
    exact = pages.sinks[row : row + 1].clone()
    if pages.layout.ring and not pages.layout.late:
        exact[:, :, -1] = 0  # an empty ring
    view = CacheView(
        cache.table[row : row + 1], cache.positions[row : row + 1], pages.slabs,
        exact, tables, geometry, str(pages.layout),
    )  # fmt: skip
    stored = cache.lengths[row : row + 1]
    keys, values = read_block(view, 0, -(-count // 64), stored, program.dtype)
    return keys[:, :, :count], values[:, :, :count]


def _calls(model: PreTrainedModel, op: str) -> list[fx.Node]:
    target = getattr(torch.ops.kvquant, op).default
    graph = installed(model).program.graph_module.graph
    return list(graph.find_nodes(op="call_function", target=target))


@contextmanager
def failing(model: PreTrainedModel, op: str, layer: int) -> Iterator[None]:
    """The ``layer``-th call of an op of the graph raises inside the block."""
    module, node = installed(model).program.graph_module, _calls(model, op)[layer]
    target = node.target

    def broken(*args: Any) -> None:
        raise Injected

    node.target = broken
    module.recompile()
    try:
        yield
    finally:
        node.target = target
        module.recompile()
