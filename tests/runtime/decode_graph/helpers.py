"""Models that decode with graphs through a recording backend."""

from __future__ import annotations

from typing import Any

import torch

from kvquant_compile.runtime.installed import installed
from tests.runtime.recording import Recording
from tests.zoo import tokens

GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
TEXT = tokens(8, 64, seed=7)


class graphs:
    """A model's decode steps through a backend, in a ``with`` block."""

    def __init__(self, model: Any, backend: Recording) -> None:
        self.model, self.backend = model, backend

    def __enter__(self) -> None:
        state = installed(self.model)
        self.before = state.decode
        state.decode = type(state.decode)(state.program, state.warn_once, self.backend)

    def __exit__(self, *error: object) -> None:
        installed(self.model).decode = self.before


class Forgetful(Recording):
    """Keeps nothing of the body, as a real capture; its steps are wrong."""

    def capture(self, body: Any, device: torch.device) -> Any:
        self.captures += 1
        output = body()
        return lambda: output


@torch.no_grad()
def run(model: Any, ids: torch.Tensor, cache: Any = None, **given: Any) -> tuple[Any, Any]:
    """Logits of the last token, and the cache."""
    out = model(ids, past_key_values=cache, use_cache=True, **given)
    return out.logits[:, -1], out.past_key_values


def started(model: Any, seed: int = 0, batch: int = 1, length: int = 9) -> Any:
    """A cache that holds a prompt and has a captured decode step, if there is a backend."""
    cache = run(model, tokens(batch, length, seed=seed))[1]
    for step in range(3):
        run(model, tokens(batch, 1, seed=step), cache)
    return cache


def both(model: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Recording]:
    """Greedy text, equal with and without graphs; and the backend used."""
    expected = model.generate(ids, **{**GREEDY, **options})
    backend = Recording()
    with graphs(model, backend):
        assert torch.equal(model.generate(ids, **{**GREEDY, **options}), expected)
    return expected, backend
