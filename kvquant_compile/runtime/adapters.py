"""Adapters of an optimised model: whether they are still as the graph was captured with them.

PEFT's layers choose between their adapters, and fold them into the weights, by Python state, which
a captured graph does not see: switching, disabling or merging one afterwards would go unnoticed, or
count twice. Layers are known by the switches they have.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kvquant_compile.errors import OptionError

_SWITCHES = ("active_adapters", "merged_adapters", "disable_adapters")


class Adapters:
    """The state of a model's adapters at one time.

    Args:
        model: may have none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if all(hasattr(type(m), s) for s in _SWITCHES)]
        self._state = self._read()

    def _read(self) -> list[Any]:
        return [
            (*(str(getattr(layer, switch)) for switch in _SWITCHES),
             str(getattr(layer, "scaling", "")))
            for layer in self._layers
        ]  # fmt: skip

    def check(self) -> None:
        """Compare with the present.

        Raises:
            OptionError: an adapter was switched, disabled, merged or scaled since.
        """
        if self._layers and self._read() != self._state:
            raise OptionError(
                "the model's adapters have changed since it was optimised",
                why="its graph computes the adapters that were active then, beside the weights as"
                " they were",
                do="Set them back, or call kvquant_compile.restore(model), change them, and"
                " optimize again.",
            )
