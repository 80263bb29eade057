"""Assertions about values: what comes back, how far off, and what NaN and infinity do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvquant_compile.testing.subject import Subject, Testable, subjects

POLICIES = ("propagate", "saturate", "contain")


def assert_roundtrip(
    codec: Testable,
    x: Tensor,
    *,
    tolerance: float | None = None,
    calibration: Tensor | None = None,
) -> None:
    """Tokens come back in their shape, finite, and the input stays as it was.

    Args:
        codec: anything that :data:`~kvquant_compile.testing.Testable` lists.
        x: finite tokens [B, H, N, D].
        tolerance: largest norm of the error over the norm of ``x``; None leaves it open.
        calibration: what constants are fitted to; ``x`` if None.

    Raises:
        AssertionError: one of these does not hold.
    """
    for subject in subjects(codec, x, calibration):
        before = x.clone()
        y = subject.trip(x)
        _same_bits(subject, "encode changed its input", x, before)
        _shape(subject, y, x)
        if not bool(y.isfinite().all()):
            raise AssertionError(f"{subject.name}: finite tokens came back {_first_bad(y)}")
        if tolerance is not None:
            error = float((y.double() - x.double()).norm() / x.double().norm().clamp_min(1e-300))
            if not error <= tolerance:
                raise AssertionError(f"{subject.name}: relative error {error:.4g} > {tolerance:g}")


def assert_error_bound(
    codec: Testable,
    x: Tensor,
    bound: float | Tensor | Callable[[Tensor], Tensor] | None = None,
    *,
    calibration: Tensor | None = None,
) -> None:
    """No element is farther off than its bound.

    Args:
        codec, x, calibration: as of :func:`assert_roundtrip`.
        bound: absolute errors: a number, a tensor that broadcasts to ``x``, or a function of
            ``x``; None takes the bound that the codec itself claims.

    Raises:
        AssertionError: an element is farther off, or no bound is known.
    """
    for subject in subjects(codec, x, calibration):
        if bound is None:
            limit = subject.bound(x)
            if limit is None:
                raise AssertionError(f"{subject.name} claims no error bound; pass one")
        else:
            limit = torch.as_tensor(bound(x) if callable(bound) else bound)
        error = (subject.trip(x).double() - x.double()).abs()
        # What float32 itself rounds away in computing code * scale + zero.
        excess = error - limit.double() - 1e-6 * x.double().abs().amax()
        if not bool((excess <= 0).all()):
            raise AssertionError(f"{subject.name}: {_worst(excess, x, error, limit)}")


def assert_idempotent(
    codec: Testable,
    x: Tensor,
    *,
    tolerance: float = 1e-3,
    calibration: Tensor | None = None,
) -> None:
    """What came back once comes back as it is: decode and encode are projections.

    Args:
        codec, x, calibration: as of :func:`assert_roundtrip`.
        tolerance: largest norm of the second error over the norm of the tokens.

    Raises:
        AssertionError: the second trip changes more than that.
    """
    for subject in subjects(codec, x, calibration):
        once = subject.trip(x)
        twice = subject.trip(once)
        change = float((twice - once).double().norm() / once.double().norm().clamp_min(1e-300))
        if not change <= tolerance:
            raise AssertionError(
                f"{subject.name}: a second trip changes tokens by {change:.3g} > {tolerance:g}"
            )


def assert_unbiased(
    codec: Testable,
    x: Tensor,
    *,
    tolerance: float = 0.1,
    calibration: Tensor | None = None,
) -> None:
    """Errors do not shift or shrink tokens: attention averages noise away, and keeps a bias.

    Args:
        codec, x, calibration: as of :func:`assert_roundtrip`.
        tolerance: largest mean error in deviations of ``x``, and largest distance from 1 of the
            slope of what comes back regressed on what went in.

    Raises:
        AssertionError: one of them is larger.
    """
    for subject in subjects(codec, x, calibration):
        a, b = x.double(), subject.trip(x).double()
        deviation = a.std().clamp_min(1e-300)
        shift = float((b - a).mean().abs() / deviation)
        centred = a - a.mean()
        slope = float((centred * (b - b.mean())).sum() / centred.square().sum().clamp_min(1e-300))
        if not (shift <= tolerance and abs(slope - 1) <= tolerance):
            raise AssertionError(
                f"{subject.name}: shifted by {shift:.3g} deviations, slope {slope:.4g}; "
                f"tolerance {tolerance:g}"
            )


def assert_nonfinite_policy(
    codec: Testable,
    x: Tensor,
    policy: str = "propagate",
    *,
    calibration: Tensor | None = None,
) -> None:
    """A NaN or infinity does what it is said to, and touches no other unit of tokens.

    One element is replaced by NaN, infinity and minus infinity in turn. Tokens outside its unit
    (``codec.tokens`` neighbours) must come back with the same bits in every case.

    Args:
        codec, x, calibration: as of :func:`assert_roundtrip`; ``x`` is finite.
        policy: "propagate": the element comes back NaN or infinite; "saturate": everything comes
            back finite; "contain": only the other tokens are looked at.

    Raises:
        AssertionError: it does not hold.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is none of {POLICIES}")
    for subject in subjects(codec, x, x if calibration is None else calibration):
        clean = subject.trip(x)
        token, channel = x.shape[2] // 2, x.shape[3] // 2
        unit = token // subject.tokens * subject.tokens
        others = torch.ones(x.shape[2], dtype=torch.bool)
        others[unit : unit + subject.tokens] = False
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoilt = x.clone()
            spoilt[-1, 0, token, channel] = bad
            y = subject.trip(spoilt)
            what = f"{bad} in token {token}"
            _same_bits(subject, f"{what} changed another sequence", y[:-1], clean[:-1])
            changed = f"{what} changed tokens outside {unit}..{unit + subject.tokens - 1}"
            _same_bits(subject, changed, y[-1][:, others], clean[-1][:, others])
            back = y[-1, 0, token, channel]
            if policy == "propagate" and bool(back.isfinite()):
                raise AssertionError(f"{subject.name}: {bad} came back as {float(back):g}")
            if policy == "saturate" and not bool(y.isfinite().all()):
                raise AssertionError(f"{subject.name}: {what} came back {_first_bad(y)}")


def _shape(subject: Subject, y: Tensor, x: Tensor) -> None:
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.dtype.is_floating_point:
        got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise AssertionError(f"{subject.name}: {tuple(x.shape)} came back as {got}")


def _same_bits(subject: Subject, what: str, a: Tensor, b: Tensor) -> None:
    if not torch.equal(torch.nan_to_num(a, 7e37), torch.nan_to_num(b, 7e37)):
        raise AssertionError(f"{subject.name}: {what}")


def _first_bad(y: Tensor) -> str:
    place = (~y.isfinite()).nonzero()[0].tolist()
    return f"{float(y[tuple(place)])} at [batch, head, token, channel] {place}"


def _worst(excess: Tensor, x: Tensor, error: Tensor, limit: Tensor) -> str:
    flat = int(torch.nan_to_num(excess, nan=torch.inf).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), x.shape)]
    at = tuple(place)
    return (
        f"{float(x[at]):g} at [batch, head, token, channel] {place} is off by "
        f"{float(error[at]):g}, bound {float(limit.expand(x.shape)[at]):g}"
    )
