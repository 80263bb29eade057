"""Results in one JSON file, which a later run reads to go on where the last one stopped.

A result is an identity (all that its value depends on) and a value. The file is replaced as a
whole, so that an interruption leaves the last complete state.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvquant_compile.errors import OptionError

KIND, VERSION = "kvquant_compile results", 1


class Results:
    """Values by identity.

    Args:
        path: of the file; None keeps them in memory only.

    Raises:
        OptionError: the file is no results of this version.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._items: dict[str, dict[str, Any]] = {}
        self._held = False
        if self.path is not None and self.path.exists():
            for item in _read(self.path)["results"]:
                self._items[_key(item["identity"])] = item

    def get(self, identity: Mapping[str, Any]) -> Any:
        """The value of an identity, or None."""
        item = self._items.get(_key(identity))
        return None if item is None else item["value"]

    def put(self, identity: Mapping[str, Any], value: Any) -> None:
        """Add or replace a value, and write the file."""
        self._items[_key(identity)] = {"identity": dict(identity), "value": value}
        if not self._held:
            self._write()

    @contextlib.contextmanager
    def written_once(self) -> Iterator[None]:
        """Whatever is put inside is written once, at the end, also if that comes early."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._write()

    def _write(self) -> None:
        if self.path is not None:
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self.path)

    def to_dict(self) -> dict[str, Any]:
        """What the file holds; see :func:`schema`."""
        return {"kind": KIND, "version": VERSION, "results": list(self._items.values())}


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a results file."""
    text = (files("kvquant_compile") / "assets" / "results.schema.json").read_text("utf-8")
    return dict(json.loads(text))


def _key(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_results(path, str(error)) from error
    if not isinstance(found, dict) or (found.get("kind"), found.get("version")) != (KIND, VERSION):
        raise _no_results(path, f"it is not {KIND!r}, version {VERSION}")
    return found


def _no_results(path: Path, why: str) -> OptionError:
    return OptionError(
        f"cannot go on with the results in {path}",
        why=why,
        do="Name another file, or move this one away.",
    )
