"""An optimised model as a folder: the original model, and beside it what optimising found.

The folder is what transformers writes, so that everything which knows nothing of this library
loads the original model from it. Three things are added: the tables (one safetensors file), a JSON
file that says how to use them, and a section of the model card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from kvquant_compile.api import optimize
from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.card import write_card
from kvquant_compile.errors import ArtifactError, OptionError
from kvquant_compile.runtime.installed import Installed, installed

TABLES, CONFIG = "kvquant_tables.safetensors", "kvquant_config.json"
VERSION = 1
_REDO = "Save the model anew with kvquant_compile.save_pretrained."
_OPTIONS = ("attend_quantized", "cuda_graphs", "prefill_chunk")


def save_pretrained(
    model: nn.Module, folder: str | Path, *, tokenizer: Any = None, **kwargs: Any
) -> None:
    """Write an optimised model to a folder that :func:`from_pretrained` loads, ready to be pushed
    to a hub.

    Args:
        model: an optimised transformers model.
        folder: made where it is not there. A README.md that is there keeps its text.
        tokenizer: saved too where it is given.
        kwargs: of the model's own ``save_pretrained``.

    Raises:
        OptionError: the model is not optimised, or no transformers model.
        ArtifactError: a file cannot be written.
    """
    state = installed(model)
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise OptionError(
            f"a {type(model).__name__} cannot be saved with save_pretrained",
            why="it is no transformers model",
            do="Save its state dict, and kvquant_compile.artifact(model).save(path) beside it.",
        )
    target = Path(folder)
    save(target, **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    state.artifact.save(target / TABLES)
    (target / CONFIG).write_text(json.dumps(_config(state), indent=2) + "\n")
    write_card(target / "README.md", state.report)


def from_pretrained(name: str | Path, **kwargs: Any) -> Any:
    """Load what :func:`save_pretrained` wrote and optimise it with its own tables.

    Nothing is calibrated. The model is captured and validated as always.

    Args:
        name: folder, or hub id.
        kwargs: of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The optimised model, in evaluation mode.

    Raises:
        ArtifactError: there are no tables, or damaged ones, or those of another model.
        KVQuantError: the model cannot be optimised.
    """
    from transformers import AutoModelForCausalLM

    config = _read_config(name, kwargs)
    tables = Artifact.load(_file(name, TABLES, kwargs))
    model = AutoModelForCausalLM.from_pretrained(name, **kwargs).eval()
    options = {key: config["options"][key] for key in _OPTIONS}
    return optimize(model, calibration=tables, strict=False, **options)


def _config(state: Installed) -> dict[str, Any]:
    from kvquant_compile import __version__

    return {
        "version": VERSION,
        "library": {"name": "kvquant-compile", "version": __version__},
        "tables": TABLES,
        "options": {name: getattr(state, name) for name in _OPTIONS},
        "effective_bits": round(state.report.effective_bits, 4),
        "bytes_per_token": state.report.bytes_per_token,
    }


def _read_config(name: str | Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    path = _file(name, CONFIG, kwargs)
    try:
        config = json.loads(Path(path).read_text())
        known = config["version"] == VERSION
        complete = config["tables"] == TABLES and set(_OPTIONS) <= set(config["options"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            "the configuration is damaged", where=path, why=str(error), do=_REDO
        ) from error
    if not known or not complete:
        raise ArtifactError(
            "the configuration cannot be used",
            where=path,
            why=f"it is of version {config['version']}; version {VERSION} is needed, with the "
            f"file {TABLES} and the options {', '.join(_OPTIONS)}",
            do=_REDO,
        )
    return config


def _file(name: str | Path, file: str, kwargs: dict[str, Any]) -> str:
    """Path of a file of a folder or of a hub's repository."""
    from transformers.utils.hub import cached_file

    known = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
    given = {key: kwargs[key] for key in known if key in kwargs}
    try:
        path = cached_file(str(name), file, **given)
    except OSError as error:
        raise ArtifactError(
            f"no {file}",
            where=str(name),
            why=str(error).splitlines()[0],
            do="Pass a folder or hub id that kvquant_compile.save_pretrained wrote; load others "
            "with transformers and call kvquant_compile.optimize.",
        ) from error
    assert path is not None, "cached_file raises where there is no file"
    return path
