"""The exact float32 frequencies: what the graph multiplies positions by, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.passes.symbolic import Interpreter
from kvquant_compile.passes.symbols import NotInterpretable

POSITIONS = (1, 2, 3, 17, 1000, 65537, 100_003)
# Relative error of an angle beyond which the product is not float32 position * frequency.
ANGLE_TOLERANCE = 1e-6


class AngleReader:
    """Reads frequencies off a captured graph's angle nodes; each node is evaluated once.

    Args:
        captured: the graph.
        interpreter: has interpreted the rotations whose frequencies are asked for.
    """

    def __init__(self, captured: Captured, interpreter: Interpreter) -> None:
        self.captured, self.interpreter = captured, interpreter
        self._read: set[fx.Node] = set()
        self._exact: dict[float, tuple[float, float]] = {}

    def exact(self, wanted: Sequence[float]) -> tuple[tuple[float, ...], float]:
        """The float32 values that reproduce the graph's angles, for symbolic frequencies.

        Returns:
            The frequencies in the order of ``wanted``, and the largest relative error of
            ``float32(p) * float32(f)`` against the graph's own angle over :data:`POSITIONS`.

        Raises:
            NotInterpretable: the graph's angles are not float32 products to a few ulp.
        """
        for node, symbolic in self.interpreter.angles.items():
            if node not in self._read:
                self._read_node(node, symbolic.index)
        if self.interpreter.lookups.columns:
            for frequency in wanted:
                self._exact.setdefault(frequency, (float(np.float32(frequency)), 0.0))
        if any(frequency not in self._exact for frequency in wanted):
            raise NotInterpretable("an angle of the rotation is computed nowhere in the graph")
        found = [self._exact[frequency] for frequency in wanted]
        worst = max((error for _, error in found), default=0.0)
        if worst > ANGLE_TOLERANCE:
            raise NotInterpretable(f"angles are no float32 products: relative error {worst:.1e}")
        return tuple(value for value, _ in found), worst

    def _read_node(self, node: fx.Node, index: Tensor) -> None:
        self._read.add(node)
        places = _elements(self.interpreter, index)
        measured = [_angles(self.captured, node, p) for p in POSITIONS]
        for frequency, place in places.items():
            series = np.array([angles[place] for angles in measured], dtype=np.float64)
            self._exact.setdefault(frequency, _best_float32(frequency, series))


def _elements(interpreter: Interpreter, index: Tensor) -> dict[float, int]:
    """frequency -> flat place, of the angles that are a multiple of the position."""
    found: dict[float, int] = {}
    for place, entry in enumerate(index.reshape(-1).tolist()):
        factor, rest = interpreter.pool.scalars[entry][0].as_coeff_Mul()
        if rest == interpreter.lookups.position:
            found.setdefault(abs(float(factor)), place)
    return found


def _angles(captured: Captured, node: fx.Node, position: int) -> np.ndarray:
    values = input_values(captured.graph_module, position, 1, 1)
    with torch.no_grad():
        angle = Evaluator(captured.graph_module, values)(node)
    return np.abs(angle.detach().double().cpu().reshape(-1).numpy())


def _best_float32(frequency: float, series: np.ndarray) -> tuple[float, float]:
    """The float32 whose products are nearest to the measured angles, and their error."""
    positions = np.array(POSITIONS, dtype=np.float32)
    results = []
    for candidate in {np.float32(frequency), np.float32(series[0])}:
        products = (positions * candidate).astype(np.float64)
        error = np.abs(products - series) / np.maximum(np.abs(series), 1e-30)
        results.append((float(error.max()), float(candidate)))
    error, best = min(results)
    return best, error
