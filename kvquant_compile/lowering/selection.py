"""Sparse attention: from the columns that every query has chosen to slots of the cache."""

from __future__ import annotations

from torch import Tensor

from kvquant_compile.capture.reference import chosen_keys


def selected_slots(selected: Tensor, columns: Tensor) -> Tensor:
    """Which slots every query may attend to.

    Args:
        selected: columns of the keys that a query has chosen, int [B, S, n], negative for none; or
            bool [B, 1, S, columns].
        columns: int64 [B, N], the column of every slot; one beyond the last where there is none.

    Returns:
        bool [B, S, N].
    """
    # One column more than there are, which nobody has chosen: that of the empty slots.
    chosen = chosen_keys(selected, int(columns.max()) + 1)
    return chosen.gather(2, columns[:, None].expand(-1, chosen.shape[1], -1))
