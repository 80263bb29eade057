"""``generate`` on an optimised model: its cache and its options, honoured or refused up front."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from kvquant_compile.errors import OptionError
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.installed import Installed

_DROP = "Drop the option, or call kvquant_compile.restore(model) first."
# Options of a generation config that would be ignored: why they cannot be honoured.
_NOT_HONOURED = {
    "compile_config": "the model is a compiled graph already, whose decode steps are CUDA graphs"
    " where that is possible",
    "cache_config": "it configures transformers' quantised cache, and optimize has set the format",
    "max_cache_len": "it sizes a static cache, and pages are allocated as tokens come",
    "assistant_early_exit": "the graph has all layers and cannot stop early",
}


def prepare_cache(original: Callable[..., Any], state: Installed) -> Callable[..., Any]:
    """generate's cache factory: ours, whatever else is asked for refused before a token runs."""

    @functools.wraps(original)
    def prepare(
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        _refuse(generation_config, cache)
        made = cache is None and generation_config.use_cache is not False
        if made:
            model_kwargs["past_key_values"] = cache = state.program.new_cache()
        if isinstance(cache, QuantizedCache):
            cache.reserve((generation_config.max_length or 1) - 1)  # the last is never fed back
            _chunk_prompt(generation_config, model_kwargs, state, cache)
        if made:
            return None
        rest = generation_mode, batch_size, *args
        return original(generation_config, model_kwargs, *rest, **kwargs)

    return prepare


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """What stands in for ``init_continuous_batching``.

    Raises:
        OptionError: always.
    """
    raise OptionError(
        "continuous batching on an optimised model",
        why="its scheduler writes full-precision keys and values into a paged cache of its own,"
        " so nothing would be compressed",
        do="Call generate with a padded batch, or kvquant_compile.restore(model) first.",
    )


def _refuse(config: Any, cache: Any) -> None:
    """Raise for what would be ignored, or would silently store full precision."""
    chosen = config.cache_implementation
    if chosen not in (None, "dynamic"):
        raise OptionError(
            f"cache_implementation={chosen!r} on an optimised model",
            why="it asks for a full-precision cache where the optimised one would be used",
            do=_DROP,
        )
    for name, why in _NOT_HONOURED.items():
        if getattr(config, name, None) is not None:
            raise OptionError(f"{name} on an optimised model", why=why, do=_DROP)
    if cache is not None and not isinstance(cache, QuantizedCache):
        raise OptionError(
            f"a {type(cache).__name__} as past_key_values of generate on an optimised model",
            why="its keys are stored after RoPE and in full precision",
            do="Leave it out, pass kvquant_compile.new_cache(model) or the cache that an earlier "
            "generate returned, or call kvquant_compile.restore(model) first.",
        )


def _chunk_prompt(
    config: Any, kwargs: dict[str, Any], state: Installed, cache: QuantizedCache
) -> None:
    """Have ``generate`` feed a long prompt in chunks, so that no tensor has the prompt's length.

    Embedded prompts and assisted decoding come in one call and are cut by the backbone's forward.
    """
    chunk = state.prefill_chunk
    if chunk is None or config.prefill_chunk_size is not None or cache.states is not None:
        return
    mask = kwargs.get("attention_mask")
    columns = getattr(config, "_mask_length", 0) if mask is None else mask.shape[-1]
    if columns - cache.columns > chunk and kwargs.get("inputs_embeds") is None:
        config.prefill_chunk_size = chunk
