"""Gradients of the loss with respect to keys and values, which calibration weights them by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvquant_compile.errors import CalibrationError


def loss_gradients(loss: Tensor, found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of a scalar with respect to every tensor.

    Raises:
        CalibrationError: layers behind one of them pass no gradients back.
    """
    reached: Sequence[Tensor | None] = ()
    try:
        if loss.requires_grad:
            reached = torch.autograd.grad(loss, found, allow_unused=True)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
    whole = tuple(gradient for gradient in reached if gradient is not None)
    if len(whole) < len(found):
        raise CalibrationError(
            "the model cannot be calibrated with gradients",
            why="some of its layers pass none back (quantised weights with kernels for inference)",
            do='Pass sensitivity="none" to calibrate without.',
        )
    return whole
