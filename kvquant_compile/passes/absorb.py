"""Latent attention: attend to what is cached instead of to what is computed from it.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) caches one latent c and one
rotated key part r per token, and expands them before it attends: k = [A c, r] and v = V c, with
matrices of every head. Since q . (A c) = (A' q) . c, the matrices move to the query and to the
output; what is attended then is one head with key [c, r] and value c, as cached. The matrices
are read by evaluating the graph on unit vectors, and checked on random ones.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.edit import (
    add_call,
    add_op,
    add_transpose,
    later,
    sort_topologically,
)
from kvquant_compile.capture.markers import APPEND, ATTEND
from kvquant_compile.capture.ops import op_name
from kvquant_compile.capture.run import Evaluator, widened
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.errors import UnsupportedLayerError
from kvquant_compile.passes.head_maps import NoHeadMap, move_heads
from kvquant_compile.passes.taint import Taint, rotation_site, taint

_TOLERANCE = 1e-5
# In the meta of an append: channels of a head that its key and value hold twice.
LATENT = "kvquant_latent"
_NAME = "kvquant_absorbed_{}_{}"
_READ = "kvquant_absorbed_parameters"
aten = torch.ops.aten


@dataclass(frozen=True)
class _Expansion:
    """An attention to keys and values that are computed from one append.

    Attributes:
        attend, append: the markers.
        latent, rotated: the append's two parts as the attention reads them.
        key, value: [heads, latent + rotated channels, head channels], linear in both parts.
    """

    attend: fx.Node
    append: fx.Node
    latent: fx.Node
    rotated: fx.Node
    key: Tensor
    value: Tensor

    @property
    def rank(self) -> int:
        """Channels of the latent."""
        return int(self.latent.meta["val"].shape[3])


def absorb(captured: Captured) -> None:
    """Move linear expansions of cached latents, and copies of cached heads, to queries and
    outputs, in every layer.

    Raises:
        UnsupportedLayerError: keys or values are computed from the cached ones in another way.
    """
    gm = captured.graph_module
    before = _attributes(gm)
    readers_of: dict[fx.Node, list[fx.Node]] = {}
    for attend in gm.graph.find_nodes(op="call_function", target=ATTEND):
        readers_of.setdefault(_append_before(attend), []).append(attend)
    indirect = {a: r for a, r in readers_of.items() if not all(map(_is_direct, r))}
    for append, readers in indirect.items():
        if append.meta["val"][0].shape[1] == 1:
            for reader in readers:
                known = taint(gm.graph, *captured.data_inputs)
                _absorb(gm, known, _expansion(gm, reader))
            continue
        try:
            whole = move_heads(gm, append, readers)
        except NoHeadMap as reason:
            raise _refused(readers[0], f"several heads are cached: {reason}") from reason
        whole.meta[LATENT] = _width(whole.args[1]) - _width(append.args[1])
    if indirect:
        gm.graph.eliminate_dead_code()
        sort_topologically(gm.graph)
        gm.graph.lint()
        gm.recompile()
        gone = [before[name] for name in before.keys() - _attributes(gm).keys()]
        gm.meta[_READ] = tuple((x, x._version) for x in gone)


def changed_since(gm: fx.GraphModule) -> bool:
    """Whether a parameter that was moved into the graph's own matrices has been written since,
    which the graph does not see (writes through ``.data`` leave no trace)."""
    return any(x._version != version for x, version in gm.meta.get(_READ, ()))


def _attributes(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph reads, by name."""
    names = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    return {name: operator.attrgetter(name)(gm) for name in names}


def _is_direct(attend: fx.Node) -> bool:
    sources = [part.args[0] for part in attend.args[1:3] if isinstance(part, fx.Node) and part.args]
    whole = sources[0]
    return sources[0] is sources[1] and isinstance(whole, fx.Node) and whole.target is APPEND


def _refused(attend: fx.Node, why: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        "an attention layer cannot be rewritten",
        where=f"layer {attend.args[5]}",
        why=f"it attends to keys and values that are computed from the cached ones, and {why}",
        do="Report the model; only linear expansions of one latent are supported.",
    )


def _expansion(gm: fx.GraphModule, attend: fx.Node) -> _Expansion:
    append = _append_before(attend)
    parts: dict[int, fx.Node] = {int(part.args[1]): part for part in append.users}  # type: ignore[arg-type]
    if set(parts) != {0, 1}:
        raise _refused(attend, "one of the two cached tensors is not read")
    latent, rotated = parts[0], parts[1]
    rank, width = (int(part.meta["val"].shape[3]) for part in (latent, rotated))
    function = _Expand(gm, attend, latent, rotated)
    key, value = function(torch.eye(rank + width, dtype=function.dtype, device=function.device))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, rank + width, generator=generator).to(function.device, function.dtype)
    for got, matrix in zip(function(x), (key, value), strict=True):
        expected = x.double() @ matrix.double()
        error = float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= _TOLERANCE:
            raise _refused(attend, f"not by a linear map of each token (error {error:.1e})")
    return _Expansion(attend, append, latent, rotated, key, value)


def _append_before(node: fx.Node) -> fx.Node:
    """The append that keys come from; the audit has checked that there is one."""
    pending = [node.args[1]]
    while True:
        current = pending.pop()
        assert isinstance(current, fx.Node)
        if current.target is APPEND:
            return current
        pending += current.all_input_nodes


class _Expand:
    """Keys and values of an attention as a function of [latent, rotated] of some tokens."""

    def __init__(
        self, gm: fx.GraphModule, attend: fx.Node, latent: fx.Node, rotated: fx.Node
    ) -> None:
        self.gm, self.outputs, self.latent, self.rotated = gm, attend.args[1:3], latent, rotated
        self.dtype, self.device = widened(latent.meta["val"].dtype), latent.meta["val"].device

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [T, channels] to [heads, T, head channels], twice."""
        rank = int(self.latent.meta["val"].shape[3])
        values = input_values(self.gm, 0, len(x), 1)
        values[self.latent], values[self.rotated] = x[None, None, :, :rank], x[None, None, :, rank:]
        with torch.no_grad():
            run = Evaluator(self.gm, values, widen=self.latent.meta["val"].dtype)
            key, value = (run(node)[0] for node in self.outputs if isinstance(node, fx.Node))
        return key, value


def _absorb(gm: fx.GraphModule, known: Taint, site: _Expansion) -> None:
    graph, attend, append = gm.graph, site.attend, site.append
    if bool(site.value[:, site.rank :].any()):
        raise _refused(attend, "its values depend on the rotated part")
    latent, rotated = append.args[:2]
    assert isinstance(latent, fx.Node)
    assert isinstance(rotated, fx.Node)
    query = _query(gm, known, site)
    key = _joined(graph, known, latent, rotated, attend)
    fakes = key.meta["val"], latent.meta["val"]
    where = later(graph, key, latent, append)
    whole = add_call(graph, where, APPEND, (key, latent, *append.args[2:]), fakes)
    whole.meta[LATENT] = site.rank
    k, v = (add_call(graph, whole, operator.getitem, (whole, i), fakes[i]) for i in (0, 1))
    fake = attend.meta["val"]
    shape = (*fake.shape[:3], site.rank)
    inner = add_call(
        graph, later(graph, attend, query), ATTEND, (query, k, v, *attend.args[3:]),
        fake.new_empty(shape),
    )  # fmt: skip
    heads = add_transpose(graph, inner)
    values = _constant(gm, site, "value", site.value[:, : site.rank])
    out = add_op(graph, heads, aten.matmul.default, (heads, values))
    result = add_transpose(graph, out)
    attend.replace_all_uses_with(result)
    graph.erase_node(attend)


def _query(gm: fx.GraphModule, known: Taint, site: _Expansion) -> fx.Node:
    """The query against [latent, rotated]: what meets the latent goes through its matrix."""
    graph, query, rank = gm.graph, site.attend.args[0], site.rank
    assert isinstance(query, fx.Node)
    if not rotation_site(query, known).mixed:
        matrix = _constant(gm, site, "key", site.key.transpose(1, 2))
        return add_op(graph, query, aten.matmul.default, (query, matrix))
    still, turning, channels = _parts(site, query)
    if bool(site.key[:, rank:, channels].any()):
        raise _refused(site.attend, "its un-rotated key part depends on the rotated one")
    matrix = _constant(gm, site, "key", site.key[:, :rank, channels].transpose(1, 2))
    absorbed = add_op(graph, still, aten.matmul.default, (still, matrix))
    return _joined(graph, known, absorbed, turning, site.attend)


def _parts(site: _Expansion, query: fx.Node) -> tuple[fx.Node, fx.Node, slice]:
    """The query's part that meets the latent, the one that meets the rotated key, and the
    channels of the former."""
    parts: Any = query.args[0]
    if op_name(query) != "cat" or len(parts) != 2:
        raise _refused(site.attend, "its query is not joined of a still and a rotated part")
    width = int(parts[0].meta["val"].shape[3])
    ranges = (slice(0, width), slice(width, site.key.shape[2]))
    identity = torch.eye(site.key.shape[1] - site.rank).to(site.key)
    for turning, still in ((1, 0), (0, 1)):
        matrix = site.key[:, :, ranges[turning]]
        expected = torch.cat([matrix.new_zeros(site.rank, matrix.shape[2]), identity]) if (
            matrix.shape[2] == len(identity)) else None  # fmt: skip
        if expected is not None and bool((matrix == expected).all()):
            return parts[still], parts[turning], ranges[still]
    raise _refused(site.attend, "its heads do not share the rotated part")


def _joined(
    graph: fx.Graph, known: Taint, still: fx.Node, turned: fx.Node, attend: fx.Node
) -> fx.Node:
    """[still, turned] with one tensor before the rotation, [still, un-rotated], as its source."""
    place = rotation_site(turned, known)
    before = place.pre if place.mixed else turned
    if before is None or before.meta["val"].ndim != 4 or _width(before) != _width(turned):
        raise _refused(attend, "positions are not mixed into one tensor [B, heads, S, width]")
    rank = _width(still)
    whole = add_op(graph, later(graph, still, before), aten.cat.default, ([still, before], -1))
    if before is turned:
        return whole
    top = add_op(graph, whole, aten.slice.Tensor, (whole, 3, 0, rank))
    rest = add_op(graph, whole, aten.slice.Tensor, (whole, 3, rank, rank + _width(before)))
    before.replace_all_uses_with(rest, delete_user_cb=lambda user: user is not whole)
    sort_topologically(graph)
    return add_op(graph, later(graph, top, turned), aten.cat.default, ([top, turned], -1))


def _width(node: Any) -> int:
    return int(node.meta["val"].shape[3])


def _constant(gm: fx.GraphModule, site: _Expansion, name: str, matrix: Tensor) -> fx.Node:
    """A matrix of every query head as a buffer [Hq, inputs, outputs]."""
    fake = site.attend.args[0].meta["val"]  # type: ignore[union-attr]
    repeats = int(fake.shape[1]) // matrix.shape[0]
    target = _NAME.format(site.attend.args[5], name)
    whole = matrix.repeat_interleave(repeats, 0).to(fake.dtype).contiguous()
    gm.register_buffer(target, whole, persistent=False)
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        node = gm.graph.get_attr(target)
    node.meta["val"] = fake.new_empty(gm.get_buffer(target).shape)
    return node
