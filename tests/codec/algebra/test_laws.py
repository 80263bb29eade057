"""The laws of the algebra, on random compositions and random tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvquant_compile import testing
from kvquant_compile.codec.algebra import (
    Affine,
    Centre,
    Chain,
    ChannelScale,
    Codec,
    Hadamard,
    Interleave,
    LowRank,
    Lut,
    Normalise,
    Outliers,
    Pipeline,
    Raw,
    Recipe,
    Reorder,
    Rotation,
    Sample,
    Stage,
    Sum,
    Vq,
    repeated,
)
from kvquant_compile.errors import OptionError

# The same examples on every run; raise max_examples and drop derandomize to search for more.
FAST = settings(deadline=None, max_examples=25, derandomize=True)
ORDINARY = (1.0, 1e-3, 100.0)
MAPS = [Hadamard(), Hadamard(heads=2), Rotation(), Interleave(4), Reorder(), ChannelScale(0.5),
        ChannelScale(stat="std"), Centre(), Hadamard() >> Reorder() >> Centre()]  # fmt: skip


def fitted(codec: Codec, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Bytes of tokens [B, H, N, D], and constants fitted to them."""
    constants = codec.fit(Sample(x.transpose(0, 1).flatten(1, 2)))
    return codec.encode_bytes(x.unflatten(2, (-1, codec.tokens)), constants), constants


def tensors(**limits: object) -> st.SearchStrategy[Tensor]:
    return testing.kv_tensors(multiple=32, tokens=(32, 64), scales=ORDINARY, **limits)


@given(testing.codecs(), tensors())
@FAST
def test_every_composition_is_a_codec(codec: Codec, x: Tensor) -> None:
    testing.assert_roundtrip(codec, x)
    testing.assert_deterministic(codec, x)
    testing.assert_append_order_invariant(codec, x)
    testing.assert_effective_bits(codec, x)


@given(testing.codecs(), testing.kv_tensors(multiple=32, tokens=(32, 64)))
@FAST
def test_extreme_tensors_come_back_finite(codec: Codec, x: Tensor) -> None:
    """Zeros, constants, denormals, and values beyond half precision."""
    testing.assert_roundtrip(codec, x)


@given(testing.stages(), testing.stages(), testing.leaves(), tensors())
@FAST
def test_stages_compose_associatively(a: Stage, b: Stage, c: Codec, x: Tensor) -> None:
    left, right = (a >> b) >> c, a >> (b >> c)
    assert left == right == Pipeline((a, b), c)
    nested = Pipeline((a,), Pipeline((b,), c))  # the same, never flattened
    assert torch.equal(fitted(left, x)[0], fitted(nested, x)[0])


@given(testing.leaves(), testing.leaves(), testing.leaves(), tensors())
@FAST
def test_sums_are_associative_and_bits_add_up(a: Codec, b: Codec, c: Codec, x: Tensor) -> None:
    left, right = (a + b) + c, a + (b + c)
    assert left == right == Sum((a, b, c))
    nested = Sum((a, Sum((b, c))))
    assert torch.equal(fitted(left, x)[0], fitted(nested, x)[0])
    dim, tokens = x.shape[-1], left.tokens
    parts = sum(codec.effective_bits(dim, tokens) for codec in (a, b, c))
    assert left.effective_bits(dim) == pytest.approx(parts)


@given(testing.stages(), testing.leaves())
@FAST
def test_a_stage_adds_its_own_bits(stage: Stage, codec: Codec) -> None:
    both = stage >> codec
    expected = stage.effective_bits(32, both.tokens) + codec.effective_bits(32, both.tokens)
    assert both.effective_bits(32) == pytest.approx(expected)


@given(testing.codecs())
@FAST
def test_recipes_are_their_text(codec: Codec) -> None:
    recipe = Recipe("a 'name'", codec, Raw(), pre_rope=False, sinks=3)
    assert Recipe.parse(str(recipe)) == recipe


@given(testing.stages(), tensors())
@FAST
def test_stages_invert(stage: Stage, x: Tensor) -> None:
    testing.assert_inverse(stage, x.clamp(-6e4, 6e4), tolerance=2e-2)


@pytest.mark.parametrize("stage", MAPS, ids=str)
def test_maps_invert_and_store_nothing(stage: Stage) -> None:
    x = testing.named_profiles()["keys"].tensor()
    testing.assert_inverse(stage, x, tolerance=1e-5)
    assert stage.effective_bits(32) == 0


@pytest.mark.parametrize("stage", [Hadamard(), Hadamard(heads=2), Rotation()], ids=str)
def test_rotations_keep_lengths(stage: Stage) -> None:
    x = testing.named_profiles()["keys"].tensor().unflatten(2, (-1, 1))
    y, _ = stage.forward(x, stage.fit(Sample(x.flatten(0, 1).flatten(1, 2))))
    torch.testing.assert_close(y.square().sum((1, 4)), x.square().sum((1, 4)))
    assert (y - x).norm() > 0.1 * x.norm()


def test_only_tied_scales_commute_with_rope() -> None:
    x = testing.named_profiles()["keys"].tensor()
    testing.assert_rope_commutes(ChannelScale(0.5, tied=True), x)
    for stage in (ChannelScale(0.5), Hadamard(), Rotation(), Centre(), Interleave(4)):
        with pytest.raises(AssertionError, match="commute"):
            testing.assert_rope_commutes(stage, x)


IDEMPOTENT = [Affine(2), Affine(3, group=8), Affine(2, "channel", 32), Affine(4, symmetric=True),
              Lut(3), Raw(), Outliers(2) >> Affine(2), Hadamard() >> Affine(4)]  # fmt: skip


@pytest.mark.parametrize("codec", IDEMPOTENT, ids=str)
@pytest.mark.parametrize("name", ["plain", "values", "heavy tail", "constant tokens", "zeros"])
def test_projections(codec: Codec, name: str) -> None:
    x = testing.named_profiles()[name].tensor()
    testing.assert_idempotent(codec, x, tolerance=2e-3, calibration=x)


BOUNDED = [Affine(1), Affine(2), Affine(5, group=8), Affine(3, group=12), Affine(3, "channel", 16),
           Affine(3, symmetric=True), Affine(2, clip=0.8), Affine(3, group=8, two_level=True),
           Affine(3, group=8, symmetric=True, two_level=True)]  # fmt: skip


@given(x=testing.kv_tensors(multiple=16, tokens=(16, 48), scales=(1.0, 1e-3, 100.0, 0.0)))
@FAST
@pytest.mark.parametrize("codec", [*BOUNDED, Raw()], ids=str)
def test_claimed_bounds_hold(codec: Codec, x: Tensor) -> None:
    if float(x.abs().max()) < 6e4:
        testing.assert_error_bound(codec, x)


@pytest.mark.parametrize("codec", [Affine(2), Affine(2, "channel", 16), Raw(),
                                   Normalise() >> Affine(3), LowRank(1, 16)], ids=str)  # fmt: skip
def test_nan_and_infinity_propagate(codec: Codec) -> None:
    x = testing.named_profiles()["plain"].tensor()
    testing.assert_nonfinite_policy(codec, x, "propagate")


@given(testing.codecs(), tensors())
@FAST
def test_nan_and_infinity_stay_in_their_unit(codec: Codec, x: Tensor) -> None:
    testing.assert_nonfinite_policy(codec, x, "contain")


def test_lut_saturates() -> None:
    testing.assert_nonfinite_policy(Lut(3), testing.Profile().tensor(), "saturate")


def test_more_terms_of_a_residual_codec_err_less() -> None:
    x = testing.Profile(tokens=256).tensor()
    errors = []
    for depth in (1, 2, 4, 8):
        codec = Normalise() >> repeated(Vq(16, 8, steps=5), depth)
        data, constants = fitted(codec, x)
        y = codec.decode_bytes(data, constants, 1, 32).flatten(2, 3)
        errors.append(float((y - x).norm() / x.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]
    assert (Normalise() >> repeated(Vq(16, 8), 8)).effective_bits(32) == 8 * 4 / 8 + 16 / 32


def test_low_rank_is_exact_where_the_tokens_are() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 64, 2, generator=g) @ torch.randn(1, 2, 2, 32, generator=g)
    testing.assert_roundtrip(LowRank(2, 64), x, tolerance=1e-3)
    with pytest.raises(AssertionError, match="relative error"):
        testing.assert_roundtrip(LowRank(1, 64), x, tolerance=1e-3)


def test_a_reordered_group_errs_less_than_a_mixed_one() -> None:
    x = testing.Profile(tokens=64, channel_spread=1.0, offset=0.0).tensor()
    errors = []
    for codec in (Affine(2, group=8), Reorder() >> Affine(2, group=8)):
        data, constants = fitted(codec, x)
        y = codec.decode_bytes(data, constants, 1, 32).flatten(2, 3)
        errors.append(float(((y - x) / x.std((0, 2), keepdim=True)).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_operators_refuse_what_does_not_compose() -> None:
    with pytest.raises(TypeError):
        Affine(2) >> Hadamard()  # type: ignore[operator]
    with pytest.raises(TypeError):
        Affine(2) + Hadamard()  # type: ignore[operator]
    assert Hadamard() >> Centre() == Chain((Hadamard(), Centre()))


@pytest.mark.parametrize("make", [
    lambda: Affine(0), lambda: Affine(9), lambda: Affine(2, "row"), lambda: Affine(2, "channel"),
    lambda: Affine(2, "channel", 16, two_level=True), lambda: Lut(9), lambda: Vq(100),
    lambda: Outliers(0), lambda: Outliers(1, "channel"), lambda: Outliers(1, "token", 4),
    lambda: Normalise("mean"), lambda: ChannelScale(stat="rms"), lambda: LowRank(9, 8),
    lambda: repeated(Raw(), 0), lambda: Recipe("r", Affine(2, "channel", 48), Raw()),
    lambda: Recipe("r", Raw(), Raw(), sinks=65),
])  # fmt: skip
def test_senseless_blocks_are_refused(make: object) -> None:
    with pytest.raises(OptionError):
        make()  # type: ignore[operator]
