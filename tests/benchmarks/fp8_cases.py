"""The FP8 baseline in Triton's interpreter, against float64 attention over the same numbers."""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.fp8_baseline import SETTINGS, VALUE_BLOCK, Setting, decode
from tests.triton.cases import relative_error

BOUND = 1e-3


def error(tokens: int, rep: int, dim: int, setting: Setting) -> float:
    """Relative error of two sequences with two kv heads each."""
    torch.manual_seed(tokens)
    q = torch.randn(2, 2 * rep, 1, dim).half()
    k, v = (torch.randn(2, 2, tokens, dim).to(torch.float8_e4m3fn) for _ in "kv")
    blocks = -(-tokens // VALUE_BLOCK)
    padded = pad(v.float(), (0, 0, 0, blocks * VALUE_BLOCK - tokens))
    stored = padded.unflatten(2, (blocks, VALUE_BLOCK)).transpose(-1, -2).to(v.dtype)
    got = decode(q, k, stored.contiguous(), tokens, setting)
    expected = scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), enable_gqa=rep > 1
    )  # fmt: skip
    return relative_error(got, expected)


def main() -> None:
    """Print every case; fail on the first that is wrong."""
    for tokens, rep, dim in ((300, 4, 32), (256, 1, 64), (1, 8, 32)):
        for setting in SETTINGS:
            worst = error(tokens, rep, dim, setting)
            print(f"{tokens} tokens, group of {rep}, {dim}: {setting.name}: {worst:.1e}")
            if not worst < BOUND:
                sys.exit(1)


if __name__ == "__main__":
    main()
