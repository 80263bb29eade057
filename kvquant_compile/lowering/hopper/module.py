"""From generated Gluon source to a launchable kernel."""

from __future__ import annotations

import functools
from typing import Any

from kvquant_compile.lowering.hopper.history import hopper_source
from kvquant_compile.lowering.hopper.spec import HopperSpec
from kvquant_compile.lowering.triton.module import load


@functools.lru_cache(maxsize=512)
def hopper_kernel(spec: HopperSpec) -> Any:
    """The jitted kernel of a spec, compiled at its first launch."""
    return load(hopper_source(spec), spec.name)
