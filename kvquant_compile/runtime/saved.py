"""Caches on disk: pages as they are, in one safetensors file bound to model and tables.

Only pages that hold tokens are written, each once however many sequences share it. Slots of a last
page behind its sequence's end are written as they are; tokens that were cropped may be among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from kvquant_compile.capture.attribute_states import kept_in
from kvquant_compile.capture.own_cache import own_states
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.errors import ArtifactError, CacheError
from kvquant_compile.files import FileKind
from kvquant_compile.lowering.pages import gather_pages
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.identity import Identity

_REDO = "Run the prompt through the optimised model again and save its cache anew."
FILE = FileKind("cache", "kvquant_compile cache", "1", ArtifactError, _REDO)


def save(cache: QuantizedCache, identity: Identity, path: str | Path) -> None:
    """Write a cache; see :meth:`QuantizedCache.save`.

    Raises:
        CacheError: it keeps states in a class of the model's own.
        ArtifactError: the file cannot be written.
    """
    if cache.states is not None and len(own_states(cache.states)) > len(kept_in(cache.states)):
        raise CacheError(
            "this cache cannot be saved",
            why=f"its model keeps states in a class of its own, {type(cache.states).__name__},"
            " which nothing but the model's code can fill",
            do="Run the prompt again instead, or keep the cache and fork it.",
        )
    lengths = cache.lengths.cpu()
    used = -(-int(lengths.max()) // PAGE_TOKENS) if lengths.numel() else 0
    holds = torch.arange(used) * PAGE_TOKENS < lengths[:, None]
    table = cache.table[:, :used].cpu()
    ids, places = table[holds].unique(return_inverse=True)
    compact = torch.full_like(table, -1)
    compact[holds] = places.to(torch.int32)
    tensors = {
        "table": compact,
        "lengths": lengths,
        "positions": cache.positions[:, : used * PAGE_TOKENS],
    }
    for index, layer in enumerate(cache.pages):
        if ids.numel():
            chosen = gather_pages(layer.slabs, ids.long().to(cache.device)[None])
            tensors[f"pages.{index}"] = chosen[0].transpose(0, 1)
            tensors[f"sinks.{index}"] = layer.sinks
    for name, columns in cache.masks.state(cache.columns).items():
        tensors[f"columns.{name}"] = columns
    tensors |= {name: tensor.clone() for name, tensor, _ in _states(cache)}
    header = {
        "identity": asdict(identity),
        "columns": cache.columns,
        "states": {name: begun for name, _, begun in _states(cache)},
    }
    FILE.write(path, header, tensors)


def load(cache: QuantizedCache, identity: Identity, path: str | Path) -> QuantizedCache:
    """Fill an empty cache from a file; see :func:`kvquant_compile.load_cache`."""
    header, tensors = FILE.read(path)
    _check_identity(header, identity, path)
    try:
        _check_shapes(cache, header, tensors)
        _fill(cache, header, tensors)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        cache.reset()
        raise FILE.damaged(path, f"its parts do not fit together ({error})") from error
    return cache


def _check_identity(header: Mapping[str, Any], identity: Identity, path: str | Path) -> None:
    try:
        stored = header["identity"]
        theirs = Identity(**{**stored, "formats": tuple(stored["formats"])})
    except (KeyError, TypeError) as error:
        raise FILE.damaged(path, "its header does not say whose it is") from error
    differences = theirs.differences(identity)
    if differences:
        raise ArtifactError(
            "the saved cache belongs to another model, or to other tables",
            where=str(path),
            why=f"not the same: {', '.join(differences)}",
            do="Load it into the model it was saved from, optimised with the same artifact "
            "(kvquant_compile.artifact(model).save), or run the prompt again.",
        )


def _check_shapes(
    cache: QuantizedCache, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Whether the parts fit together, page ids above all: kernels follow them unchecked.

    Raises:
        KeyError, ValueError: they do not.
    """
    table, lengths, columns = tensors["table"], tensors["lengths"], header["columns"]
    batch, used = table.shape
    size = used * PAGE_TOKENS
    _expect("table", table, (batch, used), torch.int32)
    _expect("lengths", lengths, (batch,), torch.int32)
    _expect("positions", tensors["positions"], (batch, size), torch.int32)
    pages = 0 if table.numel() == 0 else int(table.max()) + 1
    holds = torch.arange(used) * PAGE_TOKENS < lengths[:, None]
    inside = not lengths.numel() or 0 <= int(lengths.min()) <= int(lengths.max()) <= size
    if not inside or bool(((table >= 0) != holds).any()) or bool((table < -1).any()):
        raise ValueError("lengths and page table differ")
    if type(columns) is not int or columns < 0 or bool((lengths > columns).any()):
        raise ValueError(f"{columns!r} columns")
    for index, layer in enumerate(cache.pages):
        layout = layer.layout
        if pages:
            shape = (pages, layout.heads, layout.page_bytes)
            _expect(f"pages.{index}", tensors[f"pages.{index}"], shape, torch.uint8)
            exact = (batch, layout.heads, layout.exact_rows, layout.exact_width)
            _expect(f"sinks.{index}", tensors[f"sinks.{index}"], exact, cache.dtype)
    for name in ("columns.stored", "columns.shown"):
        if name in tensors:
            _expect(name, tensors[name], (batch, columns), torch.bool)
    stored = tensors.get("columns.stored")
    counts = torch.full_like(lengths, columns) if stored is None else stored.sum(1)
    if not torch.equal(counts.to(torch.int32), lengths):
        raise ValueError("lengths and padding differ")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} instead of {dtype} {shape}"
        )


@torch.inference_mode(False)  # a later step may write outside inference mode
def _fill(cache: QuantizedCache, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    table = tensors["table"].clone()
    batch, pages = len(table), int(table.max()) + 1 if table.numel() else 0
    if not batch:
        return
    empty = table < 0
    count = pages + int(empty.sum())
    table[empty] = torch.arange(pages, count, dtype=torch.int32)
    for index, layer in enumerate(cache.pages):
        if count:
            slab = layer.new_slab(count, cache.device)
            slab[:pages].copy_(tensors[f"pages.{index}"])
            layer.slabs, layer.sinks = [slab], tensors[f"sinks.{index}"].to(cache.device)
    cache.paged.adopt(table, tensors["positions"], tensors["lengths"])
    cache.columns = header["columns"]
    masks = {n: tensors[f"columns.{n}"] for n in ("stored", "shown") if f"columns.{n}" in tensors}
    cache.masks.restore({name: tensor.to(cache.device) for name, tensor in masks.items()})
    _restore_states(cache, header["states"], tensors)


_INDEX, _KEPT = "index", "kept."


def _states(cache: QuantizedCache) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether tokens have gone into it) of recurrent states and indices."""
    if cache.states is not None:
        for name, tensor in kept_in(cache.states).items():
            yield _KEPT + name, tensor, True
    for index, indexed in enumerate(cache.indexed_layers()):
        if indexed.indexer_keys is not None:
            yield f"states.{index}.{_INDEX}.0", indexed.indexer_keys, True
    for index, layer in enumerate(cache.recurrent_layers()):
        for kind in ("conv", "recurrent"):
            for place, tensor in getattr(layer, f"{kind}_states").items():
                if tensor is not None:
                    begun = bool(layer.has_previous_state[place])
                    yield f"states.{index}.{kind}.{place}", tensor, begun


def _restore_states(
    cache: QuantizedCache, begun: Mapping[str, bool], tensors: Mapping[str, Tensor]
) -> None:
    layers: list[LinearAttentionLayer] = cache.recurrent_layers()
    for name in begun:
        if name.startswith(_KEPT):
            assert cache.states is not None
            kept_in(cache.states)[name.removeprefix(_KEPT)] = tensors[name].to(cache.device)
            continue
        _, index, kind, place = name.split(".")
        if kind == _INDEX:
            cache.indexed_layers()[int(index)].update_indexer(tensors[name].to(cache.device))
            continue
        layer, at, saved = layers[int(index)], int(place), tensors[name].to(cache.device)
        if kind == "conv":
            layer.lazy_initialization(conv_states=saved, state_idx=at)
        else:
            layer.lazy_initialization(recurrent_states=saved, state_idx=at)
        getattr(layer, f"{kind}_states")[at].copy_(saved)
        layer.has_previous_state[at] = begun[name]
