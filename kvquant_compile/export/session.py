"""Running an exported file with onnxruntime alone: numpy in, numpy out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvquant_compile.export.extras import need

PAGE_TOKENS = 64
_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


@dataclass
class OnnxCache:
    """A cache between steps.

    Attributes:
        lengths: int64 [batch], tokens that every sequence has stored. Lower one to forget its
            last tokens.
        tensors: packed pages and exact tokens by input name; batch is the first axis of all, so
            that beams are reordered by indexing.
    """

    lengths: np.ndarray
    tensors: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed pages."""
        return sum(x.nbytes for name, x in self.tensors.items() if name.endswith(".pages"))


class OnnxSession:
    """An exported model in onnxruntime.

    Args:
        path: of the file.
        options: of ``onnxruntime.InferenceSession`` (``providers``, ``sess_options``).

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        (onnxruntime,) = need("onnxruntime")
        self.session = onnxruntime.InferenceSession(str(path), **options)
        self.inputs = {x.name: x for x in self.session.get_inputs()}
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)

    def new_cache(self, batch: int) -> OnnxCache:
        """An empty cache."""
        tensors = {}
        for name, value in self.inputs.items():
            if name.startswith("past."):
                shape = [batch, *(0 if isinstance(n, str) else n for n in value.shape[1:])]
                tensors[name] = np.zeros(shape, _TYPES[value.type])
        return OnnxCache(np.zeros(batch, np.int64), tensors)

    def step(self, ids: np.ndarray, cache: OnnxCache, mask: np.ndarray | None = None) -> np.ndarray:
        """Run tokens and put them into the cache.

        Args:
            ids: int64 [batch, sequence].
            cache: changed in place; grown by whole pages where it is too small.
            mask: int64 [batch, sequence], 0 for padding; None when none is padded.

        Returns:
            logits float32 [batch, sequence, vocabulary].
        """
        mask = np.ones_like(ids) if mask is None else mask
        _grow(cache, int((cache.lengths + mask.sum(1)).max()))
        feed = {"input_ids": ids, "token_mask": mask, "past_lengths": cache.lengths}
        feed = {name: x for name, x in {**feed, **cache.tensors}.items() if name in self.inputs}
        names = ["logits", "present_lengths", *(_present(name) for name in cache.tensors)]
        logits, cache.lengths, *tensors = self.session.run(names, feed)
        cache.tensors = dict(zip(cache.tensors, tensors, strict=True))
        return logits

    def generate(
        self,
        ids: np.ndarray,
        max_new_tokens: int,
        mask: np.ndarray | None = None,
        eos: int | None = None,
    ) -> np.ndarray:
        """Continue left-padded prompts greedily; int64 [batch, new tokens].

        A sequence that has ended repeats ``eos``; generation stops when all have.
        """
        cache, new = self.new_cache(len(ids)), []
        logits = self.step(ids, cache, mask)
        ended = np.zeros(len(ids), bool)
        for i in range(max_new_tokens):
            token = logits[:, -1].argmax(-1)
            token = np.where(ended, eos or 0, token)
            new.append(token)
            ended |= token == eos if eos is not None else False
            if ended.all() or i + 1 == max_new_tokens:
                break
            logits = self.step(token[:, None], cache)
        return np.stack(new, 1)


def _present(name: str) -> str:
    return "present" + name.removeprefix("past")


def _grow(cache: OnnxCache, tokens: int) -> None:
    """Have pages for so many tokens of every sequence."""
    wanted = -(-tokens // PAGE_TOKENS)
    for name, x in cache.tensors.items():
        if name.endswith(".pages") and x.shape[1] < wanted:
            more = np.zeros((x.shape[0], wanted - x.shape[1], *x.shape[2:]), x.dtype)
            cache.tensors[name] = np.concatenate([x, more], 1)
