"""Models whose weights are quantised, wrapped, adapted, shared or hooked; docs/weights.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvquant_compile
from tests import zoo

IDS = zoo.tokens(2, 12)


def tiny(**settings: Any) -> nn.Module:
    return zoo.tiny("llama", num_hidden_layers=1, **settings)


def results(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and tokens of the model's own generate."""
    with torch.no_grad():
        return model(IDS).logits, model.generate(IDS, max_new_tokens=6, do_sample=False)


def composes(model: Any, inner: Any = None) -> None:
    """Lossless pages change nothing of what the model (or its wrapper) gives."""
    logits, text = results(model)
    kvquant_compile.optimize(model if inner is None else inner, bits=16)
    got, generated = results(model)
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated, text)


class _Rounded(torch.autograd.Function):
    """x times the transpose of codes * scale, with a backward pass to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return x @ (codes.to(x.dtype) * scale).T

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        codes, scale = ctx.saved_tensors
        return gradients[0] @ (codes.to(gradients[0].dtype) * scale), None, None


class RoundedLinear(nn.Module):
    """A linear layer of int8 codes, which no code of torch.nn knows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return _Rounded.apply(x, self.codes, self.scale)


def rounded() -> nn.Module:
    model = tiny()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, RoundedLinear(child))
    return model


def test_linear_layers_of_another_class() -> None:
    composes(rounded())


def test_linear_layers_of_another_class_are_calibrated_through() -> None:
    model = kvquant_compile.optimize(rounded(), bits=3, calibration=zoo.tokens(4, 64, seed=7))
    (table,) = kvquant_compile.artifact(model).tables.values()
    assert table.key_weight.unique().numel() > 4  # gradients reached the keys
    assert results(model)[1].shape == (2, 18)


def test_tied_embeddings_stay_tied() -> None:
    model = tiny(tie_word_embeddings=True)
    composes(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gradient_checkpointing_flags() -> None:
    model = tiny()
    model.gradient_checkpointing_enable()
    composes(model)
    assert model.is_gradient_checkpointing


def test_training_mode_runs_the_original_loudly() -> None:
    model = kvquant_compile.optimize(tiny(), bits=16).train()
    with pytest.warns(UserWarning, match="training mode"):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None


def _torchao(config: str, **settings: Any) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tiny()
    quantization.quantize_(model, getattr(quantization, config)(**settings))
    return model


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_torchao_weights(config: str) -> None:
    composes(_torchao(config))


def test_torchao_int4_weights() -> None:
    try:
        model = _torchao("Int4WeightOnlyConfig", group_size=32)
    except (ImportError, AssertionError, NotImplementedError, RuntimeError) as missing:
        pytest.skip(f"torchao has no int4 kernel here: {missing}")
    composes(model)


def test_torchao_activations_are_refused_for_what_they_are() -> None:
    model = _torchao("Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(kvquant_compile.ValidationError, match="round"):
        kvquant_compile.optimize(model, bits=16)


def _lora(adapters: int = 1) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(), config)
    for i in range(1, adapters):
        model.add_adapter(f"adapter{i}", config)
    return model.eval()


def test_lora_adapters_are_part_of_the_graph() -> None:
    model = _lora()
    composes(model, model.get_base_model())


def test_merged_lora_adapters() -> None:
    composes(_lora().merge_and_unload())


def test_a_peft_wrapper_is_refused_with_the_way_out() -> None:
    with pytest.raises(kvquant_compile.OptionError, match="get_base_model"):
        kvquant_compile.optimize(_lora(), bits=16)


@pytest.mark.parametrize("change", ["merge", "switch", "disable"])
def test_adapters_changed_afterwards_are_noticed(change: str) -> None:
    model = _lora(adapters=2)
    logits, _ = results(model)
    kvquant_compile.optimize(model.get_base_model(), bits=16)
    if change == "merge":
        model.merge_adapter()
    elif change == "switch":
        model.set_adapter("adapter1")
    else:
        model.base_model.disable_adapter_layers()
    with pytest.raises(kvquant_compile.OptionError, match="adapters have changed"):
        results(model)
    if change == "switch":
        model.set_adapter("default")
        torch.testing.assert_close(results(model)[0], logits, rtol=1e-4, atol=1e-4)


def test_device_map_hooks() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    composes(accelerate.dispatch_model(tiny(), device_map={"": "cpu"}, force_hooks=True))


def test_offloaded_weights_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(tiny(), execution_device=torch.device("cpu"))
    with pytest.raises(kvquant_compile.UnsupportedModelError, match="meta device"):
        kvquant_compile.optimize(model, bits=16)
