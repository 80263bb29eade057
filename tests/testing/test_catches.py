"""Every assertion catches a codec that is broken in just its way, and passes a sound one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvquant_compile import testing
from kvquant_compile.codec.algebra import (
    Affine,
    Constants,
    Hadamard,
    Map,
    Parts,
    Raw,
    Recipe,
    Tail,
)
from kvquant_compile.errors import OptionError

X = testing.Profile(batch=2, tokens=64, seed=1).tensor()


class Sound:
    """Round to halves of the token's largest magnitude over 127; a stored byte and a scale."""

    tokens = 1

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True) / 127
        codes = torch.nan_to_num((x / scale.clamp_min(1e-30)).round()).clamp(-127, 127)
        return codes.to(torch.int8), scale

    def decode(self, code: tuple[Tensor, Tensor]) -> Tensor:
        return code[0].float() * code[1]


class WrongShape(Sound):
    def decode(self, code: tuple[Tensor, Tensor]) -> Tensor:
        return super().decode(code)[..., :-1]


class Overwrites(Sound):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = super().encode(x)
        x.mul_(2)
        return out


class DividesByZero(Sound):
    """Zeros become NaN: the scale of a token of zeros."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = super().encode(x)
        return codes, scale / scale * scale


class OffByOne(Sound):
    """One channel of every token is a step too high."""

    def decode(self, code: tuple[Tensor, Tensor]) -> Tensor:
        codes = code[0].float()
        codes[..., 3] += 1
        return codes * code[1]


class Shrinks(Sound):
    def decode(self, code: tuple[Tensor, Tensor]) -> Tensor:
        return 0.8 * super().decode(code)


class Shifts(Sound):
    def decode(self, code: tuple[Tensor, Tensor]) -> Tensor:
        return super().decode(code) + X.std()


class RandomRounding(Sound):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = super().encode(x)
        return codes + torch.randint_like(codes, 0, 2), scale


class OneScaleForTheBatch(Sound):
    """Not the codec's tokens alone decide."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = (x.abs().amax() / 127).reshape(1)
        return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


class ReadsMemoryOrder(Sound):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = super().encode(x)
        return codes + int(not x.is_contiguous()), scale


class RemembersTheLast(Sound):
    """The first token's scale of every call is used for all."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True)[:, :, :1] / 127
        codes = torch.nan_to_num(x / scale).round().clamp(-127, 127)
        return codes.to(torch.int8), scale.expand(*x.shape[:-1], 1).contiguous()


class KeepsTheOriginal(Sound):
    """Silently exact."""

    def encode(self, x: Tensor) -> Any:
        return *super().encode(x), x

    def decode(self, code: Any) -> Tensor:
        return code[2]


class StoresForNothing(Sound):
    def encode(self, x: Tensor) -> Any:
        return *super().encode(x), x.half()

    def decode(self, code: Any) -> Tensor:
        return super().decode(code[:2])


class ReadsHalf(Sound):
    """The upper channels are not read from where they are stored."""

    def decode(self, code: tuple[Tensor, Tensor]) -> Tensor:
        half = code[0].shape[-1] // 2
        return torch.cat([code[0][..., :half]] * 2, -1).float() * code[1]


class Spreads(Sound):
    """A NaN in one token spoils the next one."""

    def decode(self, code: tuple[Tensor, Tensor]) -> Tensor:
        y = super().decode(code)
        return y + 0 * y.roll(1, 2)


class Swallows(Sound):
    """NaN comes back as a number."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().encode(torch.nan_to_num(x, 0.0, 1.0, -1.0))


class Unchanged(Map):
    def apply(self, x: Tensor, constants: Constants) -> Tensor:
        return x

    def undo(self, y: Tensor, constants: Constants) -> Tensor:
        return y


class NotUndone(Unchanged):
    def apply(self, x: Tensor, constants: Constants) -> Tensor:
        return 1.01 * x


class ForgetsTheTail(Affine):
    """A unit's codes depend on how many units come with it."""

    def encode(self, x: Tensor, constants: Constants) -> Parts:
        codes, *rest = super().encode(x, constants)
        return codes ^ int(x.shape[2] > 1), *rest


ZEROS = torch.zeros(1, 1, 4, 16)
CAUGHT = [
    (testing.assert_roundtrip, WrongShape(), {}, "came back as"),
    (testing.assert_roundtrip, Overwrites(), {}, "changed its input"),
    (testing.assert_roundtrip, DividesByZero(), {"x": ZEROS}, "came back nan"),
    (testing.assert_roundtrip, Shrinks(), {"tolerance": 0.05}, "relative error"),
    (testing.assert_error_bound, OffByOne(), {"bound": lambda x: x.abs().amax() / 200}, "off by"),
    (testing.assert_error_bound, Sound(), {}, "claims no error bound"),
    (testing.assert_idempotent, Shrinks(), {}, "second trip"),
    (testing.assert_unbiased, Shrinks(), {}, "slope 0.79"),
    (testing.assert_unbiased, Shifts(), {}, "shifted by 1"),
    (testing.assert_deterministic, RandomRounding(), {}, "a second time"),
    (testing.assert_deterministic, ReadsMemoryOrder(), {}, "transposed"),
    (testing.assert_deterministic, OneScaleForTheBatch(), {}, "alone in its batch"),
    (testing.assert_append_order_invariant, RemembersTheLast(), {}, "how they came"),
    (testing.assert_append_order_invariant,
     Recipe("lazy", ForgetsTheTail(2), Raw(), key_tail=Tail(recent=3)), {}, "how the tokens came"),
    (testing.assert_effective_bits, StoresForNothing(), {"expected": 9.0}, "stores 25.0000 bits"),
    (testing.assert_effective_bits, Sound(), {}, "declares no"),
    (testing.assert_bytes_matter, KeepsTheOriginal(), {}, "come back exactly"),
    (testing.assert_bytes_matter, StoresForNothing(), {}, "never read"),
    (testing.assert_bytes_matter, ReadsHalf(), {}, r"\[..., 16:18\] of stored tensor 0"),
    (testing.assert_bytes_matter, lambda x: x, {}, "come back exactly"),
    (testing.assert_nonfinite_policy, Spreads(), {"policy": "contain"}, "changed tokens outside"),
    (testing.assert_nonfinite_policy, OneScaleForTheBatch(), {}, "another sequence"),
    (testing.assert_nonfinite_policy, Swallows(), {}, "came back as"),
    (testing.assert_nonfinite_policy, Sound(), {"policy": "saturate"}, "came back nan"),
    (testing.assert_inverse, NotUndone(), {}, "undone"),
    (testing.assert_rope_commutes, Hadamard(), {}, "does not commute"),
    (testing.assert_rope_commutes, lambda x: x * torch.arange(32), {}, "does not commute"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "codec", "options", "message"),
    CAUGHT,
    ids=[f"{c[0].__name__}-{getattr(c[1], 'name', type(c[1]).__name__)}-{c[3]}" for c in CAUGHT],
)
def test_a_broken_codec_is_caught(check: Any, codec: Any, options: Any, message: str) -> None:
    options = dict(options)
    x = options.pop("x", X).clone()
    with pytest.raises(AssertionError, match=message):
        check(codec, x, **options)


def test_a_sound_codec_passes_everything() -> None:
    sound = Sound()
    testing.assert_roundtrip(sound, X, tolerance=0.01)
    testing.assert_error_bound(sound, X, lambda x: x.abs().amax(-1, keepdim=True) / 250)
    testing.assert_idempotent(sound, X)
    testing.assert_unbiased(sound, X, tolerance=0.01)
    testing.assert_deterministic(sound, X)
    testing.assert_append_order_invariant(sound, X)
    testing.assert_append_order_invariant(sound, X, [10, 54])
    testing.assert_effective_bits(sound, X, 8 + 32 / 32)
    testing.assert_bytes_matter(sound, X)
    testing.assert_nonfinite_policy(sound, X, "contain")
    testing.assert_inverse(Unchanged(), X)
    testing.assert_rope_commutes(Unchanged(), X)


def test_a_function_is_a_codec() -> None:
    testing.assert_roundtrip(lambda x: x.half().float(), X, tolerance=1e-3)
    with pytest.raises(AssertionError, match="relative error"):
        testing.assert_roundtrip(torch.zeros_like, X, tolerance=0.5)


def test_misuse_is_told_apart_from_failure() -> None:
    with pytest.raises(OptionError, match="no encode and decode"):
        testing.assert_roundtrip("kivi", X)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="multiple of 48"):
        testing.assert_roundtrip(Affine(2, "channel", 48), X)
    with pytest.raises(ValueError, match="policy"):
        testing.assert_nonfinite_policy(Sound(), X, "ignore")
    with pytest.raises(ValueError, match="pieces"):
        testing.assert_append_order_invariant(Sound(), X, [1, 2])
