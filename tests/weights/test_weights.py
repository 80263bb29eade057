"""Models whose weights are quantised, wrapped, adapted, shared or hooked; docs/weights.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvquant_compile
from kvquant_compile.errors import OptionError
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


def replaced(model: nn.Module, kind: Callable[[nn.Linear], nn.Module] = RoundedLinear) -> nn.Module:
    """The model with other linear layers, but for its head."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, kind(child))
    return model.eval()


def rounded() -> nn.Module:
    return replaced(tiny())


class _Packed(nn.Parameter):
    """int8 codes whose scale is an attribute, which a tracer's stand-in for them lacks."""

    scale: Tensor


class PackedLinear(nn.Module):
    """A linear layer of packed codes; ``differentiable`` is whether gradients pass through it."""

    differentiable = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rounded = RoundedLinear(linear)
        self.weight = _Packed(rounded.codes, requires_grad=False)
        self.weight.scale = rounded.scale

    def forward(self, x: Tensor) -> Tensor:
        given = x if self.differentiable else x.detach()
        return _Rounded.apply(given, self.weight, self.weight.scale)


class Opaque(PackedLinear):
    differentiable = False


def test_weights_of_a_class_of_their_own() -> None:
    composes(replaced(tiny(), PackedLinear))


def test_layers_that_pass_no_gradients_are_refused_with_the_way_out() -> None:
    model, windows = replaced(tiny(), Opaque), zoo.tokens(2, 32)
    with pytest.raises(kvquant_compile.KVQuantError, match='sensitivity="none"'):
        kvquant_compile.optimize(model, bits=3, calibration=windows)
    kvquant_compile.optimize(model, bits=3, calibration=windows, sensitivity="none")


def _bitsandbytes(kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def quantised(linear: nn.Linear) -> nn.Module:
        sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(**sizes, bias=False, has_fp16_weights=False)
        else:
            settings = {"compute_dtype": torch.bfloat16, "quant_type": kind}
            new = bnb.nn.Linear4bit(**sizes, bias=False, **settings)
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")  # which quantises

    model = tiny(hidden_size=128, intermediate_size=256, head_dim=32)
    return replaced(model, quantised).to(torch.bfloat16)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_bitsandbytes(kind: str) -> None:
    model = _bitsandbytes(kind)
    with torch.no_grad():
        logits = model(IDS).logits
        kvquant_compile.optimize(model, bits=16)
        cache = model(IDS[:, :8], use_cache=True).past_key_values
        got = torch.cat(
            [model(ids, past_key_values=cache).logits for ids in IDS[:, 8:].split(2, 1)], 1
        )
    error = float((got - logits[:, 8:]).float().norm() / logits[:, 8:].float().norm())
    assert error < 5e-2  # of bfloat16, and of int8 activations


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


def test_torchao_int4_weights_unpacked() -> None:
    granularity = pytest.importorskip("torchao.quantization.granularity", reason="no torchao")
    composes(_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4,
                      granularity=granularity.PerGroup(32)))  # fmt: skip


def test_torchao_int4_weights_packed_for_a_cpu() -> None:
    int4 = pytest.importorskip("torchao.prototype.quantization.int4", reason="no torchao, or older")
    quantization = pytest.importorskip("torchao.quantization", reason="no torchao")
    model = tiny(hidden_size=128, intermediate_size=256, head_dim=32)
    quantization.quantize_(model, int4.PrototypeInt4WeightOnlyConfig(group_size=32))
    with pytest.raises(kvquant_compile.CalibrationError, match='sensitivity="none"'):
        kvquant_compile.optimize(model, bits=3, calibration=zoo.tokens(2, 32))
    composes(model)


def test_torchao_activations_are_refused_for_what_they_are() -> None:
    model = _torchao("Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(kvquant_compile.ValidationError, match="round"):
        kvquant_compile.optimize(model, bits=16)


def test_device_map_hooks() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    composes(accelerate.dispatch_model(tiny(), device_map={"": "cpu"}, force_hooks=True))


def test_offloaded_weights_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(tiny(), execution_device=torch.device("cpu"))
    with pytest.raises(kvquant_compile.UnsupportedModelError, match="meta device"):
        kvquant_compile.optimize(model, bits=16)


def test_written_weights_of_latent_attention_are_refused() -> None:
    """Its expansion is moved to the query once; other weights are shared with the graph."""
    model = kvquant_compile.optimize(zoo.tiny("deepseek_v3", num_hidden_layers=2), bits=16)
    before = results(model)[0]
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights["model.layers.1.self_attn.o_proj.weight"].mul_(1.5)
    assert not torch.equal(results(model)[0], before)
    with torch.no_grad():
        weights["model.layers.1.self_attn.kv_b_proj.weight"].mul_(1.5)
    with pytest.raises(OptionError, match="latent attention"):
        results(model)
    kvquant_compile.restore(model)
    expected = results(model)[0]
    kvquant_compile.optimize(model, bits=16)
    torch.testing.assert_close(results(model)[0], expected, rtol=1e-4, atol=1e-4)
