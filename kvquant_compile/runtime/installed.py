"""The state of an optimised model, kept on the model itself."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.capture.captured import Captured
from kvquant_compile.errors import OptionError
from kvquant_compile.logs import logger
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.runtime.adapters import Adapters, unwrapped
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.chunks import PREFILL_CHUNK
from kvquant_compile.runtime.decode_graph import DecodeGraphs
from kvquant_compile.runtime.program import Program

ATTRIBUTE = "_kvquant"
_log = logger("runtime")


@dataclass(frozen=True, eq=False)
class Variant:
    """The model in one state of its adapters; attributes as of :class:`Installed`."""

    captured: Captured
    layers: tuple[MatchedLayer, ...]
    program: Program


@dataclass(eq=False)
class Installed:
    """What an optimised model carries; the only mutable state of the library.

    Attributes:
        program: the rewritten graph.
        captured: the captured original.
        layers: what the passes proved, node by node.
        artifact: formats and tables.
        report: what ``explain`` shows.
        attend_quantized: every query reads every token, its own included, from the packed
            cache, also where ``use_cache`` is off. Honest evaluation needs it.
        prefill_chunk: longer steps are run in parts of so many tokens; None: never.
        warned: reasons already warned about.
        quiet: no warnings, while the library itself runs the original.
        before: instance attributes that the installed ones replace (a hook's own forward).
        own_cache: the cache of a decoder that keeps its cache itself.
        adapters: the model's layers that have adapters.
        adapted: how the adapters stand in ``program``.
        variants: what it was in their other states.
        decode: runs the program's steps.
    """

    program: Program
    captured: Captured
    layers: tuple[MatchedLayer, ...]
    artifact: Artifact
    report: Any
    attend_quantized: bool = False
    prefill_chunk: int | None = PREFILL_CHUNK
    warned: set[str] = field(default_factory=set)
    quiet: bool = False
    before: dict[str, Any] = field(default_factory=dict)
    own_cache: QuantizedCache | None = None
    variants: dict[Hashable, Variant] = field(default_factory=dict)
    adapters: Adapters = field(init=False)
    adapted: Hashable = field(init=False)
    decode: DecodeGraphs = field(init=False)

    def __repr__(self) -> str:
        return f"Installed({self.program!r}, {self.artifact!r})"

    def __post_init__(self) -> None:
        self.adapters = Adapters(self.captured.model, self.captured.graph_module)
        self.adapted = self.adapters.state()
        self.decode = DecodeGraphs(self.program, self.warn_once)

    def become(self, variant: Variant, adapted: Hashable) -> None:
        """Run the model as it is in another state of its adapters."""
        self.captured, self.layers = variant.captured, variant.layers
        self.program, self.adapted = variant.program, adapted
        enabled = self.cuda_graphs
        self.decode = DecodeGraphs(self.program, self.warn_once)
        self.cuda_graphs = enabled

    def replaced(self) -> list[tuple[nn.Module, str]]:
        """The instance attributes that optimising the model sets."""
        of_model = "_prepare_cache_for_generation", "init_continuous_batching"
        captured = self.captured
        return [(captured.backbone, "forward"), *((captured.model, name) for name in of_model)]

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """The model's own behaviour inside the block."""
        ours = [(m, name, m.__dict__[name]) for m, name in self.replaced() if name in m.__dict__]
        for module, name, _ in ours:
            del module.__dict__[name]
            if name in self.before:
                module.__dict__[name] = self.before[name]
        try:
            yield
        finally:
            for module, name, value in ours:
                module.__dict__[name] = value

    @property
    def cuda_graphs(self) -> bool:
        """Whether decode steps run as CUDA graphs where they can; may be set at any time."""
        return self.decode.enabled

    @cuda_graphs.setter
    def cuda_graphs(self, value: bool) -> None:
        self.decode.enabled = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: the installed ``forward`` would go on running this very model.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            "an optimised model cannot be copied or pickled",
            why="its forward runs a graph that is bound to its own parameters",
            do="Call kvquant_compile.restore(model), copy it, and optimize both with the same "
            "artifact; save_pretrained and state_dict work as they are.",
        )

    def warn_once(self, reason: str) -> None:
        """One warning per reason and model."""
        if reason not in self.warned and not self.quiet:
            self.warned.add(reason)
            _log.info("warned: %s", reason)
            warnings.warn(f"kvquant_compile: {reason}", stacklevel=4)


def installed(model: nn.Module) -> Installed:
    """The state of an optimised model, or of the one that an adapters' wrapper holds.

    Raises:
        OptionError: the model is not optimised.
    """
    state = unwrapped(model).__dict__.get(ATTRIBUTE)
    if state is None:
        raise OptionError(
            f"{type(model).__name__} is not optimised",
            why="kvquant_compile.optimize was not called on it, or restore was",
            do="Call kvquant_compile.optimize(model) first.",
        )
    return state
