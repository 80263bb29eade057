"""The recogniser: one matched layer per cache append, with its proved rotation and its readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import fx

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.edit import add_call, add_transpose, sort_topologically
from kvquant_compile.capture.markers import APPEND, ATTEND
from kvquant_compile.logs import logger
from kvquant_compile.observer import SILENT, Observer
from kvquant_compile.passes.absorb import LATENT, absorb
from kvquant_compile.passes.distance_bias import DistanceBias, distance_bias
from kvquant_compile.passes.masks import attend_plan
from kvquant_compile.passes.norms import MOVED, UNMOVED, commute_norms
from kvquant_compile.passes.prove import Proof, Prover
from kvquant_compile.passes.taint import float_value
from kvquant_compile.plan import LayerPlan, RopeSpec

_log = logger("passes")


@dataclass(frozen=True)
class MatchedLayer:
    """A layer's plan and the nodes that a rewrite needs.

    Attributes:
        plan: what was proved.
        append: the append marker.
        key_pre: the key to be stored, [B, kv_heads, S, key_dim]: un-rotated when ``plan.rope``
            is given, the appended key otherwise. It may have no users yet (a transpose or view
            added for it): rewrite before eliminating dead code.
        key, value: what the append marker is given.
        attends: the attend markers that read this layer, in graph order.
        logits: attend marker -> what its queries add to scores by distance, [B, Hq, S, extent];
            of those with such a bias. It may have no users yet either.
    """

    plan: LayerPlan
    append: fx.Node
    key_pre: fx.Node
    key: fx.Node
    value: fx.Node
    attends: tuple[fx.Node, ...]
    logits: Mapping[fx.Node, fx.Node] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"MatchedLayer({self.plan!r}, stores {self.key_pre} and {self.value})"


def recognise(captured: Captured, observer: Observer = SILENT) -> tuple[MatchedLayer, ...]:
    """Match every append of a captured graph, in graph order.

    Expansions of cached latents are absorbed first (:mod:`.absorb`). Else only view and transpose
    nodes are added, and only where a key is needed in another layout. A rotation that cannot be
    moved behind the cache is no error: the layer's plan then has no rope and says why in
    ``refusal``.

    Raises:
        UnsupportedLayerError: an attention has a mask that a cache cannot serve, or attends to
            something that is computed from what is cached, but by no linear map.
    """
    absorb(captured)
    commute_norms(captured)
    observer.graph("absorbed", captured.graph_module)
    prover = Prover(captured)
    graph = captured.graph_module.graph
    matched = tuple(
        _match(prover, graph, append)
        for append in graph.find_nodes(op="call_function", target=APPEND)
    )
    sort_topologically(graph)
    graph.lint()
    captured.graph_module.recompile()
    observer.graph("recognised", captured.graph_module)
    for layer in matched:
        _log.info("matched %r", layer.plan)
        _log.debug("layer %d: certificate %s", layer.plan.index, layer.plan.certificate)
    return matched


def _match(prover: Prover, graph: fx.Graph, append: fx.Node) -> MatchedLayer:
    key, value, index, _ = append.args
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    attends = _readers(graph, append)
    biases = {a: b for a in attends if (b := distance_bias(prover.captured, prover.known, a))}
    logits = {attend: bias.logits for attend, bias in biases.items()}
    proof = prover.prove(key)
    refusal = proof.refusal or _query_refusal(prover, proof, attends)
    if refusal:
        refusal = "; ".join(filter(None, (refusal, append.meta.get(UNMOVED))))
        proof = replace(proof, pre=key, layout="bhsd", spec=None, refusal=refusal)
    kv_heads, key_dim = (int(float_value(key).shape[i]) for i in (1, 3))
    plan = LayerPlan(
        index=int(index),  # type: ignore[arg-type]
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=int(float_value(value).shape[3]),
        rope=proof.spec,
        attends=tuple(attend_plan(attend, logits.get(attend)) for attend in attends),
        certificate=_certificate(proof, append, biases.values()),
        refusal=refusal,
        latent=int(append.meta.get(LATENT, 0)),
    )
    key_pre = _in_head_layout(graph, proof, kv_heads, key_dim)
    return MatchedLayer(plan, append, key_pre, key, value, attends, logits)


def _readers(graph: fx.Graph, append: fx.Node) -> tuple[fx.Node, ...]:
    parts = set(append.users)
    return tuple(
        node
        for node in graph.find_nodes(op="call_function", target=ATTEND)
        if node.args[1] in parts
    )


def _query_refusal(prover: Prover, proof: Proof, attends: tuple[fx.Node, ...]) -> str:
    """Why the queries do not turn with the keys; empty if they do, or if nothing turns."""
    if proof.spec is None:
        return ""
    for attend in attends:
        query = attend.args[0]
        assert isinstance(query, fx.Node)
        other = prover.prove_query(query)
        if other.spec is None:
            reason = other.refusal or "no position reaches it"
            return f"the key is rotated, but its query is not, provably: {reason}"
        if not _turn_together(proof.spec, other.spec):
            return "key and query are rotated by different embeddings"
    return ""


def _turn_together(key: RopeSpec, query: RopeSpec) -> bool:
    """Equal angles on equal output channels; a factor of the query is part of the score."""
    turns = [dict(zip(spec.out_pairs, spec.frequencies, strict=True)) for spec in (key, query)]
    return turns[0] == turns[1]


def _certificate(proof: Proof, append: fx.Node, biases: Iterable[DistanceBias]) -> dict[str, Any]:
    moved, proved = append.meta.get(MOVED), [bias.evidence for bias in biases]
    return {
        **proof.evidence,
        **({"moved": moved} if moved else {}),
        **({"distance_bias": proved} if proved else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _in_head_layout(graph: fx.Graph, proof: Proof, heads: int, width: int) -> fx.Node:
    """The stored key as [B, H, S, D]; adds nodes right after it if it is laid out otherwise."""
    node = proof.pre
    assert node is not None
    if proof.layout == "bhsd":
        return node
    if proof.layout == "flat":
        split = node.meta["val"].unflatten(2, [heads, width])
        args = (node, 2, [heads, width])
        node = add_call(graph, node, torch.ops.aten.unflatten.int, args, split)
    return add_transpose(graph, node)
