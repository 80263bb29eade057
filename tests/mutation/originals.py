"""The rotary code that is mutated, each with the smallest model that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

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
        _handwritten("SdpaDecoder", ("_SdpaBlock", "attention"), ("SdpaDecoder", "rope")),
        _handwritten("MatmulDecoder", ("_MatmulBlock", "attention"), ("MatmulDecoder", "rope")),
        _handwritten("IsCausalDecoder", ("_IsCausalBlock", "attention")),
        _handwritten(
            "SeparateDecoder", ("_SeparateBlock", "attention"), ("_SeparateBlock", "turn")
        ),
    )
    return {original.name: original for original in every}
