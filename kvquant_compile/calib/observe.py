"""What calibration sees: keys before RoPE, values, and the loss's gradients at both.

The captured graph itself is run, with its markers, under autograd; nothing is hooked into the
model's modules, so the same code serves every architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from kvquant_compile.calib.gradients import loss_gradients
from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.embedding import embedded
from kvquant_compile.capture.leaves import STATES
from kvquant_compile.errors import UnsupportedModelError
from kvquant_compile.passes.head_view import HeadView
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.plan import RopeSpec

NOTHING = -100
"""The target of a place that predicts no token."""


@dataclass(frozen=True, eq=False)
class Observed:
    """One layer's calibration tokens (N tokens, H kv heads).

    They stay in the model's dtype, in which they are exact: of a model of 7 billion parameters
    the default calibration keeps 34 GB in bfloat16, and would keep 69 GB in float32.

    Attributes:
        keys: [H, N, key_dim], before RoPE where the plan stores them so.
        values: [H, N, value_dim].
        key_gradients, value_gradients: of the mean next-token loss of a window, times the
            window's tokens; same shapes, or None.
        places: int64 [N], place of the token in its window (sinks are the first).
    """

    keys: Tensor
    values: Tensor
    key_gradients: Tensor | None
    value_gradients: Tensor | None
    places: Tensor

    def __repr__(self) -> str:
        heads, tokens, dim = self.keys.shape
        known = "" if self.key_gradients is not None else ", no gradients"
        return f"Observed({tokens} tokens, {heads} heads x {dim}/{self.values.shape[2]}{known})"


def behind_rope(seen: Observed, rope: RopeSpec) -> Observed:
    """The same tokens with their keys rotated in float32, as they are attended; without
    gradients."""
    first, second = torch.tensor(rope.in_pairs).unbind(1)
    to_first, to_second = torch.tensor(rope.out_pairs).unbind(1)
    frequency = torch.tensor(rope.frequencies, device=seen.keys.device)
    angle = seen.places[:, None].float() * frequency
    cos, sin = angle.cos() * rope.scale, angle.sin() * rope.scale
    keys = seen.keys.to(torch.float32, copy=True)
    a, b = keys[..., first], keys[..., second]
    keys[..., to_first], keys[..., to_second] = a * cos - b * sin, a * sin + b * cos
    for source, target in rope.passthrough:
        keys[..., target] = seen.keys[..., source]
    return Observed(keys, seen.values, None, None, seen.places)


class _Recorder(fx.Interpreter):
    """Runs a captured graph and keeps the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            if torch.is_grad_enabled() and not value.requires_grad:
                value = value.detach().requires_grad_()  # nothing before it is differentiated
            self.seen[n] = value
        return value


def observe(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    batches: Iterable[Tensor],
    gradients: bool,
) -> dict[int, Observed]:
    """Keys, values and gradients of every layer over calibration windows.

    Args:
        captured: the captured model.
        layers: the matched append sites.
        batches: token ids int64 [B, S] each.
        gradients: whether to run the backward pass (Fisher information, KVQuant section 3.2).

    Returns:
        cache index -> observations of all tokens, in order.
    """
    views = [view for layer in layers for view in _stored(layer)]
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in layers]
    places: list[Tensor] = []
    with _frozen_parameters(captured.model):
        for ids in batches:
            found = _one_batch(captured, views, ids.to(captured.device), gradients)
            for part, values in zip(parts, found, strict=True):
                part.append(values)
            places.append(torch.arange(ids.shape[1]).repeat(ids.shape[0]))
    where = torch.cat(places)
    joined = {}
    for layer in layers:
        joined[layer.plan.index] = _join(parts.pop(0), where)  # frees a layer's windows
    return joined


def _stored(layer: MatchedLayer) -> tuple[HeadView, HeadView]:
    key = layer.key_pre if layer.plan.rope is not None else layer.key
    return HeadView.of(key), HeadView.of(layer.value)


def _one_batch(
    captured: Captured, views: list[HeadView], ids: Tensor, gradients: bool
) -> list[tuple[Tensor, ...]]:
    """(keys, values[, gradients of both]) of every layer, [H, B * S, D] each."""
    recorder = _Recorder(captured.graph_module, {view.node for view in views})
    with torch.set_grad_enabled(gradients):
        logits = run_captured(captured, recorder.run, ids)
        found = [recorder.seen[view.node] for view in views]
        columns = [_columns(views, found)]
        if gradients:
            # the last token predicts nothing; to cut it off would copy the logits
            targets = F.pad(ids[:, 1:], (0, 1), value=NOTHING)
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NOTHING,
                reduction="sum",
            )  # fmt: skip
            columns.append(_columns(views, loss_gradients(loss, found)))
    layers = range(0, len(views), 2)
    return [tuple(x for column in columns for x in column[i : i + 2]) for i in layers]


def _columns(views: Sequence[HeadView], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_tokens(view(x)) for view, x in zip(views, tensors, strict=True)]


def run_captured(captured: Captured, run: Callable[..., Any], ids: Tensor) -> Tensor:
    """Logits [B, S, vocab] of ``ids`` int64 [B, S] with no past, the captured graph executed by
    ``run``.

    Raises:
        UnsupportedModelError: the model returns none.
    """
    if captured.convention == "functional":
        return run(ids, 0)
    backbone: Any = captured.backbone
    positions = torch.arange(ids.shape[1], device=ids.device)
    fed = embedded(backbone, ids)
    if torch.is_grad_enabled():
        fed["hidden"] = fed["hidden"].detach().requires_grad_()
    names = [str(n.target) for n in captured.graph_module.graph.find_nodes(op="placeholder")]
    inputs = {
        **fed,
        "attention_mask": None if captured.mask_optional else torch.ones_like(ids),
        "position_ids": positions.expand_as(ids),
        "past": 0,
        STATES: None,
    }
    last = run(*(inputs[name] for name in names))
    with _constant_backbone(backbone, last):
        result = captured.model(input_ids=ids, use_cache=False)
    return predicted(captured.model, result)


def predicted(model: nn.Module, result: Any) -> Tensor:
    """Logits of what a transformers model returned.

    Raises:
        UnsupportedModelError: it returned none.
    """
    logits = getattr(result, "logits", None)
    if logits is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be calibrated or scored",
            why="it has no language-model head, so it predicts no tokens",
            do="Pass the causal LM that contains it.",
        )
    return logits


@contextlib.contextmanager
def _constant_backbone(backbone: nn.Module, last: Tensor) -> Iterator[None]:
    """The backbone answers with ``last``: the model's head then does what is its own to do
    (scaling, soft-capping, its projection)."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class LastHidden(BaseModelOutputWithPast):
        """Whatever else a head reads of a backbone's output is None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    before = backbone.__dict__.get("forward")
    backbone.forward = lambda *args, **kwargs: LastHidden(last_hidden_state=last)
    try:
        yield
    finally:
        del backbone.forward
        if before is not None:
            backbone.forward = before


@contextlib.contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """No gradient is computed for, or left on, the user's parameters; modules keep their mode."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = {m: m.training for m in model.modules()}
    for p in trainable:
        p.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


def _tokens(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [H, B * S, D], a copy: views would keep fused projections in memory."""
    tokens = x.detach().transpose(0, 1).flatten(1, 2)
    return tokens.clone(memory_format=torch.contiguous_format)


def _join(parts: list[tuple[Tensor, ...]], places: Tensor) -> Observed:
    joined = [torch.cat(column, 1) for column in zip(*parts, strict=True)]
    gradients = joined[2:] if len(joined) == 4 else (None, None)
    return Observed(joined[0], joined[1], gradients[0], gradients[1], places.to(joined[0].device))
