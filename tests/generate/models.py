"""Originals and their optimised twins, each made once a process; a tokenizer for them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import kvquant_compile
from kvquant_compile.demo import ASSETS
from kvquant_compile.runtime.decode_graph import DecodeGraphs
from kvquant_compile.runtime.installed import installed
from kvquant_compile.runtime.program import Program
from kvquant_compile.runtime.validate import lossless_program
from tests.conftest import SHARED
from tests.zoo import VOCAB, tiny, tokens

# Grouped heads; norms of queries and keys; window and soft-cap; partial, interleaved, no rotation.
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt_neox", "cohere", "gpt2")
GREEDY: dict[str, Any] = {
    "max_new_tokens": 16,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
Pair = tuple[PreTrainedModel, PreTrainedModel]


def load(kind: str) -> PreTrainedModel:
    """A tiny model of a type; "demo", the package's own; or one of the development models."""
    if kind in ARCHITECTURES:
        return tiny(kind)
    return AutoModelForCausalLM.from_pretrained(_folder(kind), dtype=torch.float32).eval()


def _folder(kind: str) -> str:
    return str(ASSETS) if kind == "demo" else str(SHARED / "models" / kind)


@functools.cache
def _text(kind: str) -> torch.Tensor:
    words = (ASSETS / "heldout.txt").read_text(encoding="utf-8")[:20000]
    ids = AutoTokenizer.from_pretrained(_folder(kind))(words, add_special_tokens=False)
    return torch.tensor(ids["input_ids"])


def prompts(kind: str, rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length]: random ones for a tiny model, real text for a trained one."""
    if kind in ARCHITECTURES:
        return tokens(rows, length, seed=seed)
    starts = [97 * seed + 311 * row for row in range(rows)]
    return torch.stack([_text(kind)[start : start + length] for start in starts])


@functools.cache
def original(kind: str = "llama") -> PreTrainedModel:
    """Not optimised."""
    return load(kind)


@functools.cache
def lossless() -> Pair:
    """(original, optimised with lossless pages), of the same weights."""
    return original(), kvquant_compile.optimize(tiny("llama"), bits=16, progress=False)


@functools.cache
def three_bits(kind: str = "llama", recent: int | None = None) -> PreTrainedModel:
    """Optimised at 3 bits. With ``recent=0`` no last tokens are exact, so that a cache is the same
    however its tokens came; a ring holds those that no later step has overwritten."""
    calibration = prompts(kind, 4, 64, seed=7)
    return kvquant_compile.optimize(
        load(kind),
        bits=3,
        calibration=calibration,
        sensitivity="none",
        progress=False,
        recent_window=recent,
    )


@functools.cache
def _raw_pages(kind: str) -> Program:
    state = installed(three_bits(kind))
    return lossless_program(state.captured, state.layers)


@contextlib.contextmanager
def raw_pages(kind: str) -> Iterator[PreTrainedModel]:
    """``three_bits(kind)`` with the program that ``optimize`` validates: lossless pages."""
    model = three_bits(kind)
    state = installed(model)
    kept = state.program, state.decode
    state.program = _raw_pages(kind)
    state.decode = DecodeGraphs(state.program, state.warn_once)
    try:
        yield model
    finally:
        state.program, state.decode = kept


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word ``wi``, but for the special ones."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>"}
    words = {special.get(i, f"w{i}"): i for i in range(VOCAB)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        padding_side="left",
    )  # fmt: skip


def generate(model: PreTrainedModel, ids: torch.Tensor | None, **options: Any) -> Any:
    """Greedy, unless the options say otherwise; seeded."""
    torch.manual_seed(0)
    return model.generate(ids, **{**GREEDY, **options})


def assert_same_text(pair: Pair, ids: torch.Tensor | None, **options: Any) -> None:
    """Both models generate the same tokens."""
    expected, got = (generate(model, ids, **options) for model in pair)
    assert torch.equal(got, expected)


def left_padded(
    length: int, *padding: int, kind: str = "llama"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and a mask, both [rows, length]; row i starts with ``padding[i]`` padded."""
    ids = prompts(kind, len(padding), length)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask
