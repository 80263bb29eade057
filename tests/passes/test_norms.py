"""Norms behind a rotation are moved before it where that is the same, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense as hunyuan

from kvquant_compile.capture import capture
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests.survey.case import build


@pytest.mark.parametrize("model_type", ["nanochat", "llama4_text"])
def test_keys_with_a_norm_behind_rope_are_stored_before_both(model_type):
    captured = capture(build(model_type))
    layers = recognise(captured)
    assert not [layer.plan.refusal for layer in layers if layer.plan.refusal]
    assert layers[0].plan.rope is not None
    assert max(validate_lossless(captured, layers).values()) < 1e-5


class _Norm(nn.Module):
    """A norm that is none, in one of several ways."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "largest":  # depends on more than the length
            return x / (x.pow(2).amax(-1, keepdim=True) + 1e-6).sqrt()
        if self.kind == "mean":
            x = x - x.mean(-1, keepdim=True)
        if self.kind == "weights":
            x = x * torch.arange(1.0, 1 + x.shape[-1])
        if self.kind == "cubed":
            return x * x.pow(2)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("kind", ["largest", "mean", "cubed", "weights"])
def test_what_no_rotation_passes_through_stays_behind(kind):
    model = build("hunyuan_v1_dense")
    for module in model.modules():
        if isinstance(module, hunyuan.HunYuanDenseV1Attention):
            module.key_layernorm = _Norm(kind)
    captured = capture(model)
    layers = recognise(captured)
    assert all(layer.plan.rope is None and layer.plan.refusal for layer in layers)
    assert max(validate_lossless(captured, layers).values()) < 1e-5
