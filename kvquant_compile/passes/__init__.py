"""Passes over a captured graph: recognise and prove, then rewrite."""

from __future__ import annotations

from kvquant_compile.passes.recognise import MatchedLayer, recognise
from kvquant_compile.passes.rope_numeric import apply_rope

__all__ = ["MatchedLayer", "apply_rope", "recognise"]
