"""Decode steps through the kernels, in Triton's interpreter, wait for nothing. Run as a module.

The interpreter takes seconds a step, hence one layer, one head, and three tokens.
"""

from __future__ import annotations

from unittest import mock

import torch

import kvquant_compile
from kvquant_compile.lowering.triton import dispatch
from kvquant_compile.runtime.installed import installed
from tests.runtime.recording import Recording
from tests.zoo import tiny, tokens

ONE = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


@torch.no_grad()
def feed(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits after feeding ids [1, S] one by one."""
    cache = kvquant_compile.new_cache(model)
    for i in range(ids.shape[1]):
        mask = torch.ones(1, i + 1, dtype=torch.int64)
        logits = model(ids[:, i : i + 1], past_key_values=cache, attention_mask=mask).logits
    return logits


def check() -> None:
    """Three tokens through recorded graphs that watch every operation inside our ops."""
    model = kvquant_compile.optimize(
        tiny("llama", hidden_size=16, **ONE), bits=3, calibration=tokens(4, 64, seed=7)
    )
    assert "triton" in kvquant_compile.explain(model).layers[0].kernel
    ids = tokens(1, 3)
    with mock.patch.object(dispatch, "use_kernels", return_value=False):
        expected = feed(model, ids)
    state, backend = installed(model), Recording(inside_ops=True)
    state.decode = type(state.decode)(state.program, state.warn_once, backend)
    torch.testing.assert_close(feed(model, ids), expected, rtol=1e-2, atol=1e-2)
    assert not state.decode.failure
    assert (backend.captures, backend.replays) == (1, 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check()
    print("no waits")
