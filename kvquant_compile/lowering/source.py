"""The generated source of a layer's kernels, for people to read."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.codec.formats import Layout
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.lowering.attend import Site
from kvquant_compile.lowering.cpp import dispatch as cpp
from kvquant_compile.lowering.triton.compat import interpreting, unavailable
from kvquant_compile.lowering.triton.dispatch import use_gluon
from kvquant_compile.lowering.triton.spec import unsupported


def kernels_source(
    layout: PageLayout, tables: list[Tensor], geometry: list[Tensor], site: Site, columns: int
) -> dict[str, str]:
    """Source of every kernel that is generated for one attention site.

    These are the kernels that ``kvquant::attend`` launches on the constants' device; for constants
    on a CPU that runs none, those of any GPU. What is the same for every layer (the merge
    of partial sums) is ordinary code in :mod:`kvquant_compile.lowering.triton`.

    Args:
        layout: of the layer's pages, one that kernels are generated for.
        tables, geometry: the layer's constants as the ops take them.
        site: what the attention does to scores.
        columns: query columns of a kv head: query heads of the group times tokens of the step.

    Returns:
        Kernel name -> text.
    """
    device = tables[0].device
    write = _gluon if use_gluon(layout, device) else _portable
    if _is_compiled(layout, device):
        write = _cpp
    name, text = write(layout, tables, geometry, site, columns)
    return {name: text}


def no_source(layout: Layout, device: torch.device) -> str:
    """Why no kernel is generated for a layout; empty where one is."""
    return "" if _is_compiled(layout, device) else unsupported(layout) or unavailable()


def language(source: str) -> str:
    """``cpp`` or ``python``."""
    return "cpp" if source.startswith("//") else "python"


def _is_compiled(layout: Layout, device: torch.device) -> bool:
    return device.type == "cpu" and not interpreting() and not cpp.refusal(layout)


def _cpp(
    layout: PageLayout, tables: list[Tensor], geometry: list[Tensor], site: Site, columns: int
) -> tuple[str, str]:
    from kvquant_compile.lowering.cpp.constants import cpp_constants
    from kvquant_compile.lowering.cpp.launch import kernel_spec
    from kvquant_compile.lowering.cpp.source import kernel_source

    spec = kernel_spec(layout, cpp_constants(layout, tables, geometry))
    return spec.name, kernel_source(spec)


def _gluon(
    layout: PageLayout, tables: list[Tensor], geometry: list[Tensor], site: Site, columns: int
) -> tuple[str, str]:
    from kvquant_compile.lowering.gluon.constants import gluon_constants
    from kvquant_compile.lowering.gluon.history import gluon_source
    from kvquant_compile.lowering.gluon.launch import bulk_copies, gluon_spec

    constants = gluon_constants(layout, tables, geometry, columns)
    bulk = bulk_copies(tables[0].device)
    spec = gluon_spec(layout, constants, site, columns, bulk=bulk)
    return spec.name, gluon_source(spec)


def _portable(
    layout: PageLayout, tables: list[Tensor], geometry: list[Tensor], site: Site, columns: int
) -> tuple[str, str]:
    from kvquant_compile.lowering.triton.attend import kernel_spec
    from kvquant_compile.lowering.triton.history import history_source
    from kvquant_compile.lowering.triton.prepared import prepared

    spec = kernel_spec(layout, prepared(layout, tables, geometry), site, columns)
    return spec.name, history_source(spec)
