"""A model's fingerprint: what a calibration artifact is bound to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

SAMPLES = 64
# What changes when the same model is loaded elsewhere or by another release.
_VOLATILE = (
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures",
)  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """Hex digest of the config, the parameters' names and shapes, and samples of every weight.

    Independent of device, and of dtype as long as the weights are representable in both.
    """
    digest = hashlib.sha256(json.dumps(_config(model), sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for part in _plain(parameter):
            flat = part.reshape(-1)
            if flat.numel():
                places = _places(flat.numel())
                digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain(parameter: nn.Parameter) -> list[torch.Tensor]:
    """The weight; what a quantised one stands for, or where it does not tell, is made of."""
    value: Any = parameter.detach()
    if type(value) is torch.Tensor or not hasattr(value, "dequantize"):
        return [value]
    try:
        return [value.dequantize()]
    except NotImplementedError:
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {"class": type(model).__qualname__}
    return _lasting(config.to_dict())


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Without what is volatile, in nested configs too."""
    kept = {k: v for k, v in config.items() if k not in _VOLATILE}
    return {k: _lasting(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _places(count: int) -> torch.Tensor:
    """At most ``SAMPLES`` indices below ``count``; float64, since float32 overshoots the end."""
    return torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).long()
