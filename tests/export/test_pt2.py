"""torch.export archives: what is loaded generates what the optimised model does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile import OptionError, export_pt2, load_pt2
from kvquant_compile.export.native_ops import NativeOps
from kvquant_compile.export.step import StepModule, stores_of
from kvquant_compile.export.trace import example_inputs, trace_step
from kvquant_compile.runtime.installed import installed
from tests.zoo import decoder, tiny, tokens

CALIBRATION = tokens(4, 64, seed=7)
NEW = 20


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return kvquant_compile.optimize(tiny("llama"), 3, calibration=CALIBRATION, recent_window=0)


def empty(model: Any, batch: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Lengths, pages and sinks."""
    return example_inputs(stores_of(installed(model)), True, batch, 1, 2)[2:]


def text(step: Any, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Greedy tokens of a loaded archive."""
    lengths, pages, sinks = empty(model, len(ids))
    new: list[Tensor] = []
    for _ in range(NEW):
        with torch.no_grad():
            logits, lengths, pages, sinks = step(ids, mask, lengths, pages, sinks)
        ids = logits[:, -1:].argmax(-1)
        mask, new = torch.ones_like(ids), [*new, ids]
    return torch.cat(new, 1)


def check(model: Any, step: Any) -> None:
    """A batch with left padding, and one sequence."""
    for batch, length in ((2, 70), (1, 9)):
        ids = tokens(batch, length)
        mask = torch.ones_like(ids)
        mask[1:, :20] = 0
        expected = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert torch.equal(text(step, model, ids, mask), expected[:, length:])


def test_our_ops(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = export_pt2(llama, tmp_path / "model.pt2")
    check(llama, load_pt2(path))
    names = {
        str(n.target) for n in torch.export.load(path).graph.nodes if "kvquant" in str(n.target)
    }
    assert {"kvquant.append.default", "kvquant.attend.default"} <= names


def test_exact_last_tokens_stay_behind_and_a_warning_says_so(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    model = kvquant_compile.optimize(tiny("llama"), 3, calibration=CALIBRATION)
    with pytest.warns(UserWarning, match=r"no exact last tokens \(recent_window=16\)"):
        path = export_pt2(model, tmp_path / "model.pt2")
    check(llama, load_pt2(path))  # of the same tables


def test_a_hand_written_decoder_takes_no_mask(tmp_path: Path) -> None:
    model, ids = decoder("SdpaDecoder").eval(), tokens(2, 9)
    kvquant_compile.optimize(
        model, 3, calibration=CALIBRATION, example_inputs=(ids, None), recent_window=0
    )
    step, cache = load_pt2(export_pt2(model, tmp_path / "model.pt2")), empty(model, 2)
    with torch.no_grad():
        first, past = model(ids, None)
        got, *cache = step(ids, None, *cache)
        torch.testing.assert_close(got, first)
        second, past = model(ids[:, :1], past)
        torch.testing.assert_close(step(ids[:, :1], None, *cache)[0], second)


@pytest.mark.slow
def test_standard_ops_need_torch_alone(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = export_pt2(llama, tmp_path / "model.pt2", ops="standard")
    check(llama, load_pt2(path))
    lengths, pages, sinks = empty(llama, 1)
    ids = tokens(1, 9)
    inputs = (ids, torch.ones_like(ids), lengths, pages, sinks)
    with torch.no_grad():
        expected = load_pt2(path)(*inputs)[0]
    torch.save((inputs, expected), tmp_path / "case.pt")
    script = (
        "import sys, torch\n"
        f"inputs, expected = torch.load({str(tmp_path / 'case.pt')!r})\n"
        f"step = torch.export.load({str(path)!r}).module()\n"
        "assert torch.equal(step(*inputs)[0], expected)\n"
        "assert 'kvquant_compile' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=500)


@pytest.fixture(scope="module")
def compiled(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What AOTInductor makes of the step, and the step."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    state = installed(llama)
    step = StepModule(state, stores_of(state), NativeOps())
    path = str(tmp_path_factory.mktemp("aoti") / "model.pt2")
    aoti_compile_and_package(trace_step(step), package_path=path)
    return aoti_load_package(path), step


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "length"), [(2, 6), (1, 5)])
def test_aotinductor(llama: Any, compiled: Any, batch: int, length: int) -> None:
    ids = tokens(batch, length)
    outputs = []
    for run in compiled:
        with torch.no_grad():
            outputs.append(run(ids, torch.ones_like(ids), *empty(llama, batch)))
    (theirs, _, pages, _), (logits, _, expected, _) = outputs
    torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(pages, expected, strict=True):
        assert float((got != wanted).float().mean()) < 1e-3


@pytest.mark.slow
def test_text_of_aotinductor(llama: Any, compiled: Any) -> None:
    check(llama, compiled[0])


def test_unknown_ops_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="known are kvquant, standard"):
        export_pt2(llama, tmp_path / "model.pt2", ops="onnx")
    assert not list(tmp_path.iterdir())
