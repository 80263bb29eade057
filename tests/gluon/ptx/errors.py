"""What can be wrong with a kernel."""

from __future__ import annotations


class PtxError(Exception):
    """Something about a kernel; the machine adds where it happened."""


class UnknownInstruction(PtxError):
    """An opcode, operand or directive that the interpreter does not know."""


class BadAccess(PtxError):
    """An address outside every allocation, or not a multiple of the access's size."""


class Hazard(PtxError):
    """An access whose result depends on timing."""


class Divergence(PtxError):
    """An instruction of a whole warp that only some of its lanes reach."""
