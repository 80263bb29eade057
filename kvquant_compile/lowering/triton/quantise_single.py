"""Generated error feedback of one token: a warp, channel ``32 j + lane`` in variable j of a lane.

The sixteen channels of a stage are half of one variable. Their errors, integers in eighths of a
table unit, reach all lanes as pairs in a word each, and two-way products of 16 by 8 bits add them
to the channels of later stages. All of the matrix that a lane needs is loaded before anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvquant_compile.codec.feedback import STAGE_CHANNELS
from kvquant_compile.lowering.triton.emit import Source

LANES = 32
PAIRS = STAGE_CHANNELS // 2


def later_variables(stage: int, variables: int) -> range:
    """Variables that hold channels of later stages."""
    return range((stage + 1) * STAGE_CHANNELS // LANES, variables)


def split_variables(out: Source, name: str, variables: int) -> None:
    """``name0 ..`` [32] from ``name`` [1, 32 * variables]; a lane keeps what it has."""
    if variables == 1:
        out(f"{name}0 = {name}.reshape([{LANES}])")
        return
    depth = variables.bit_length() - 1
    shape, axes = ", ".join(["2"] * depth), ", ".join(map(str, range(depth)))
    out(f"{name}_ = {name}.reshape([{shape}, {LANES}]).permute({depth}, {axes})")
    _split(out, f"{name}_", [f"{name}{j}" for j in range(variables)])


def split_last(out: Source, name: str, parts: Sequence[str]) -> None:
    """``parts`` [32] from ``name`` [32, parts], a power of two."""
    shape = ", ".join(["2"] * (len(parts).bit_length() - 1))
    out(f"{name}_ = {name}.reshape([{LANES}, {shape}])")
    _split(out, f"{name}_", parts)


def _split(out: Source, name: str, parts: Sequence[str]) -> None:
    """Take ``name`` [32, 2, ..., 2] apart, the last axis counting fastest."""
    if len(parts) == 1:
        out(f"{parts[0]} = {name}")
        return
    even, odd = f"{name}e", f"{name}o"
    out(f"{even}, {odd} = tl.split({name})")
    _split(out, even, parts[::2])
    _split(out, odd, parts[1::2])


def join_variables(out: Source, name: str, variables: int) -> None:
    """Inverse of :func:`split_variables`."""
    if variables == 1:
        out(f"{name} = {name}0.reshape([1, {LANES}])")
        return
    depth = variables.bit_length() - 1
    joined = _joined([f"{name}{j}" for j in range(variables)])
    axes = ", ".join(map(str, range(1, depth + 1)))
    out(f"{name} = {joined}.permute({axes}, 0).reshape([1, {LANES * variables}])")


def _joined(parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    return f"tl.join({_joined(parts[::2])}, {_joined(parts[1::2])})"


def load_feedback(out: Source, stages: int, variables: int) -> None:
    """``f{stage}_{variable}_{word}`` [32], four channels of the stage a word."""
    out(f"lane = tl.arange(0, {LANES})", "four = tl.arange(0, 4)[None, :]")
    out(f"feedback += head * {(stages - 1) * variables * LANES * 4} + lane[:, None] * 4 + four")
    for s in range(stages - 1):
        for j in later_variables(s, variables):
            out(f"f{s}_{j} = tl.load(feedback + {(s * variables + j) * LANES * 4})")


def feed_back(out: Source, stages: int, variables: int, index: Sequence[str], level: str) -> None:
    """``wanted`` [1, W]: ``x`` moved by the errors of earlier stages.

    Args:
        out: the source.
        stages: of the token.
        variables: of a lane.
        index: the slots' channels [1, 1], which pass no error on.
        level: expression of the nearest level of ``near``.
    """
    split_variables(out, "x", variables)
    out(f"lane = tl.arange(0, {LANES})")
    out(*(f"sum{j} = tl.zeros([{LANES}], tl.int32)" for j in range(variables)))
    out(*(f"{name}_lane = tl.reshape({name}, [1])" for name in index))
    for s in range(stages - 1):
        j, first = divmod(s * STAGE_CHANNELS, LANES)
        out(f"near = x{j} + sum{j}.to(tl.float32) * {1 / 512}")
        out(f"e = error_steps(near - {level})")
        out(*(f"e = tl.where(lane + {LANES * j} == {name}_lane, 0, e)" for name in index))
        out("e = (e & 0xFFFF) | (tl.gather(e, lane ^ 1, 0) << 16)")
        out(*(f"e{p} = from_lane(e, {first + 2 * p})" for p in range(PAIRS)))
        errors = ", ".join(f"e{p}" for p in range(PAIRS))
        for k in later_variables(s, variables):
            words = [f"f{s}_{k}_{w}" for w in range(4)]
            split_last(out, f"f{s}_{k}", words)
            out(f"sum{k} = dot_errors(sum{k}, {errors}, {', '.join(words)}, NATIVE)")
    out(*(f"wanted{j} = x{j} + sum{j}.to(tl.float32) * {1 / 512}" for j in range(variables)))
    join_variables(out, "wanted", variables)
