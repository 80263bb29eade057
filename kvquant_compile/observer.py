"""What someone who watches ``optimize`` is told, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from kvquant_compile.calib.artifact import Artifact
    from kvquant_compile.calib.observe import Observed
    from kvquant_compile.capture.captured import Captured
    from kvquant_compile.passes.recognise import MatchedLayer
    from kvquant_compile.runtime.installed import Installed


class Observer:
    """Ignores everything; subclass it and override what is of interest.

    Graphs and tensors are the compiler's own and change afterwards: an observer reads, and copies
    what it wants to keep.
    """

    def graph(self, stage: str, gm: fx.GraphModule) -> None:
        """A pass has left this graph behind; ``stage`` is what it did, in one or two words."""

    def matched(self, captured: Captured, layers: Sequence[MatchedLayer]) -> None:
        """The layers as their format stores them, in graph order."""

    def calibrated(
        self,
        layers: Sequence[MatchedLayer],
        observed: Mapping[int, Observed],
        artifact: Artifact,
    ) -> None:
        """Tables were fitted to what was observed (by cache index; nothing where no format
        needs calibration)."""

    def finished(self, state: Installed) -> None:
        """The model is optimised."""

    def watching(self) -> AbstractContextManager[object]:
        """Entered before the first stage; an exception that ends ``optimize`` leaves through it."""
        return nullcontext()


SILENT = Observer()
