"""Every exception of the library: what happened, where, why, and what to do about it."""

from __future__ import annotations


class KVQuantError(Exception):
    """Base class. The message names what failed, where, why, and the remedy.

    Args:
        what: the thing that cannot be done, one clause.
        why: the reason, one clause.
        do: what the user can do about it.
        where: layer, node, file or option concerned (optional).
    """

    def __init__(self, what: str, *, why: str, do: str, where: str = "") -> None:
        self.what, self.why, self.do, self.where = what, why, do, where
        place = f" [{where}]" if where else ""
        super().__init__(f"{what}{place}: {why}. {do}")


class OptionError(KVQuantError, ValueError):
    """An option has a value that cannot be honoured."""


class UnsupportedModelError(KVQuantError):
    """The model cannot be captured, or is no decoder with a key-value cache."""


class UnsupportedLayerError(KVQuantError):
    """An attention or append site was found but cannot be rewritten soundly."""


class CalibrationError(KVQuantError):
    """Calibration data is missing, empty or unusable."""


class ArtifactError(KVQuantError):
    """A saved artifact or cache is damaged, of another version, or belongs to another model."""


class CacheError(KVQuantError):
    """A cache is used in a way that its contract does not allow."""


class ValidationError(KVQuantError):
    """The rewritten model does not reproduce the original in lossless mode."""


class MissingDependencyError(KVQuantError, ImportError):
    """An optional dependency is not installed."""
