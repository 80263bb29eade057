"""One step of an optimised model as a function of tensors: what is exported.

Tokens, lengths and the packed cache go in; logits, new lengths and the cache come out. The
rewritten graph runs as it is; only its two ops are bound to other implementations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from kvquant_compile.capture.embedding import embedded
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.export.attend_step import Attention
from kvquant_compile.export.cache_steps import LayerStore
from kvquant_compile.lowering import ops
from kvquant_compile.passes.rewrite import CONSTANT_PREFIX
from kvquant_compile.runtime.installed import Installed
from kvquant_compile.runtime.plugback import output_type

Cache = tuple[Tensor, Tensor]
GEOMETRY = ("key_order", "query_order", "frequencies", "rope_scale")


class CacheOps(Protocol):
    """What stands for ``kvquant::append`` and ``kvquant::attend`` in an exported graph.

    Shapes are as in :mod:`.cache_steps` and :mod:`.attend_step`; ``constants`` are a layer's
    tables, geometry and learned constants by name, empty ones left out.
    """

    def append(
        self,
        store: LayerStore,
        step: tuple[Tensor, Tensor, Tensor],
        cache: Cache,
        constants: Mapping[str, Tensor],
    ) -> Cache:
        """The cache (pages, sinks) with (keys, values, slots) in it."""

    def attend(
        self,
        store: LayerStore,
        site: Attention,
        step: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        cache: Cache,
        constants: Mapping[str, Tensor],
    ) -> Tensor:
        """Attention of (queries, keys, values, slots, lengths)."""


class StepModule(nn.Module):
    """The step of an optimised model.

    Args:
        state: of the model.
        stores: cache index -> what is known of its layer.
        cache_ops: the two ops.
    """

    def __init__(
        self, state: Installed, stores: Mapping[int, LayerStore], cache_ops: CacheOps
    ) -> None:
        super().__init__()
        self.state, self.stores, self.cache_ops = state, stores, cache_ops
        self.model, self.rewritten = state.captured.model, state.program.graph_module
        self.functional = state.captured.convention == "functional"
        self.output_type = output_type(state.captured)

    def forward(
        self,
        input_ids: Tensor,
        token_mask: Tensor | None,
        lengths: Tensor,
        pages: list[Tensor],
        sinks: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """One step.

        Args:
            input_ids: int64 [batch, sequence].
            token_mask: int64 [batch, sequence], 0 for padding; None where a model knows none.
            lengths: int64 [batch], tokens that every sequence has stored.
            pages, sinks: of every cache layer.

        Returns:
            logits [batch, sequence, vocabulary], new lengths, new pages, new sinks.
        """
        batch, capacity = input_ids.shape[0], pages[0].shape[1]
        for x in (lengths, *pages, *sinks):
            torch._check(x.shape[0] == batch)
        for x in pages:
            torch._check(x.shape[1] == capacity)
        slots, after = _slots(input_ids, token_mask, lengths)
        cache = dict(zip(self.stores, zip(pages, sinks, strict=True), strict=True))
        runner = _Runner(self, slots, lengths, cache)
        logits = runner.logits(input_ids)
        caches = runner.cache.values()
        return logits, after, [x for x, _ in caches], [x for _, x in caches]


def _slots(ids: Tensor, mask: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Slots [batch, sequence] of the step's tokens, -1 for padding, and the lengths after it."""
    if mask is None:
        return lengths[:, None] + torch.arange(ids.shape[1]), lengths + ids.shape[1]
    real = mask != 0
    rank = real.long().cumsum(1) - 1
    return torch.where(real, lengths[:, None] + rank, -1), lengths + real.sum(1)


class _Runner(fx.Interpreter):
    """Runs the rewritten graph with its two ops bound to others."""

    def __init__(
        self, step: StepModule, slots: Tensor, lengths: Tensor, cache: dict[int, Cache]
    ) -> None:
        super().__init__(step.rewritten)
        self.step, self.slots, self.lengths, self.cache = step, slots, lengths, cache

    def logits(self, ids: Tensor) -> Tensor:
        """The model's own forward, its backbone replaced by the graph."""
        if self.step.functional:
            return self._run_graph({"ids": ids})
        backbone, result = self.step.state.captured.backbone, self.step.output_type
        assert result is not None

        def forward(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            return result(last_hidden_state=self._run_graph(embedded(backbone, input_ids)))

        before = backbone.__dict__["forward"]
        backbone.__dict__["forward"] = forward
        try:
            logits: Tensor = self.step.model(input_ids=ids, use_cache=False).logits
        finally:
            backbone.__dict__["forward"] = before
        return logits

    def _run_graph(self, inputs: dict[str, Any]) -> Tensor:
        inputs = {"position_ids": self.slots.clamp(min=0), "slots": self.slots, **inputs}
        names = self.step.state.program.inputs
        output: Tensor = self.run(*(inputs.get(name) for name in names), enable_io_processing=False)
        return output

    def run_node(self, n: fx.Node) -> Any:
        """Bind the two ops; everything else runs as it is."""
        if n.target not in (ops.append, ops.attend):
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        given, index = by_name(n.target, args), layer_of(n)
        store, ops_ = self.step.stores[index], self.step.cache_ops
        constants = _constants(n, given)
        if n.target is ops.append:
            step = (given["key"], given["value"], self.slots)
            self.cache[index] = ops_.append(store, step, self.cache[index], constants)
            return None
        site = attention_of(given, exact=not self.step.state.attend_quantized)
        tokens = (given["query"], given["key"], given["value"], self.slots, self.lengths)
        output = ops_.attend(store, site, tokens, self.cache[index], constants | site.extras)
        return output, None


def stores_of(state: Installed) -> dict[int, LayerStore]:
    """What is known of every layer's cache, by cache index.

    The constants are the graph's own tensors.
    """
    program = state.program
    nodes = program.graph_module.graph.find_nodes(op="call_function", target=ops.append)
    appends = {layer_of(node): node for node in nodes}
    stores = {}
    for index, layout in zip(program.indices, program.layouts, strict=True):
        assert isinstance(layout, PageLayout)
        node = appends[index]
        given = fx.node.map_arg(
            list(node.args),
            lambda x: getattr(program.graph_module, str(x.target), x),
        )
        known = _constants(node, by_name(node.target, given))
        geometry = {name: known.pop(name) for name in GEOMETRY if name in known}
        stores[index] = LayerStore(layout, known, geometry, program.dtype)
    return stores


def by_name(op: Any, args: Sequence[Any]) -> dict[str, Any]:
    """An op's arguments by name, defaults included."""
    arguments = op._schema.arguments
    given = {x.name: x.default_value for x in arguments[len(args) :]}
    return {x.name: value for x, value in zip(arguments, args, strict=False)} | given


def layer_of(node: fx.Node) -> int:
    """The cache index of an ``append`` or ``attend``."""
    return int(by_name(node.target, node.args)["pages"].target.removeprefix("pages_"))


def _constants(node: fx.Node, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """An op's constants by name, empty ones left out; ``given`` are its arguments' values."""
    nodes, prefix = by_name(node.target, node.args), f"{CONSTANT_PREFIX}{layer_of(node)}_"
    names = [x.target.removeprefix(prefix) for x in (*nodes["tables"], *nodes["geometry"])]
    values = (*given["tables"], *given["geometry"])
    return {name: x for name, x in zip(names, values, strict=True) if x.numel()}


def attention_of(given: Mapping[str, Any], exact: bool) -> Attention:
    """What an ``attend`` with these arguments does."""
    extras = {name: given[name] for name in ("sink_logits", "slopes") if given[name] is not None}
    scale, softcap = float(given["scale"]), float(given["softcap"])
    heads = given["query"].shape[1]
    return Attention(heads, scale, softcap, given["window"], given["chunk"], exact, extras)
