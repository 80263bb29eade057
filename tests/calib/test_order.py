"""Key error feedback follows the order that pages store channels in, whatever the model's is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvquant_compile.calib.fit import fit_layer
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec.keys import KeyCodes, dequantise_keys, quantise_keys
from kvquant_compile.codec.order import reorder
from kvquant_compile.codec.spec import CodecSpec, LayerTables
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.plan import AttendPlan, LayerPlan, RopeSpec
from tests.lowering.reference import half_rope, interleaved_rope

HEADS, TOKENS = 2, 400
SPEC = CodecSpec(3, 3, key_token_scale=True)


def sample(dim: int) -> tuple[Tensor, Tensor]:
    """Keys and low-rank gradients [H, N, dim]."""
    g = torch.Generator().manual_seed(dim)
    k = torch.randn(HEADS, TOKENS, dim, generator=g) + torch.randn(HEADS, 1, dim, generator=g)
    basis = torch.randn(HEADS, 6, dim, generator=g)
    return k, torch.randn(HEADS, TOKENS, 6, generator=g) @ basis


def stored(
    k: Tensor, grad: Tensor, rope: RopeSpec | None, feedback: bool = True
) -> tuple[LayerTables, KeyCodes, float]:
    """Tables and codes as a page has them, and the mean squared first-order change of the loss."""
    settings = FitSettings(key_feedback=feedback)
    tables = fit_layer(k, k, grad, grad, SPEC, settings, rope=rope)
    dim = k.shape[-1]
    plan = LayerPlan(0, HEADS, dim, dim, rope, (AttendPlan(HEADS, 1.0),))
    constants = lower_layer(plan, SPEC, tables, torch.float32, torch.device("cpu"))
    lowered = LayerTables(*constants.tables)
    codes = quantise_keys(reorder(k[None], constants.key_order), lowered, SPEC)
    error = dequantise_keys(codes, lowered, SPEC)[0] - reorder(k, constants.key_order)
    cost = (error * reorder(grad, constants.key_order)).sum(-1).square().mean()
    return lowered, codes, float(cost)


def test_interleaved_channels_code_as_the_same_channels_in_halves() -> None:
    k, grad = sample(32)
    mixed = torch.arange(32).view(2, 16).T.reshape(-1)  # 0, 16, 1, 17, ...
    halves = stored(k, grad, half_rope(32, 32))
    pairs = stored(k[..., mixed], grad[..., mixed], interleaved_rope(32))
    for name, tensor in halves[0].tensors().items():
        if name.startswith("key"):
            assert torch.equal(tensor, getattr(pairs[0], name)), name
    assert halves[0].key_feedback.any()
    assert torch.equal(halves[1].codes, pairs[1].codes)


@pytest.mark.parametrize(
    ("dim", "rope"),
    [
        (32, half_rope(32, 32)),
        (32, interleaved_rope(32)),
        (64, half_rope(64, 16)),
        (40, half_rope(40, 40)),
        (40, interleaved_rope(40)),
        (40, None),
    ],
)
def test_feedback_lowers_the_cost_in_every_order(dim: int, rope: RopeSpec | None) -> None:
    k, grad = sample(dim)
    tables, _, moved = stored(k, grad, rope)
    assert moved < 0.75 * stored(k, grad, rope, feedback=False)[2]
    matrix = tables.key_feedback
    padding = tables.key_weight == 0
    assert matrix.shape[1:] == padding.shape[1:] * 2
    assert not matrix[padding].any()
    assert not matrix.transpose(1, 2)[padding].any()
