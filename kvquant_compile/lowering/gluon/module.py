"""From generated Gluon source to a launchable kernel."""

from __future__ import annotations

import functools
from typing import Any

from kvquant_compile.lowering.gluon.history import gluon_source
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.triton.module import load


@functools.lru_cache(maxsize=512)
def gluon_kernel(spec: GluonSpec) -> Any:
    """The jitted kernel of a spec, compiled at its first launch."""
    return load(gluon_source(spec), spec.name)
