"""Loading models by name, for the command line and the demo."""

from __future__ import annotations

from typing import Any

from kvquant_compile.errors import OptionError


def load_model(name: str, dtype: str) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer.

    Raises:
        OptionError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        network = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(
            f"cannot load the model {name}",
            why=str(error).splitlines()[0],
            do="Pass a folder in transformers format, or a hub id that can be reached.",
        ) from error
    return network, load_tokenizer(name)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
