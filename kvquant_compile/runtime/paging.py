"""Which page every sequence writes to where sequences share pages: pure functions on the host.

A block table says which page holds which 64 tokens of which sequence. Pages of tokens that are
there are only read and may be named by many cells of the table; the cells that a sequence may
still write to each need a page of their own (copy-on-write).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.spec import PAGE_TOKENS


@dataclass(frozen=True, eq=False)
class Separation:
    """A block table in which every cell that may be written to has a page of its own.

    Attributes:
        table: int32 [B, n].
        sources, targets: int64 [m], pages to copy, and where to.
        cleared: int64 [r], pages that held other tokens before and are to be zeroed.
        missing: how many pages have to be added; their ids follow those there are.
    """

    table: Tensor
    sources: Tensor
    targets: Tensor
    cleared: Tensor
    missing: int


def separate(table: Tensor, first: Tensor, lengths: Tensor, owned: Tensor) -> Separation:
    """Give every cell that may be written to a page of its own.

    A cell keeps its page where nothing else reads or writes it. Others get pages that are in no
    cell, then new ones; what a page holds is copied where there are tokens in it.

    Args:
        table: int32 [B, n] page ids; -1 for cells without a page, from column ``first`` on only.
        first: int [B], first column that a sequence may write to; rises with its length.
        lengths: int [B], tokens of the sequences.
        owned: bool [pages], which pages may be written at all.
    """
    count, ids = owned.numel(), table.long()
    columns = torch.arange(table.shape[1])
    written = columns >= first[:, None]
    read = torch.zeros(count, dtype=torch.bool)
    read[ids[~written]] = True
    usable = owned & ~read
    keeps = _first_of_each(ids, written & (ids >= 0)) & usable[ids.clamp(min=0)]
    usable[ids[keeps]] = False
    needs = written & ~keeps
    free = usable.nonzero().flatten()[: int(needs.sum())]
    missing = int(needs.sum()) - free.numel()
    given = torch.cat([free, torch.arange(count, count + missing)])
    copied = (needs & (ids >= 0) & (columns * PAGE_TOKENS < lengths[:, None]))[needs]
    separated = table.clone()
    separated[needs] = given.to(torch.int32)
    cleared = given[~copied & (given < count)]
    return Separation(separated, ids[needs][copied], given[copied], cleared, missing)


def _first_of_each(ids: Tensor, among: Tensor) -> Tensor:
    """For each id in the cells ``among``, the first of these: bool, like ``ids``."""
    flat, places = ids[among], torch.arange(ids.numel()).view_as(ids)[among]
    first = torch.full((int(flat.max()) + 1 if flat.numel() else 0,), ids.numel())
    first.scatter_reduce_(0, flat, places, "amin")
    out = torch.zeros_like(among)
    out[among] = first[flat] == places
    return out


def copy_pages(slabs: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy pages by id, int64 [m] on the host each; none is both read and written."""
    for (source, from_places), (target, to_places) in _pairs(slabs, sources, targets):
        source_pages = slabs[source].index_select(0, from_places.to(slabs[source].device))
        slabs[target].index_copy_(0, to_places.to(slabs[target].device), source_pages)


def clear_pages(slabs: Sequence[Tensor], ids: Tensor) -> None:
    """Zero pages by id, int64 [m] on the host."""
    slab_of, places = _places(slabs, ids)
    for index in slab_of.unique().tolist():
        mine = places[slab_of == index].to(slabs[index].device)
        slabs[index].index_fill_(0, mine, 0)


def _pairs(
    slabs: Sequence[Tensor], sources: Tensor, targets: Tensor
) -> Iterator[tuple[tuple[int, Tensor], tuple[int, Tensor]]]:
    """((slab, places in it), (slab, places in it)), from and to."""
    from_slab, from_places = _places(slabs, sources)
    to_slab, to_places = _places(slabs, targets)
    for source, target in torch.stack([from_slab, to_slab], 1).unique(dim=0).tolist():
        mine = (from_slab == source) & (to_slab == target)
        yield (source, from_places[mine]), (target, to_places[mine])


def _places(slabs: Sequence[Tensor], ids: Tensor) -> tuple[Tensor, Tensor]:
    """The slab of every page, and its place in it."""
    starts = torch.tensor([0, *(len(slab) for slab in slabs)]).cumsum(0)
    slab = torch.bucketize(ids, starts, right=True) - 1
    return slab, ids - starts[slab]
