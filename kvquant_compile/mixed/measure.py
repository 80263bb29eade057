"""What each layer's keys and values lose at each width, through the whole model or by proxy."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvquant_compile.calib.observe import Observed, run_captured
from kvquant_compile.capture.captured import Captured
from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate.fake import insert_codec
from kvquant_compile.evaluate.score import mean_kl
from kvquant_compile.evaluate.stored import KEYS, VALUES, Trip
from kvquant_compile.mixed.resume import Resumable
from kvquant_compile.mixed.widths import Item
from kvquant_compile.passes.recognise import MatchedLayer

PROXY_TOKENS = 4096
Losses = dict[Item, dict[int, float]]


@dataclass(eq=False)
class OneAtATime:
    """A codec that passes everything on but what is switched on; one graph serves all settings.

    Attributes:
        trips: (item, width) -> round trip.
        active: item -> width of what is coded at present.
    """

    trips: Mapping[tuple[Item, int], Trip]
    active: dict[Item, int] = field(default_factory=dict)
    pre_rope: bool = True

    def keys(self, x: Tensor, layer: int) -> Tensor:
        """[B, H, S, D] -> the same, read back if it is switched on."""
        return self._read(x, (layer, KEYS))

    def values(self, x: Tensor, layer: int) -> Tensor:
        """As keys."""
        return self._read(x, (layer, VALUES))

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        """0: nothing is stored."""
        return 0.0

    def _read(self, x: Tensor, item: Item) -> Tensor:
        width = self.active.get(item)
        return x if width is None else self.trips[item, width](x)


def measured_losses(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    trips: Mapping[tuple[Item, int], Trip],
    windows: Sequence[Tensor],
    track: Iterable[tuple[Item, int]] | None = None,
) -> Losses:
    """KL divergence of the logits from the original's, one item at one width at a time, all else
    exact: errors of different items are close to independent, so that their divergences add.

    Args:
        captured, layers: the model, its layers as the format stores them.
        trips: what to try.
        windows: int64 [1, S] each, of the calibration text.
        track: iterates over ``trips``; a progress bar's.

    Returns:
        item -> width -> nats per token.
    """
    codec = OneAtATime(trips)
    gm, places = insert_codec(captured.graph_module, layers, codec)
    windows = [ids.to(captured.device) for ids in windows]
    losses: Losses = {}
    with torch.no_grad():
        graphs = [Resumable(gm, places) for _ in windows]
        exact = [
            run_captured(captured, graph.run, ids)[0, :-1]
            for graph, ids in zip(graphs, windows, strict=True)
        ]
        for item, width in trips if track is None else track:
            codec.active = {item: width}
            parts = []
            for original, graph, ids in zip(exact, graphs, windows, strict=True):
                coded = run_captured(captured, functools.partial(graph.resume, item), ids)
                parts.append(mean_kl(original, coded[0, :-1]))
            losses.setdefault(item, {})[width] = sum(parts) / len(parts)
    return losses


def fisher_losses(
    trips: Mapping[tuple[Item, int], Trip], observed: Mapping[int, Observed]
) -> Losses:
    """The same to second order, without running the model: half the expected squared product of
    error and gradient, head by head, errors and gradients taken as independent.

    Raises:
        OptionError: there are no gradients.
    """
    losses: Losses = {}
    for (item, width), trip in trips.items():
        errors = head_losses(trip, observed[item[0]], item[1])
        losses.setdefault(item, {})[width] = float(errors.sum())
    return losses


def head_losses(trip: Trip, seen: Observed, part: str) -> Tensor:
    """[H, D]: every channel's share of the expected loss, nats per token; sums over channels are
    the head's.

    Raises:
        OptionError: calibration took no gradients.
    """
    x, grad = (
        (seen.keys, seen.key_gradients) if part == KEYS else (seen.values, seen.value_gradients)
    )
    if grad is None:
        raise no_gradients()
    some = x[None, :, :PROXY_TOKENS].float()
    error = (trip(some) - some)[0]
    grad = grad.float()
    moment = grad.transpose(1, 2) @ grad / grad.shape[1]
    return 0.5 * (error * (error @ moment)).mean(1)


def no_gradients() -> OptionError:
    """The error for a proxy without what it is made of."""
    return OptionError(
        "the Fisher information is not known",
        why='calibration takes no gradients with sensitivity="none", nor for recipes of blocks',
        do='Calibrate with gradients, or pass allocation="measured".',
    )
