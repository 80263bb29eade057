"""Keys stored before RoPE: attention depends on relative positions only, as the original's does."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering import ops
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.plan import AttendPlan, LayerPlan, RopeSpec
from kvquant_compile.runtime.cache import QuantizedCache
from tests.lowering import reference as ref

CPU = torch.device("cpu")


def attend(rope: RopeSpec, shift: int, seed: int, query_shift: int = 0) -> torch.Tensor:
    """Outputs of 70 random tokens whose positions start at ``shift``, read from 3-bit pages."""
    torch.manual_seed(seed)
    plan = LayerPlan(0, 2, 32, 32, rope, (AttendPlan(4, 32**-0.5),))
    spec = CodecSpec(3, 3, 1, 1, True, 1)
    constants = lower_layer(plan, spec, ref.uniform_tables(spec, 2, 32, 32), torch.float32, CPU)
    cache = QuantizedCache([constants.layout], torch.float32, CPU)
    q, k, v = torch.randn(1, 4, 70, 32), torch.randn(1, 2, 70, 32), torch.randn(1, 2, 70, 32)
    positions = torch.arange(shift, shift + 70)[None]
    step, layer = cache.begin(positions, None), cache.pages[0]
    tables, geometry = constants.arguments()
    shared = (layer.slabs, layer.sinks, tables, geometry)
    ops.append(k, v, step.slots, cache.table, *shared, str(constants.layout))
    turned = [ref.rotate(q, positions + query_shift, rope), ref.rotate(k, positions, rope)]
    output, _ = ops.attend(
        *turned, v, step.slots, step.history, cache.table, cache.positions, *shared, None,
        32**-0.5, 0.0, 0, False, str(constants.layout))  # fmt: skip
    return output


@settings(max_examples=15, deadline=None)
@given(shift=st.integers(1, 4000), seed=st.integers(0, 2**16), interleaved=st.booleans())
def test_shifting_every_position_changes_nothing(shift: int, seed: int, interleaved: bool) -> None:
    rope = ref.interleaved_rope(32) if interleaved else ref.half_rope(32, 32)
    moved, still = attend(rope, shift, seed), attend(rope, 0, seed)
    # Angles are float32 products of position and frequency: 4000 rad are known to 2.4e-4.
    torch.testing.assert_close(moved, still, rtol=0, atol=2e-3)


def test_the_property_can_fail() -> None:
    """Queries that are one position off are noticed."""
    rope = ref.half_rope(32, 32)
    assert (attend(rope, 7, 0, query_shift=1) - attend(rope, 7, 0)).abs().max() > 0.02
