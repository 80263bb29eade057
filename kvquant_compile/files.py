"""Tensors and a JSON header in one safetensors file, with a version and a checksum.

Reading runs nothing that the file brings, and what comes back is what was written, or an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvquant_compile.errors import KVQuantError


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: noun for messages ("artifact").
        kind, version: as stored; another of either is refused.
        error: raised for files that cannot be used.
        redo: what the user can do about one.
    """

    name: str
    kind: str
    version: str
    error: type[KVQuantError]
    redo: str

    def write(
        self, path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Write one file; ``header`` is JSON-able. A file that was there stays until the new one
        is complete.

        Raises:
            KVQuantError: of class ``error``, where the file cannot be written.
        """
        text = json.dumps(header, sort_keys=True)
        metadata = {"kind": self.kind, "version": self.version, "header": text}
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata["checksum"] = checksum(text, stored)
        target = Path(path)
        try:
            with tempfile.TemporaryDirectory(
                dir=target.parent, prefix=f".{target.name}."
            ) as folder:
                partial = Path(folder) / target.name
                save_file(stored, partial, metadata=metadata)
                os.replace(partial, target)
        except (OSError, safetensors.SafetensorError) as error:
            raise self.error(
                f"cannot write the {self.name}",
                where=str(path),
                why=str(error),
                do="Pass the path of a file in a folder that exists and can be written to.",
            ) from error

    def read(self, path: str | Path) -> tuple[Any, dict[str, Tensor]]:
        """(header, tensors) as :meth:`write` was given them, tensors on the CPU.

        Raises:
            KVQuantError: of class ``error``: no such file, another kind or version, or damaged.
        """
        metadata, tensors = self._content(path)
        if metadata.get("kind") != self.kind or metadata.get("version") != self.version:
            raise self.error(
                f"the file is no {self.name} that can be used",
                where=str(path),
                why=f"it is {metadata.get('kind', 'no file of this library')!r}, version "
                f"{metadata.get('version')}; {self.kind!r}, version {self.version} is needed",
                do=self.redo,
            )
        text = metadata.get("header", "")
        if metadata.get("checksum") != checksum(text, tensors):
            raise self.damaged(path, "its checksum does not match its content")
        try:
            return json.loads(text), tensors
        except ValueError as error:
            raise self.damaged(path, "its header is no JSON") from error

    def damaged(self, path: str | Path, why: str) -> KVQuantError:
        """The error for a file whose content cannot be right."""
        return self.error(f"the {self.name} is damaged", where=str(path), why=why, do=self.redo)

    def _content(self, path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
        except FileNotFoundError as error:
            raise self.error(
                f"no such {self.name}", where=str(path), why="the file does not exist", do=self.redo
            ) from error
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise self.damaged(path, f"it cannot be read ({error})") from error


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
