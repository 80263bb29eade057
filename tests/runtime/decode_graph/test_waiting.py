"""What waits for the device, which a graph forbids."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import PreTrainedModel

from kvquant_compile.lowering.triton.compat import unavailable
from kvquant_compile.runtime.decode_graph import DecodeGraphs, _waits
from kvquant_compile.runtime.installed import installed
from tests.runtime.decode_graph.helpers import graphs, run, started
from tests.runtime.recording import HostSyncError, Recording, no_host_sync
from tests.zoo import tokens


def test_a_past_on_the_host_is_refused(llama: PreTrainedModel) -> None:
    program = installed(llama).program
    inputs = ("hidden", "past", *program.inputs)
    other = dataclasses.replace(program)
    other.__dict__["inputs"] = inputs  # a graph that computes with the number
    backend = Recording()
    assert "past on the host" in DecodeGraphs(other, print, backend).refusal


def symbolic(function: Any) -> list[fx.Node]:
    return list(make_fx(function, tracing_mode="symbolic")(torch.randn(4, 4)).graph.nodes)


@pytest.mark.parametrize(
    "function", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x * x.sum().item()]
)
def test_models_that_wait_are_known(function: Any) -> None:
    assert any(map(_waits, symbolic(function)))


def test_models_that_gather_do_not_wait() -> None:
    assert not any(map(_waits, symbolic(lambda x: x[x[0].argsort()].softmax(-1).topk(2)[1])))


def test_a_step_waits_for_nothing_but_its_mask(llama: PreTrainedModel) -> None:
    cache = run(llama, tokens(2, 9))[1]
    with no_host_sync():
        cache.commit(cache.begin(torch.full((2, 1), 9), None))
        cache.commit(cache.begin(torch.arange(10, 14).expand(2, 4), None))
    with pytest.raises(HostSyncError, match="_local_scalar_dense"), no_host_sync():
        cache.begin(torch.full((2, 1), 14), torch.ones(2, 15))


def test_the_torch_path_does_wait(llama: PreTrainedModel) -> None:
    with graphs(llama, Recording(inside_ops=True)), pytest.raises(HostSyncError):
        started(llama)


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")
def test_kernels_do_not_wait() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.runtime.run_kernel_graph"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
