"""Marker ops: the three sites of a decoder's KV path, as opaque nodes of namespace kvquant_capture.

``append(k, v, layer, past) -> (K, V)``
    k, v: [B, Hkv, S, D]; returns the layer's whole keys and values, [B, Hkv, past + S, D].
``mask(padding?, batch, queries, past, kind, window, device) -> bool [B, 1, S, past + S]``
    kind is ``causal``, ``sliding`` or ``chunked``; window is the length of chunks then.
``attend(q, k, v, mask?, sinks?, layer, scaling, softcap, window, causal, slopes?, selected?)``
    returns [B, S, Hq, Dv]; slopes [Hq] add ``slope * (key's place - query's)`` (ALiBi); selected
    are the only keys that a query attends to (sparse attention): places int [B, S, n], or a mask
    bool [B, 1, S, past + S].
``stateful(inputs, shape, dtype, leaf, output) -> Tensor``
    stands for an output of a module with a state while tracing (see :mod:`.leaves`); never runs.

Fake implementations pretend that ``past`` is 0: every length is then S, and the past length never
enters a shape of the captured graph, where it would leave guards such as ``past + S != 1``.
Consequently ``meta["val"]`` of a node behind an append shows S where the real length is past + S.

Real implementations are exact and differentiable, but only at ``past == 0``, where append is the
identity; a graph with markers is thus directly usable for calibration with autograd. They are
registered under the Autograd key as well, so that autograd sees through them into the plain torch
functions of :mod:`kvquant_compile.capture.reference`; no backward formula is written twice.
(A tracer reaches the Autograd key with fake tensors, which are handed on to the fakes.)
With a past, run the graph through :func:`kvquant_compile.capture.run.run_marked`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvquant_compile.capture.reference import (
    chosen_keys,
    exact_attention,
    step_mask,
)
from kvquant_compile.capture.torch_internals import is_fake, is_symbolic
from kvquant_compile.errors import CacheError

NAMESPACE = "kvquant_capture"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LIBRARY.define("append(Tensor k, Tensor v, int layer, SymInt past) -> (Tensor, Tensor)")
_LIBRARY.define(
    "mask(Tensor? padding, SymInt batch, SymInt queries, SymInt past, str kind, int window,"
    " Device device) -> Tensor"
)
_LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, int layer, float scaling,"
    " float softcap, int window, bool causal, Tensor? slopes=None, Tensor? selected=None,"
    " Tensor? bias=None) -> Tensor"
)
_LIBRARY.define(
    "stateful(Tensor[] inputs, SymInt[] shape, ScalarType dtype, int leaf, int output) -> Tensor"
)


def _need_no_past(past: int) -> None:
    if past != 0:
        raise CacheError(
            "a marker op cannot run with a past",
            why=f"it holds no cache, and {past} tokens are said to be cached",
            do="Run the captured graph with run_marked(graph, store, ...), which holds one.",
        )


def _append(k: Tensor, v: Tensor, layer: int, past: int) -> tuple[Tensor, Tensor]:
    if is_fake(k, v):
        return _fake_append(k, v, layer, past)
    _need_no_past(past)
    # An op may not return its inputs; views of them are what autograd and fx both accept.
    return k.view_as(k), v.view_as(v)


def _mask(
    padding: Tensor | None,
    batch: int,
    queries: int,
    past: int,
    kind: str,
    window: int,
    device: torch.device,
) -> Tensor:
    if any(map(is_symbolic, (batch, queries, past))):
        return _fake_mask(padding, batch, queries, past, kind, window, device)
    return step_mask(padding, batch, queries, past, kind, window, device)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    layer: int,
    scaling: float,
    softcap: float,
    window: int,
    causal: bool,
    slopes: Tensor | None = None,
    selected: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    if is_fake(q, k, v):
        return _fake_attend(q, k, v)
    if selected is not None:
        chosen = chosen_keys(selected, k.shape[2])[:, None]
        mask = chosen if mask is None else mask & chosen
    return exact_attention(q, k, v, mask, sinks, scaling, softcap, slopes, bias)


def _fake_append(k: Tensor, v: Tensor, layer: int, past: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v)


def _fake_mask(
    padding: Tensor | None,
    batch: int,
    queries: int,
    past: int,
    kind: str,
    window: int,
    device: torch.device,
) -> Tensor:
    return torch.empty(batch, 1, queries, queries, dtype=torch.bool, device=device)


def _fake_attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


for _name, _real, _fake in (
    ("append", _append, _fake_append),
    ("mask", _mask, _fake_mask),
    ("attend", _attend, _fake_attend),
):
    for _key in ("CompositeExplicitAutograd", "Autograd", "BackendSelect"):
        if _key != "BackendSelect" or _name == "mask":
            _LIBRARY.impl(_name, _real, _key)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_LIBRARY)


def _fake_stateful(
    inputs: list[Tensor], shape: list[int], dtype: torch.dtype, leaf: int, output: int
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=inputs[0].device)


torch.library.register_fake(f"{NAMESPACE}::stateful", _fake_stateful, lib=_LIBRARY)

APPEND = torch.ops.kvquant_capture.append.default
MASK = torch.ops.kvquant_capture.mask.default
ATTEND = torch.ops.kvquant_capture.attend.default
STATEFUL = torch.ops.kvquant_capture.stateful.default
MARKERS = (APPEND, MASK, ATTEND)
