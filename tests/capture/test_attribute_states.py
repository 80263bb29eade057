"""Modules that keep their state in attributes: every cache has its own."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import kvquant_compile
from kvquant_compile.capture.attribute_states import attribute_states, marks
from kvquant_compile.capture.leaves import Leaf
from kvquant_compile.runtime.installed import installed
from tests.survey.case import _generate, build

NAMES = ["layers.0.temporal_block.conv1d_state", "layers.0.temporal_block.rg_lru.recurrent_states"]


@pytest.fixture(scope="module")
def optimised():
    model = build("recurrent_gemma")
    model.expected = _generate(model)  # leaves states of another batch in the modules
    return kvquant_compile.optimize(model, bits=16, progress=False)


def test_generation_is_the_original_s_and_leaves_the_modules_alone(optimised):
    block = optimised.model.layers[0].temporal_block
    assert block.conv1d_state is None
    assert torch.equal(_generate(optimised), optimised.expected)
    assert block.conv1d_state is None
    assert block.rg_lru.recurrent_states is None


def test_the_outermost_module_with_a_state_is_the_leaf(optimised):
    graph = installed(optimised).captured.graph_module
    leaves = [leaf for leaf in graph.children() if isinstance(leaf, Leaf) and leaf.has_state]
    assert [leaf.module for leaf in leaves] == [optimised.model.layers[0].temporal_block]
    assert [state.name for state in leaves[0].attributes] == NAMES


def _logits(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def test_conversations_do_not_mix(optimised, tmp_path):
    ids = torch.randint(3, 100, (4, 9), generator=torch.Generator().manual_seed(0))
    alone = kvquant_compile.new_cache(optimised)
    _logits(optimised, ids[:2], alone)
    expected = _logits(optimised, ids[:2, :1], alone)
    first, second = (kvquant_compile.new_cache(optimised) for _ in range(2))
    _logits(optimised, ids[:2], first)
    _logits(optimised, ids[2:], second)
    swapped = first.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(_logits(optimised, ids[:2, :1], first), expected)
    crossed = _logits(optimised, ids[:2, :1].flip(0), swapped)
    torch.testing.assert_close(crossed.flip(0), expected)
    second.save(tmp_path / "cache.safetensors")
    again = kvquant_compile.load_cache(tmp_path / "cache.safetensors", optimised)
    steps = [_logits(optimised, ids[2:, :1], cache) for cache in (second, again)]
    assert torch.equal(*steps)


class _Part(nn.Module):
    """Keeps a state, and remembers its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.state = self.last = self.summary = None
        self.table = torch.zeros(2, 3)
        self.register_buffer("count", torch.zeros(2))

    def forward(self, hidden):
        self.state, self.last = hidden.mean(1), hidden
        self.summary = hidden.mean((0, 1))
        self.count = self.count + 1


class _Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace()
        self.embed, self.part = nn.Embedding(5, 8), _Part()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, inputs_embeds, use_cache):
        self.part(inputs_embeds)


def test_only_what_keeps_one_row_of_fixed_size_per_sequence_is_a_state():
    backbone = _Backbone()
    before = marks(backbone)
    assert [path[-1][1] for path in before] == ["table"]
    backbone(torch.randn(2, 6, 8), use_cache=True)
    (state,) = attribute_states(backbone, backbone.embed.weight, before)
    assert (state.owner, state.name) == (backbone.part, "part.state")
    state.set(None)
    assert backbone.part.state is None
    assert attribute_states(backbone, backbone.embed.weight, marks(backbone)) == ()
