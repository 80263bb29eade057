"""Refusing blocks that make no sense, when they are made."""

from __future__ import annotations

from kvquant_compile.errors import OptionError


def check(condition: bool, what: str, why: str) -> None:
    """Raise unless ``condition``.

    Raises:
        OptionError: ``what`` cannot be honoured because ``why``.
    """
    if not condition:
        raise OptionError(what, why=why, do="Change the block's options.")
