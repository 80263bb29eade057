"""The strategies: what they draw, and the error where hypothesis is missing."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvquant_compile import testing
from kvquant_compile.errors import KVQuantError, MissingDependencyError
from kvquant_compile.testing import Profile

FAST = settings(deadline=None, max_examples=30)


@given(testing.kv_tensors(batch=(1, 2), heads=(2, 3), tokens=(8, 40), dims=(16, 48), multiple=8))
@FAST
def test_tensors_have_the_shape_that_was_asked_for(x: Tensor) -> None:
    batch, heads, tokens, dim = x.shape
    assert (1 <= batch <= 2, 2 <= heads <= 3, dim in (16, 48)) == (True,) * 3
    assert 8 <= tokens <= 40
    assert tokens % 8 == 0
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: bool(x.isnan().any()),
        lambda x: bool((x == torch.inf).any()),
        lambda x: bool((x == -torch.inf).any()),
        lambda x: bool(x.isfinite().all()) and float(x.abs().max()) > 1e20,
        lambda x: 0 < float(x.abs().max()) < 1e-37,
        lambda x: bool((x == 0).all()),
        lambda x: x.shape[2] > 4 and bool((x[:, :, :1] == x).all()) and bool((x != 0).any()),
        lambda x: float(x[:, :, 0].abs().mean()) > 30 * float(x[:, :, 1:].abs().mean()) > 0,
    ],
    ids=["nan", "inf", "-inf", "huge", "denormal", "zeros", "constant channels", "sink"],
)
def test_every_kind_of_tensor_is_drawn(kind: object) -> None:
    find(
        testing.kv_tensors(nonfinite=True),
        kind,
        settings=settings(max_examples=3000, derandomize=True),
    )


def test_examples_shrink_to_small_ordinary_tensors() -> None:
    profile = find(testing.profiles(), lambda p: p.tokens >= 5)
    assert profile == Profile(1, 1, 5, 16, channel_spread=0.0, offset=0.0, token_spread=0.0)


def test_a_profile_always_gives_the_same_tensor() -> None:
    profile = Profile(tail=3.0, massive_tokens=2, outlier_channels=1)
    assert torch.equal(profile.tensor(), profile.tensor())
    assert not torch.equal(profile.tensor(), Profile(tail=3.0, seed=1).tensor())


def test_named_profiles_are_what_their_names_say() -> None:
    found = {name: p.tensor() for name, p in testing.named_profiles(16, 32).items()}
    assert all(x.shape == (1, 2, 32, 16) and x.isfinite().all() for x in found.values())
    keys = found["keys"]
    assert (keys.mean(2).abs() / keys.std(2)).max() > 4
    assert found["zeros"].abs().max() == 0
    assert 0 < found["denormals"].abs().max() < 1e-37
    assert found["huge"].abs().max() > 1e30
    assert (found["one value"] == found["one value"][:, :, :1, :1]).all()
    assert found["sink"][:, :, 0].abs().mean() > 30 * found["sink"][:, :, 1:].abs().mean()


@given(st.integers(1, 50), st.integers(1, 4), st.data())
@FAST
def test_pieces_add_up(units: int, multiple: int, data: st.DataObject) -> None:
    pieces = data.draw(testing.splits(units * multiple, multiple))
    assert sum(pieces) == units * multiple
    assert all(piece > 0 and piece % multiple == 0 for piece in pieces)


def test_without_hypothesis_the_strategies_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "kvquant_compile.testing.strategies")
    monkeypatch.delattr(testing, "strategies")
    with pytest.raises(MissingDependencyError, match=r"pip install .*test") as caught:
        testing.kv_tensors  # noqa: B018
    assert isinstance(caught.value, KVQuantError)
    assert isinstance(caught.value, ImportError)
    testing.assert_roundtrip(lambda x: x, Profile().tensor())
    monkeypatch.undo()
    importlib.import_module("kvquant_compile.testing.strategies")


def test_unknown_names_are_no_strategies() -> None:
    with pytest.raises(AttributeError, match="no attribute 'kv_tensor'"):
        testing.kv_tensor  # type: ignore[attr-defined] # noqa: B018
