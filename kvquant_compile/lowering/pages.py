"""Reading and writing pages that lie in several slabs.

A page id counts through the slabs in order, so that a cache grows by adding a slab and never
moves a page.
"""

from __future__ import annotations

from torch import Tensor


def gather_pages(slabs: list[Tensor], ids: Tensor) -> Tensor:
    """Pages by id.

    Args:
        slabs: uint8 [pages, H, bytes] each.
        ids: int64 [B, n].

    Returns:
        uint8 [B, H, n, bytes].
    """
    flat = ids.flatten()
    if len(slabs) == 1:
        out = slabs[0].index_select(0, flat)
    else:
        out = slabs[0].new_empty(flat.numel(), *slabs[0].shape[1:])
        for slab, mine, local in slabs_in_use(slabs, flat):
            out[mine] = slab.index_select(0, local)
    return out.unflatten(0, ids.shape).transpose(1, 2)


def write_pages(slabs: list[Tensor], ids: Tensor, data: Tensor) -> None:
    """Overwrite pages: ids int64 [n], data uint8 [n, H, bytes]."""
    for slab, mine, local in slabs_in_use(slabs, ids):
        slab.index_copy_(0, local, data[mine])


def slabs_in_use(slabs: list[Tensor], ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(slab, mask of the ids that lie in it, their places in it) for every slab in use.

    ``ids`` int64 [n] count through the slabs; masks are bool [n], places int64 [m].
    """
    out, start = [], 0
    for slab in slabs:
        mine = (ids >= start) & (ids < start + slab.shape[0])
        local = ids[mine] - start
        if local.numel():
            out.append((slab, mine, local))
        start += slab.shape[0]
    return out
