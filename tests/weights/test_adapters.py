"""Models with PEFT's adapters, switched and merged before and after ``optimize``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import kvquant_compile
from kvquant_compile import KVQuantError, OptionError
from tests import zoo
from tests.weights.test_weights import IDS, composes, results, tiny

peft = pytest.importorskip("peft", reason="peft is not installed")


def lora(adapters: int = 1, name: str = "llama", **settings: Any) -> Any:
    """A tiny model with adapters that matter, the first of them active."""
    given = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**given, **settings})
    torch.manual_seed(0)
    model = peft.get_peft_model(zoo.tiny(name, num_hidden_layers=1), config)
    for i in range(1, adapters):
        model.add_adapter(f"adapter{i}", config)
    return model.eval()


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[1], expected[1])


def test_a_wrapper_is_optimised_and_restored() -> None:
    model = lora()
    composes(model)
    state = model.get_base_model().model.__dict__
    assert "forward" in state  # the model inside runs the graph
    assert "forward" not in model.__dict__
    assert "lossless" in str(kvquant_compile.explain(model))
    with pytest.raises(OptionError, match="already optimised"):
        kvquant_compile.optimize(model)
    kvquant_compile.restore(model)
    assert "forward" not in state


def test_the_model_inside_may_be_given_instead() -> None:
    model = lora()
    composes(model, model.get_base_model())


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"target_modules": "all-linear"}, {"target_modules": ["embed_tokens"]}],
    ids=["DoRA", "all linear layers", "embedding"],
)
def test_kinds_of_adapters(settings: dict[str, Any]) -> None:
    composes(lora(**settings))


def test_three_bits_through_a_wrapper_are_those_of_the_merged_model() -> None:
    model, merged = lora(), lora().merge_and_unload()
    windows = zoo.tokens(4, 64, seed=7)
    options = {"calibration": windows, "attend_quantized": True, "recent_window": 0}
    for each in (model, merged):
        kvquant_compile.optimize(each, bits=3, **options)
    with torch.no_grad():
        one, other = (each(IDS).logits for each in (model, merged))
    error = float((one - other).norm() / other.norm())
    assert error < 0.05  # codes at a boundary may fall to either side
    assert not torch.equal(one, lora()(IDS).logits)


def _disabled(model: Any) -> AbstractContextManager[Any]:
    return model.disable_adapter()


def _switched(model: Any) -> AbstractContextManager[Any]:
    model.set_adapter("adapter1")
    return nullcontext()


def _merged(model: Any) -> AbstractContextManager[Any]:
    model.merge_adapter()
    return nullcontext()


def _scaled(model: Any) -> AbstractContextManager[Any]:
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.25)
    return nullcontext()


@pytest.mark.parametrize("change", [_disabled, _switched, _merged, _scaled])
def test_the_graph_follows_the_adapters(change: Callable[[Any], Any]) -> None:
    expected, model = lora(adapters=2), lora(adapters=2)
    before = results(expected)
    with change(expected):
        after = results(expected)
    if change is not _merged:
        assert not torch.allclose(before[0], after[0], atol=1e-3)
    kvquant_compile.optimize(model, bits=16)
    same(results(model), before)
    with change(model):
        same(results(model), after)
    if change is _disabled:
        same(results(model), before)


def test_switching_back_captures_nothing_anew() -> None:
    model = kvquant_compile.optimize(lora(adapters=2), bits=16)
    state = model.get_base_model().__dict__["_kvquant"]
    first = state.program
    seen = []
    for name in ("adapter1", "default", "adapter1"):
        model.set_adapter(name)
        results(model)
        seen.append(state.program)
    assert seen[1] is first
    assert seen[0] is seen[2] is not first


def test_merged_between_two_steps_of_one_cache() -> None:
    original, model = lora(), kvquant_compile.optimize(lora(), bits=16)
    steps = []
    with torch.no_grad():
        for each in (original, model):
            cache = each(IDS[:, :8], use_cache=True).past_key_values
            each.merge_adapter()
            more = each(IDS[:, 8:9], past_key_values=cache)
            each.unmerge_adapter()
            steps.append([more.logits, each(IDS[:, 9:], past_key_values=cache).logits])
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-4)


def test_tables_of_other_weights_are_told_of() -> None:
    model = lora(adapters=2)
    kvquant_compile.optimize(model, bits=3, calibration=zoo.tokens(2, 64), sensitivity="none")
    model.set_adapter("adapter1")
    with pytest.warns(UserWarning, match="calibrated for the weights of then"):
        results(model)


def test_latent_attention_follows_its_absorbed_matrices() -> None:
    settings = {"name": "deepseek_v3", "target_modules": ["kv_b_proj", "o_proj"]}
    expected, model = lora(**settings), kvquant_compile.optimize(lora(**settings), bits=16)
    same(results(model), results(expected))
    with expected.disable_adapter(), model.disable_adapter():
        same(results(model), results(expected))


def test_a_wrapper_is_saved_with_its_tables(tmp_path: Path) -> None:
    zoo.tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    windows = zoo.tokens(2, 64)
    kvquant_compile.optimize(model, bits=3, calibration=windows, sensitivity="none",
                             attend_quantized=True)  # fmt: skip
    kvquant_compile.save_pretrained(model, tmp_path / "out")  # adapters and tables only
    again = kvquant_compile.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_adapters_by_sequence_are_refused() -> None:
    model = kvquant_compile.optimize(lora(adapters=2), bits=16)
    with pytest.raises(OptionError, match="adapter_names"):
        model.generate(IDS, adapter_names=["default", "adapter1"], max_new_tokens=2)
    assert results(model)[1].shape == (2, 18)  # and it goes on


def _unloaded(model: Any) -> Any:
    return model.merge_and_unload()


def _loaded_anew(model: Any) -> Any:
    model.delete_adapter("adapter1")
    model.add_adapter("adapter1", model.peft_config["default"])
    model.set_adapter("adapter1")
    return model


def _weight_replaced(model: Any) -> Any:
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight * 2)
    return model


@pytest.mark.parametrize("change", [_unloaded, _weight_replaced])
def test_replaced_layers_are_noticed(change: Callable[[Any], Any]) -> None:
    model = change(kvquant_compile.optimize(lora(adapters=2), bits=16))
    with pytest.raises(OptionError, match="were replaced"):
        results(model)


def test_adapters_loaded_anew_are_noticed() -> None:
    model = kvquant_compile.optimize(lora(adapters=2), bits=16)
    model.set_adapter("adapter1")
    before = results(model)
    changed = _loaded_anew(model)
    after = results(changed)
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    kvquant_compile.restore(model)
    same(after, results(model))


def test_adapters_put_on_an_optimised_model_are_noticed() -> None:
    inner = kvquant_compile.optimize(tiny(), bits=16)
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(OptionError, match="were replaced"):
        results(model)


def test_prompt_tuning_composes() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(0)
    composes(peft.get_peft_model(tiny(), config).eval())


def test_prefix_tuning_is_refused_for_its_own_cache() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny(), config).eval()
    with pytest.raises(KVQuantError, match="keys and values of its own"):
        kvquant_compile.optimize(model, bits=16)
