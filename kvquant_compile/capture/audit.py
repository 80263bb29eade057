"""Does every attention of the model go through a marker? Refuse loudly where it does not."""

from __future__ import annotations

from torch import fx

from kvquant_compile.capture.capture_cache import Firings
from kvquant_compile.capture.markers import APPEND, ATTEND, MASK
from kvquant_compile.errors import UnsupportedLayerError, UnsupportedModelError


def audit_firings(name: str, seen: Firings) -> None:
    """Check what an eager run of the marked model did.

    Raises:
        UnsupportedModelError: no append (no key-value cache), or attention to later tokens.
        UnsupportedLayerError: a mask of another kind than causal and sliding.
    """
    if not seen.appends:
        raise UnsupportedModelError(
            f"{name} cannot be captured",
            why="no layer appended keys and values to a cache: it is no decoder, or its cache is"
            " of another kind",
            do="Use a decoder-only language model with a key-value cache.",
        )
    for kind in (seen.masks[i] for i in sorted(seen.attended)):
        if kind.looks_ahead:
            raise UnsupportedModelError(
                f"{name} cannot be captured",
                why="it is no decoder: its tokens attend to later ones",
                do="Use a decoder-only language model with a key-value cache.",
            )
        if not kind.understood:
            raise UnsupportedLayerError(
                "an attention mask cannot be captured",
                where=name,
                why="it is neither causal nor a sliding window (chunked, block-wise or custom): "
                + kind.reason,
                do="Models with such masks are not supported.",
            )


def audit_graph(graph: fx.Graph, seen: Firings) -> None:
    """Check that the graph holds every site of the eager run, and that each cache is read.

    Raises:
        UnsupportedLayerError: a site was lost, or what is attended is not what was appended.
    """
    appends = graph.find_nodes(op="call_function", target=APPEND)
    attends = graph.find_nodes(op="call_function", target=ATTEND)
    if (len(appends), len(attends)) != (seen.appends, seen.attends):
        raise UnsupportedLayerError(
            "the captured graph is not the model",
            why=f"{seen.appends} appends and {seen.attends} attentions ran, but the graph has"
            f" {len(appends)} and {len(attends)}",
            do="Report the model.",
        )
    read = set()
    for attend in attends:
        sources = _appends_before(attend.args[1:3])
        if len(sources) != 1:
            raise UnsupportedLayerError(
                "an attention layer cannot be captured",
                where=f"layer {attend.args[5]}",
                why=f"what it attends to comes from {len(sources)} cache layers",
                do="Report the model.",
            )
        read |= sources
        _refuse_forgetting(attend, sources, seen)
    for append in appends:
        if append not in read:
            raise UnsupportedLayerError(
                "a cache layer cannot be captured",
                where=f"layer {append.args[2]}",
                why="its keys and values are appended but no attention reads them",
                do="Report the model.",
            )


def _refuse_forgetting(attend: fx.Node, sources: set[fx.Node], seen: Firings) -> None:
    """Refuse a window that exists only because the cache forgets: its queries, and how many keys
    they see, depend on how the tokens come in steps."""
    mask = attend.args[3]
    plain = isinstance(mask, fx.Node) and mask.target is MASK and mask.args[5] == 0
    for append in sources:
        window = seen.forgetful.get(int(append.args[2]), 0)  # type: ignore[arg-type]
        if plain and window:
            raise UnsupportedLayerError(
                "an attention layer cannot be captured",
                where=f"layer {append.args[2]}",
                why=f"its cache forgets all but {window} tokens while its mask has no window, so"
                " that what a token sees depends on the steps it comes in",
                do="Such layers are not supported.",
            )


def _appends_before(nodes: tuple[object, ...]) -> set[fx.Node]:
    """The nearest appends that tensors come from."""
    found: set[fx.Node] = set()
    pending = [node for node in nodes if isinstance(node, fx.Node)]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.target is APPEND:
            found.add(node)
            continue
        new = [i for i in node.all_input_nodes if i not in seen]
        pending += new
        seen.update(new)
    return found
