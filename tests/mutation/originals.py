"""The rotary code that is mutated, each with the smallest model that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from tests import decoders, zoo


@dataclass(frozen=True)
class Original:
    """Functions of one model.

    Attributes:
        name: for reports.
        build: makes the model; a decoder's class where it is hand-written.
        functions: (module or class, names of its functions) whose source is mutated.
        handwritten: whether it is of the functional convention.
        about: names that a statement must mention to be edited; any statement if empty.
    """

    name: str
    build: Callable[[], nn.Module]
    functions: tuple[tuple[Any, tuple[str, ...]], ...]
    handwritten: bool = False
    about: tuple[str, ...] = ()


def _transformers(model_type: str, rotary: str, *names: str, **settings: Any) -> Original:
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    functions: tuple[tuple[Any, tuple[str, ...]], ...] = ((module, names),)
    if rotary:
        functions += ((getattr(module, rotary), ("forward",)),)

    def build() -> nn.Module:
        return zoo.tiny(model_type, num_hidden_layers=1, hidden_size=32, **settings)

    return Original(model_type, build, functions)


class KeyNorm(nn.Module):
    """A norm with weights, behind the rotation of keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As Hunyuan's own."""
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-05)
        return self.weight * x.to(dtype)


def _normed() -> Original:
    """Hunyuan, with a norm that only its keys have, so that nothing else is mutated with it."""
    hunyuan = _transformers(
        "hunyuan_v1_dense", "", "rotate_half", "apply_rotary_pos_emb", head_dim=8
    )

    def build() -> nn.Module:
        model = hunyuan.build()
        layers: Any = model.get_submodule("model.layers")
        for layer in layers:
            layer.self_attn.key_layernorm = KeyNorm(8)
        return model

    functions = (*hunyuan.functions, (KeyNorm, ("forward",)))
    return Original(hunyuan.name, build, functions)


def _handwritten(decoder: str, *places: tuple[str, str]) -> Original:
    functions = tuple((getattr(decoders, owner), (name,)) for owner, name in places)

    def build() -> nn.Module:
        return zoo.randomise(getattr(decoders, decoder)(1)).eval()

    about = ("turn", "angle", "table") if places[0][1] == "attention" else ()
    return Original(decoder, build, functions, handwritten=True, about=about)


def originals() -> dict[str, Original]:
    """By name."""
    apply, half = "apply_rotary_pos_emb", "rotate_half"
    every = (
        _transformers("llama", "LlamaRotaryEmbedding", half, apply),
        _transformers("gpt_neox", "", half, apply, partial_rotary_factor=0.5),
        _transformers("cohere", "CohereRotaryEmbedding", half, apply),
        _transformers("glm", "", half, apply, head_dim=8),
        _transformers("gpt_oss", "", "_apply_rotary_emb", apply, head_dim=8),
        _transformers("gptj", "", "rotate_every_two", apply, rotary_dim=4),
        _normed(),
        _handwritten("SdpaDecoder", ("_SdpaBlock", "attention"), ("SdpaDecoder", "rope")),
        _handwritten("MatmulDecoder", ("_MatmulBlock", "attention"), ("MatmulDecoder", "rope")),
        _handwritten("IsCausalDecoder", ("_IsCausalBlock", "attention")),
        _handwritten(
            "SeparateDecoder", ("_SeparateBlock", "attention"), ("_SeparateBlock", "turn")
        ),
    )
    return {original.name: original for original in every}
