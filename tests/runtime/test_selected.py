"""Sparse attention: every query attends to the keys that the model's own index chose."""

from __future__ import annotations

import pytest
import torch

import kvquant_compile
from kvquant_compile.capture import capture
from kvquant_compile.errors import ValidationError
from kvquant_compile.lowering import selection
from kvquant_compile.lowering.selection import selected_slots
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests.survey.case import _generate, build


def test_selected_slots_leave_padding_and_empty_slots_out():
    # Row 0 starts with one column of padding; slots beyond three tokens are empty.
    columns = torch.tensor([[1, 2, 3, 4], [0, 1, 2, 3]])
    selected = torch.tensor([[[3, 0]], [[1, -1]]])
    expected = [[[False, False, True, False]], [[False, True, False, False]]]
    assert selected_slots(selected, columns).tolist() == expected


def test_only_chosen_keys_are_attended(monkeypatch):
    captured = capture(build("deepseek_v32"))
    layers = recognise(captured)
    assert all(layer.plan.attends[0].selects and layer.plan.rope for layer in layers)
    assert max(validate_lossless(captured, layers).values()) < 1e-5

    def all_of_them(selected, keys):
        return torch.ones(*selected.shape[:2], keys, dtype=torch.bool)

    monkeypatch.setattr(selection, "chosen_keys", all_of_them)
    with pytest.raises(ValidationError):
        validate_lossless(captured, layers)


def test_the_index_lives_in_the_cache(tmp_path):
    model = build("glm_moe_dsa")
    expected = _generate(model)
    kvquant_compile.optimize(model, bits=16, progress=False)
    assert torch.equal(_generate(model), expected)
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(ids).past_key_values
        index = cache.indexed_layers()[0].indexer_keys
        assert index.shape[:2] == ids.shape
        assert cache.nbytes() > sum(layer.indexer_keys.nbytes for layer in cache.indexed_layers())
        cache.save(tmp_path / "prefix.safetensors")
        again = kvquant_compile.load_cache(tmp_path / "prefix.safetensors", model)
        steps = [model(ids[:, :1], past_key_values=c).logits for c in (cache, again)]
    assert torch.equal(*steps)


@pytest.mark.slow
def test_beams_take_their_index_along():
    model = build("deepseek_v32")
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, pad_token_id=0, **options)
    kvquant_compile.optimize(model, bits=16, progress=False)
    assert torch.equal(model.generate(ids, pad_token_id=0, **options), expected)
