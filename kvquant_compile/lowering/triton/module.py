"""From generated source to a launchable kernel that tracebacks and ``inspect`` can read."""

from __future__ import annotations

import functools
import hashlib
import linecache
import types
from typing import Any

from kvquant_compile.logs import logger
from kvquant_compile.lowering.triton.history import history_source
from kvquant_compile.lowering.triton.spec import KernelSpec

_log = logger("lowering")


@functools.lru_cache(maxsize=512)
def history_kernel(spec: KernelSpec) -> Any:
    """The jitted kernel of a spec, compiled by Triton at its first launch."""
    return load(history_source(spec), spec.name)


def load(source: str, name: str) -> Any:
    """Execute a module's source and return its function ``name``.

    The source is entered into ``linecache`` under a name made of its own hash.
    """
    _log.info("generated %s, %d lines", name, source.count("\n"))
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    path = f"<kvquant_compile {name} {digest}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module = types.ModuleType(f"kvquant_compile.generated.{name}_{digest}")
    module.__file__ = path
    exec(compile(source, path, "exec"), module.__dict__)
    return getattr(module, name)
