"""lm-eval on an optimised model (extra ``eval``), every score through the quantised cache.

lm-eval scores a continuation in one forward pass, and in one pass a step's own tokens are exact by
default: the score would be the original's, whatever the cache holds. Here every scoring pass
attends to quantised keys and values only, and one that does not is an error.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from kvquant_compile.errors import MissingDependencyError, OptionError
from kvquant_compile.evaluate.score import quantised_attention
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.installed import installed


def lm_eval_model(model: nn.Module, tokenizer: Any, **options: Any) -> Any:
    """An optimised model as lm-eval takes it: ``lm_eval.simple_evaluate(model=...)``.

    Loglikelihoods, also rolling ones, are scored through the quantised cache. Text is generated as
    ``generate`` does it: a prompt attends to its own tokens exactly, answers to the cache.

    Args:
        model: an optimised transformers model.
        tokenizer: its tokenizer.
        options: of lm-eval's ``HFLM``, such as ``batch_size`` and ``max_length``.

    Raises:
        OptionError: the model is not optimised.
        MissingDependencyError: lm-eval is not installed.
    """
    installed(model)
    return _model_class()(pretrained=model, tokenizer=tokenizer, **options)


@functools.cache
def _model_class() -> type:
    """lm-eval's own class for transformers models, with another forward pass."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingDependencyError(
            "lm-eval cannot be used",
            why=f"{error.name or error} is not installed",
            do='Install "kvquant-compile[eval]".',
        ) from error

    class QuantisedCacheLM(HFLM):  # type: ignore[misc]
        """Scores through the quantised cache."""

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs:
                raise OptionError(
                    "a masked or encoder-decoder score",
                    why="only decoders are optimised, and lm-eval pads them on the right",
                    do="Leave the options out that ask for it.",
                )
            with torch.no_grad(), quantised_attention(self.model):
                found = self.model(inps, use_cache=True)
            if not isinstance(found.past_key_values, QuantizedCache):
                raise OptionError(
                    "this score would not use the quantised cache",
                    why="the model ran its original forward, as it does in training mode",
                    do="Call model.eval(), and leave out options that change the model.",
                )
            return found.logits

    return QuantisedCacheLM
