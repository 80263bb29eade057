"""Attention to cached heads in another order or combination: queries move instead of the cache.

JetMoe repeats its kv heads for every expert instead of interleaving them; differential attention
(arXiv 2410.05258) attends to one key head with the values of two. Which cached head every attended
head is a copy of is found by evaluating the graph on random numbers, which only a copy reproduces
to the bit. Query heads are then sorted by their key head, and the values that are read with one key
head are joined to one wide value, which is stored as often as it is read.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvquant_compile.capture.edit import add_call, add_op, later
from kvquant_compile.capture.markers import APPEND, ATTEND
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.capture.stand_ins import input_values

_TOKENS = 3
# Sinks, slopes and bias of an attend marker: one for every query head.
_OF_HEADS = (4, 10, 12)
_NAME = "kvquant_heads_{}"
aten = torch.ops.aten


class NoHeadMap(Exception):
    """What is attended are no copies of cached heads, or not as many of each; says which."""


@dataclass(frozen=True)
class _Read:
    """One attention: the cached key head and value head of every query head."""

    attend: fx.Node
    keys: tuple[int, ...]
    values: tuple[int, ...]


def move_heads(gm: fx.GraphModule, append: fx.Node, attends: Sequence[fx.Node]) -> fx.Node:
    """Let every attention that reads an append read it directly.

    Args:
        gm: its graph is changed; dead nodes and their order are left to the caller.
        append: a marker that caches several heads.
        attends: all attentions that read it.

    Returns:
        The append that is read now; its value is as wide as its key heads are read with values.

    Raises:
        NoHeadMap: heads are computed, not copied, or are not read alike. Nothing was changed.
    """
    heads = int(append.meta["val"][0].shape[1])
    reads = [_read(gm, append, attend) for attend in attends]
    values = _values_by_key(reads, heads)
    for read in reads:
        if any(read.keys.count(head) != len(read.keys) // heads for head in range(heads)):
            raise NoHeadMap("its key heads are not read by equally many query heads")
        given = dict(enumerate(read.attend.args))
        own = any(given.get(place) is not None for place in _OF_HEADS)
        if own and list(read.keys) != sorted(read.keys):
            raise NoHeadMap("its query heads, which would move, have sinks or biases of their own")
    whole = _stored(gm, append, values)
    fakes = whole.meta["val"]
    key, value = (add_call(gm.graph, whole, operator.getitem, (whole, i), fakes[i]) for i in (0, 1))
    done: dict[tuple[Any, ...], fx.Node] = {}
    for read in reads:
        _replace(gm, read, key, value, values, done)
    return whole


def _read(gm: fx.GraphModule, append: fx.Node, attend: fx.Node) -> _Read:
    given = input_values(gm, 0, _TOKENS, 1)
    generator = torch.Generator().manual_seed(0)
    cached = []
    for fake in append.meta["val"]:
        size = 1, int(fake.shape[1]), _TOKENS, int(fake.shape[3])
        cached.append(torch.randn(size, generator=generator).to(fake.device, fake.dtype))
    for part in append.users:
        given[part] = cached[int(part.args[1])]  # type: ignore[arg-type]
    query, *attended = attend.args[:3]
    assert isinstance(query, fx.Node)
    with torch.no_grad():
        run = Evaluator(gm, given)
        maps = [
            _copies(run(node), source)
            for node, source in zip(attended, cached, strict=True)
            if isinstance(node, fx.Node)
        ]
    repeats = int(query.meta["val"].shape[1]) // len(maps[0])
    keys, values = (tuple(head for head in heads for _ in range(repeats)) for heads in maps)
    return _Read(attend, keys, values)


def _copies(attended: Tensor, cached: Tensor) -> list[int]:
    """Which cached head every attended one is."""
    found = []
    for head in attended.unbind(1):
        same = [i for i, source in enumerate(cached.unbind(1)) if torch.equal(head, source)]
        if not same:
            raise NoHeadMap("the heads that it attends to are no copies of cached ones")
        found.append(same[0])
    return found


def _values_by_key(reads: Sequence[_Read], heads: int) -> list[list[int]]:
    """The value heads that are read with every key head, each list of the same length."""
    found: list[list[int]] = [[] for _ in range(heads)]
    for read in reads:
        for key, value in zip(read.keys, read.values, strict=True):
            if value not in found[key]:
                found[key].append(value)
    if len({len(values) for values in found}) != 1 or not found[0]:
        raise NoHeadMap("its key heads are not read with equally many value heads")
    return found


def _stored(gm: fx.GraphModule, append: fx.Node, values: list[list[int]]) -> fx.Node:
    """An append whose value head h joins the value heads ``values[h]``."""
    key, value = append.args[:2]
    assert isinstance(value, fx.Node)
    if values == [[head] for head in range(len(values))]:
        return append
    parts = [_take(gm, value, 1, [heads[j] for heads in values]) for j in range(len(values[0]))]
    after = later(gm.graph, *parts)
    joined = add_op(gm.graph, after, aten.cat.default, (parts, -1))
    fakes = append.meta["val"][0], joined.meta["val"]
    where = later(gm.graph, append, joined)
    return add_call(gm.graph, where, APPEND, (key, joined, *append.args[2:]), fakes)


def _replace(
    gm: fx.GraphModule,
    read: _Read,
    key: fx.Node,
    value: fx.Node,
    values: list[list[int]],
    done: dict[tuple[Any, ...], fx.Node],
) -> None:
    """Attend with query heads sorted by key head; attentions that only differ in values are one."""
    graph, attend, copies = gm.graph, read.attend, len(values[0])
    query, rest = attend.args[0], attend.args[3:]
    assert isinstance(query, fx.Node)
    order = sorted(range(len(read.keys)), key=lambda head: read.keys[head])
    same = (query, *rest[:2], *rest[3:], *order)
    if same not in done:
        moved = _take(gm, query, 1, order)
        fake, width = attend.meta["val"], value.meta["val"].shape[3]
        where = later(graph, attend, moved, key, value)
        new = add_call(graph, where, ATTEND, (moved, key, value, *rest),
                       fake.new_empty(*fake.shape[:3], width))  # fmt: skip
        split = add_op(graph, new, aten.unflatten.int, (new, 3, [copies, width // copies]))
        done[same] = add_op(graph, split, aten.flatten.using_ints, (split, 2, 3))
    places = [values[k].index(v) for k, v in zip(read.keys, read.values, strict=True)]
    picked = [order.index(head) * copies + place for head, place in enumerate(places)]
    attend.replace_all_uses_with(_take(gm, done[same], 2, picked))
    graph.erase_node(attend)


def _take(gm: fx.GraphModule, node: fx.Node, axis: int, indices: list[int]) -> fx.Node:
    """The entries ``indices`` along an axis; the node itself where these are all in order."""
    fake = node.meta["val"]
    if indices == list(range(int(fake.shape[axis]))):
        return node
    name = _NAME.format(sum(1 for name, _ in gm.named_buffers() if name.startswith(_NAME[:-2])))
    gm.register_buffer(name, torch.tensor(indices, device=fake.device), persistent=False)
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        constant = gm.graph.get_attr(name)
    constant.meta["val"] = fake.new_empty(len(indices), dtype=torch.int64)
    return add_op(gm.graph, node, aten.index_select.default, (node, axis, constant))
