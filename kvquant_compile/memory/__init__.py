"""What an optimised model takes, as formulas in context and batch; and what fits into a memory."""

from kvquant_compile.memory.formulas import BATCH, CONTEXT, LayerMemory
from kvquant_compile.memory.report import MemoryReport, max_context, memory_report
from kvquant_compile.memory.units import parse_bytes

__all__ = [
    "BATCH",
    "CONTEXT",
    "LayerMemory",
    "MemoryReport",
    "max_context",
    "memory_report",
    "parse_bytes",
]
