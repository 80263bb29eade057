"""Every line of the ablation changes what is read back, and nothing beyond what it names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.ablation_codecs import Layer, Variant, variants
from kvquant_compile.calib.observe import Observed
from kvquant_compile.evaluate.stored import KEYS, VALUES
from kvquant_compile.plan import LayerPlan, RopeSpec

DIM, TOKENS = 32, 400
PAIRS = tuple((i, i + DIM // 2) for i in range(DIM // 2))
ROPE = RopeSpec(PAIRS, PAIRS, tuple(0.5**i for i in range(DIM // 2)))
EVERY = variants()


def layer() -> Layer:
    """Two heads with channel offsets, token scales and low-rank gradients."""
    g = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    spread = draw(2, 1, DIM).exp() * (1 + draw(2, TOKENS, 1).abs())
    keys, values = draw(2, TOKENS, DIM) * spread + 4 * draw(2, 1, DIM), draw(2, TOKENS, DIM).exp()
    keys[:, 0] *= 9
    grads = [draw(2, TOKENS, 6) @ draw(2, 6, DIM) for _ in range(2)]
    plan = LayerPlan(0, 2, DIM, DIM, ROPE, ())
    return Layer(plan, Observed(keys, values, grads[0], grads[1], torch.arange(TOKENS)))


LAYER = layer()
X = {KEYS: LAYER.seen.keys[None], VALUES: LAYER.seen.values[None]}
DEFAULT = {part: trip(X[part]) for part, trip in EVERY[0].trips(LAYER, 2).items()}
ONE_PART = {"key": VALUES, "value": KEYS}


@pytest.mark.parametrize("variant", EVERY[1:], ids=lambda v: v.name)
def test_a_variant_changes_what_it_names(variant: Variant) -> None:
    read = {part: trip(X[part]) for part, trip in variant.trips(LAYER, 2).items()}
    changed = [part for part in read if not torch.equal(read[part], DEFAULT[part])]
    assert changed
    untouched = [other for word, other in ONE_PART.items() if word in variant.name]
    assert not set(untouched) & set(changed)
    assert all(bool((x - X[part]).norm() < X[part].norm()) for part, x in read.items())


def test_bytes_of_what_formats_lack_are_counted() -> None:
    bits = {v.name: v.effective_bits(LAYER, 2, 1024) for v in EVERY}
    default = bits["default"]
    assert default == pytest.approx(2 + (2 * 24 + 16 + 32) / (2 * DIM) + 16 / 1024)
    assert bits["value range in two bytes"] == pytest.approx(default - 16 / (2 * DIM))
    assert bits["largest 1 % of tokens exact"] == pytest.approx(default + 0.16)
    assert bits["no exact first token"] == pytest.approx(default - 16 / 1024)
