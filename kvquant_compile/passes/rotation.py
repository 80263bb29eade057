"""From symbolic outputs to a proved rotation: every channel is ``a*x_i`` or ``a*x_i + b*x_j``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
from sympy import Expr

from kvquant_compile.passes.symbols import NotInterpretable
from kvquant_compile.plan import Pairs


@dataclass(frozen=True)
class Wave:
    """A coefficient ``amplitude * cos|sin(frequency * p)``, or a number (kind ``one``)."""

    kind: str
    amplitude: float
    frequency: float = 0.0

    def at(self, position: float) -> float:
        """Its value in float64."""
        angle = self.frequency * position
        factor = {"one": 1.0, "cos": math.cos(angle), "sin": math.sin(angle)}[self.kind]
        return self.amplitude * factor


Row = dict[int, Wave]


@dataclass(frozen=True)
class Rotation:
    """What the proof yields; frequencies are still products of the graph's float constants."""

    in_pairs: Pairs
    out_pairs: Pairs
    frequencies: tuple[float, ...]
    passthrough: Pairs
    scale: float
    rows: tuple[Row, ...]


def parse_rows(outputs: list[Expr], channels: list[Expr], position: Expr) -> list[Row]:
    """Read each output channel as a linear form in the input channels.

    Raises:
        NotInterpretable: a channel is not linear, or a coefficient is no single wave.
    """
    index = {symbol: i for i, symbol in enumerate(channels)}
    rows = []
    for c, output in enumerate(outputs):
        sums: dict[int, Expr] = {}
        for term in sympy.Add.make_args(sympy.expand(output)):
            factors = sympy.Mul.make_args(term)
            inputs = [f for f in factors if f in index]
            rest = sympy.Mul(*[f for f in factors if f not in index])
            if len(inputs) != 1 or not rest.free_symbols <= {position}:
                raise NotInterpretable(f"channel {c} is not linear in the head vector: {term}")
            i = index[inputs[0]]
            sums[i] = sums.get(i, sympy.S.Zero) + rest
        rows.append({i: _wave(value, position) for i, value in sums.items() if value != 0})
    return rows


def _wave(value: Expr, position: Expr) -> Wave:
    amplitude, rest = value.as_coeff_Mul()
    if rest == 1:
        return Wave("one", float(amplitude))
    if rest.func in (sympy.cos, sympy.sin):
        frequency, variable = rest.args[0].as_coeff_Mul()
        if variable == position:
            kind = "cos" if rest.func is sympy.cos else "sin"
            return Wave(kind, float(amplitude), float(frequency))
    raise NotInterpretable(f"the coefficient {value} is no cos or sin of a multiple of p")


def rotation_of(rows: list[Row]) -> Rotation:
    """Pair the channels and check that each pair turns by one angle, with one common scale.

    Raises:
        NotInterpretable: the rows are not a rotation; the text names the first bad channel.
    """
    passthrough, turning = [], {}
    for c, row in enumerate(rows):
        waves = list(row.values())
        if len(waves) == 1 and waves[0] == Wave("one", 1.0):
            passthrough.append((next(iter(row)), c))
        else:
            turning[c] = _turn(c, row)
    pairs = [_pair(c, turn, turning) for c, turn in turning.items() if turn.sine_amplitude < 0]
    pairs.sort(key=lambda pair: min(pair.outputs))
    _check_cover(rows, pairs, passthrough)
    scale = pairs[0].scale if pairs else 1.0
    if any(not math.isclose(pair.scale, scale, rel_tol=1e-12) for pair in pairs):
        raise NotInterpretable("channel pairs are scaled differently")
    return Rotation(
        tuple(pair.inputs for pair in pairs),
        tuple(pair.outputs for pair in pairs),
        tuple(pair.frequency for pair in pairs),
        tuple(passthrough),
        scale,
        tuple(rows),
    )


@dataclass(frozen=True)
class _Turn:
    """One row of a rotation: amplitude*cos(f p)*x[along] + sine_amplitude*sin(f p)*x[across]."""

    along: int
    across: int
    amplitude: float
    sine_amplitude: float
    frequency: float


def _turn(channel: int, row: Row) -> _Turn:
    kinds = {wave.kind: (i, wave) for i, wave in row.items()}
    if len(row) != 2 or set(kinds) != {"cos", "sin"}:
        raise NotInterpretable(f"channel {channel} is not cos * one channel + sin * another")
    (along, cosine), (across, sine) = kinds["cos"], kinds["sin"]
    if cosine.frequency != sine.frequency:
        raise NotInterpretable(f"channel {channel} takes cos and sin of different angles")
    if not math.isclose(cosine.amplitude, abs(sine.amplitude), rel_tol=1e-12):
        raise NotInterpretable(f"channel {channel} scales cos and sin differently")
    if cosine.amplitude <= 0 or cosine.frequency <= 0:
        raise NotInterpretable(f"channel {channel} is reflected")
    return _Turn(along, across, cosine.amplitude, sine.amplitude, cosine.frequency)


@dataclass(frozen=True)
class _Pair:
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    frequency: float
    scale: float


def _pair(channel: int, first: _Turn, turning: dict[int, _Turn]) -> _Pair:
    """The pair whose first output (the row with -sin) is ``channel``."""
    for other, second in turning.items():
        crossed = (second.along, second.across) == (first.across, first.along)
        if crossed and second.sine_amplitude > 0:
            same = (second.frequency, second.amplitude) == (first.frequency, first.amplitude)
            if not same:
                raise NotInterpretable(f"channels {channel} and {other} turn by different angles")
            inputs = (first.along, first.across)
            return _Pair(inputs, (channel, other), first.frequency, first.amplitude)
    raise NotInterpretable(f"channel {channel} has no partner that turns with it")


def _check_cover(rows: list[Row], pairs: list[_Pair], passthrough: list[tuple[int, int]]) -> None:
    every = list(range(len(rows)))
    inputs = [i for pair in pairs for i in pair.inputs] + [i for i, _ in passthrough]
    outputs = [o for pair in pairs for o in pair.outputs] + [o for _, o in passthrough]
    if sorted(inputs) != every or sorted(outputs) != every:
        raise NotInterpretable("some channel is used twice, or lost")
