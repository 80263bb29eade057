"""Models whose cache keeps positions, and masks that join a causal one with what was chosen."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kvquant_compile
from kvquant_compile.capture import capture
from kvquant_compile.capture.attribute_states import kept_in
from kvquant_compile.capture.edit import add_op
from kvquant_compile.capture.kept_positions import PositionHistory
from kvquant_compile.capture.markers import ATTEND, MASK
from kvquant_compile.capture.selections import split_selections
from kvquant_compile.errors import UnsupportedModelError, ValidationError
from kvquant_compile.lowering import selection
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests.survey.case import build

MODEL = "qwen4_exp_text"


@pytest.fixture(scope="module")
def model():
    return _built()


def _built():
    if MODEL not in CONFIG_MAPPING:
        pytest.skip("these transformers have no such type")
    return build(MODEL)


def test_an_index_that_rotates_anew_is_given_all_positions(model, monkeypatch):
    captured = capture(model)
    layers = recognise(captured)
    assert [layer.plan.index for layer in layers] == [1]
    assert layers[0].plan.attends[0].selects
    assert layers[0].plan.rope
    assert max(validate_lossless(captured, layers).values()) < 1e-5

    def all_of_them(selected, keys):
        return torch.ones(selected.shape[0], selected.shape[2], keys, dtype=torch.bool)

    monkeypatch.setattr(selection, "chosen_keys", all_of_them)
    with pytest.raises(ValidationError):
        validate_lossless(captured, layers)


def test_without_the_history_the_capture_is_refused(model, monkeypatch):
    monkeypatch.setattr(PositionHistory, "forward", lambda self, states, positions: positions)
    with pytest.raises(UnsupportedModelError, match="holds for the traced length only"):
        capture(model)


def test_positions_go_with_rows_and_into_files(tmp_path):
    model = kvquant_compile.optimize(_built(), bits=16, progress=False)
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
        assert kept_in(cache.states)["positions"].shape == (2, 30)
        cache.save(tmp_path / "prefix.safetensors")
        again = kvquant_compile.load_cache(tmp_path / "prefix.safetensors", model)
        swapped = cache.fork()
        swapped.reorder_cache(torch.tensor([1, 0]))
        seen = torch.cat([mask, mask[:, -1:]], 1)
        step = ids[:, 5:6]
        logits = [
            model(step, attention_mask=seen, past_key_values=c).logits for c in (cache, again)
        ]
        crossed = model(step.flip(0), attention_mask=seen.flip(0), past_key_values=swapped).logits
    assert torch.equal(*logits)
    torch.testing.assert_close(crossed.flip(0), logits[0])


def _masked(chosen_heads):
    """An attend marker whose mask is a marker's and a choice for so many heads."""
    graph = fx.Graph()
    q, k, chosen = (graph.placeholder(name) for name in ("q", "k", "chosen"))
    q.meta["val"] = k.meta["val"] = torch.zeros(2, 4, 6, 8)
    chosen.meta["val"] = torch.ones(2, chosen_heads, 6, 6, dtype=torch.bool)
    mask = graph.call_function(MASK, (None, 2, 6, 0, "causal", 0, torch.device("cpu")))
    mask.meta["val"] = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    both = add_op(graph, mask, torch.ops.aten.bitwise_and.Tensor, (chosen, mask))
    attend = graph.call_function(ATTEND, (q, k, k, both, None, 0, 1.0, 0.0, 0, True))
    graph.output(attend)
    return fx.GraphModule({}, graph), mask, chosen, both


def test_a_choice_among_keys_is_split_from_its_mask():
    gm, mask, chosen, _ = _masked(1)
    split_selections(gm)
    (attend,) = gm.graph.find_nodes(op="call_function", target=ATTEND)
    assert (attend.args[3], attend.args[11]) == (mask, chosen)


def test_a_choice_of_every_head_is_left_in_the_mask():
    gm, _, _, both = _masked(4)
    split_selections(gm)
    (attend,) = gm.graph.find_nodes(op="call_function", target=ATTEND)
    assert attend.args[3] is both
