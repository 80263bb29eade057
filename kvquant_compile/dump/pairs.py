"""Decoder blocks before and after the rewrite, side by side; blocks of one shape are drawn once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvquant_compile.dump.blocks import Box, attending_blocks, picture
from kvquant_compile.dump.roles import Role
from kvquant_compile.dump.snapshot import GraphView
from kvquant_compile.dump.svg import arranged, drawing


@dataclass(frozen=True)
class Pair:
    """One kind of block.

    Attributes:
        title: which blocks, and which cache layers they read.
        before, after: drawings.
        widths: of both, so that a page can draw them at one scale.
    """

    title: str
    before: Markup
    after: Markup
    widths: tuple[int, int]


def pairs(
    before: GraphView, roles_before: Mapping[str, Role],
    after: GraphView, roles_after: Mapping[str, Role],
) -> list[Pair]:  # fmt: skip
    """Every kind of block of a model that attends to a cache."""
    kinds: dict[object, list[tuple[str, list[int], list[Box], list[Box]]]] = {}
    for block, layers in attending_blocks(before, roles_before).items():
        first, second = picture(before, roles_before, block), picture(after, roles_after, block)
        kinds.setdefault((_shape(first), _shape(second)), []).append((block, layers, first, second))
    return [_pair(members) for members in kinds.values()]


def _pair(members: Sequence[tuple[str, list[int], list[Box], list[Box]]]) -> Pair:
    block, _, first, second = members[0]
    title = " and ".join(dict.fromkeys([block or "the model", members[-1][0] or "the model"]))
    if len(members) > 2:
        title = f"{members[0][0]} to {members[-1][0]} ({len(members)} alike)"
    places = arranged(first)
    beside = arranged(second, places)
    return Pair(
        title,
        drawing(first, places, f"{block} before", link="before-"),
        drawing(second, beside, f"{block} after", link="after-"),
        (int(places.width), int(beside.width)),
    )


def _shape(boxes: Sequence[Box]) -> object:
    """The same for blocks that would look the same; what lies outside comes first."""
    order = sorted(boxes, key=lambda box: (not box.outside, _kind(box) if box.outside else ""))
    places = {box.key: place for place, box in enumerate(order)}
    return tuple((box.shape, tuple(places[key] for key in box.inputs)) for box in order)


def _kind(box: Box) -> str:
    return box.role.kind if box.role else ""
