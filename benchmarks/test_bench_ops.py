"""pytest-benchmark: the ops on a GPU, eager, launches included. Run with ``make bench``.

For times without launches see ``benchmarks/decode_attention.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.cases import DEFAULT, FORMATS, Format, Size
from benchmarks.contenders import ours, sdpa

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = pytest.mark.parametrize(
    "size", [Size(32, 8, 8192), Size(32, 8, 131072)], ids=lambda s: s.name
)


def synchronised(call: Any) -> Any:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


@SIZES
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_attend(benchmark: Any, form: Format, size: Size) -> None:
    contender = ours(form, size, torch.device("cuda"))
    output, lse = contender.calls[0]()
    assert output.isfinite().all()
    assert lse.isfinite().all()
    benchmark.extra_info.update(cache_bytes=contender.cache_bytes)
    benchmark(synchronised(contender.calls[0]))


@SIZES
def test_flash(benchmark: Any, size: Size) -> None:
    contender = sdpa(torch.bfloat16, SDPBackend.FLASH_ATTENTION, size, torch.device("cuda"))
    benchmark.extra_info.update(cache_bytes=contender.cache_bytes, peer_of=DEFAULT.name)
    benchmark(synchronised(contender.calls[0]))
