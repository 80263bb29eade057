"""The generated kernels that explain shows: really those of the layer, and whole."""

from __future__ import annotations

import json

import pytest

import kvquant_compile
from kvquant_compile.errors import OptionError
from kvquant_compile.lowering.triton.compat import unavailable
from tests.zoo import tiny, tokens

TEXT = tokens(4, 64, seed=7)
pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")


@pytest.fixture(autouse=True)
def no_kernels_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without kernels of its own is shown those of a GPU."""
    monkeypatch.setenv("KVQUANT_KERNELS", "torch")


@pytest.fixture(scope="module")
def model() -> object:
    return kvquant_compile.optimize(tiny("llama"), {0: 3, 1: (4, 2)}, calibration=TEXT)


def only(model: object, layer: int) -> dict[str, str]:
    (source,) = kvquant_compile.explain(model, layer=layer, source=True).sources
    assert (source.index, source.reason) == (layer, "")
    return dict(source.kernels)


def test_the_source_is_the_layer_s_own(model: object) -> None:
    first, second = only(model, 0), only(model, 1)
    assert list(first) == ["history_k3v3_d16x16_rope1_1_slots10_n4_scaled_recent16"]
    assert list(second) == ["history_k4v2_d16x16_rope1_1_slots10_n4_scaled_recent16"]


def test_the_source_is_whole_and_what_is_compiled(model: object) -> None:
    from kvquant_compile.lowering.triton.module import load

    ((name, text),) = only(model, 0).items()
    golden = ("@triton.jit", f"def {name}(", "for start in tl.range(first, end, W",
              "pages = (limit + 63) // 64", "# softmax, in units of log 2",
              "weight = tl.exp2(score * unit[:, None, :] - ground[:, None, :])", "tl.dot(",
              "run = NO_RUN", "tl.store(partial")  # fmt: skip
    assert [part for part in golden if part not in text] == []
    compile(text, name, "exec")
    kernel = load(text, name)
    assert kernel.arg_names[:3] == ["query", "query_order", "slots"]


@pytest.mark.parametrize(
    ("name", "part"), [("gemma2", "softcap"), ("gpt2", "rope0"), ("cohere", "_order")]
)
def test_what_a_model_needs_is_in_its_kernel(name: str, part: str) -> None:
    model = kvquant_compile.optimize(tiny(name), 2, calibration=TEXT)
    sources = kvquant_compile.explain(model, source=True).sources
    assert [source.index for source in sources] == [0, 1]
    assert all(part in str(source) for source in sources)
    windows = [any("_window" in kernel for kernel in source.kernels) for source in sources]
    assert windows == ([True, False] if name == "gemma2" else [False, False])


def test_lossless_layers_say_why_there_is_none() -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits=16)
    report = kvquant_compile.explain(model, layer=1, source=True)
    assert report.sources[0].kernels == {}
    assert "lossless" in report.sources[0].reason
    assert "layer 1: no generated kernel: lossless" in str(report)


def test_the_printed_report_and_the_dict_hold_the_source(model: object) -> None:
    report = kvquant_compile.explain(model, layer=1, source=True)
    ((name, text),) = only(model, 1).items()
    lines = [line for line in text.splitlines() if line.strip()]
    printed = {line.rstrip() for line in str(report).splitlines()}
    assert [line for line in lines if len(line) < 150 and line not in printed] == []
    record = json.loads(json.dumps(report.to_dict()))
    assert record["sources"] == [{"index": 1, "kernels": {name: text}, "reason": ""}]
    assert "sources" not in kvquant_compile.explain(model).to_dict()


def test_one_layer_s_report_has_its_own_totals(model: object) -> None:
    whole, one = kvquant_compile.explain(model), kvquant_compile.explain(model, layer=1)
    assert [x.index for x in one.layers] == [1]
    assert one.layers[0] == whole.layers[1]
    assert one.bytes_per_token == whole.layers[1].bytes_per_token
    assert one.sources == whole.sources == ()


def test_a_layer_that_is_not_there_is_refused(model: object) -> None:
    with pytest.raises(OptionError, match="the cache layers are 0, 1"):
        kvquant_compile.explain(model, layer=2)


def test_a_cpu_s_own_kernel_is_shown_where_it_runs(
    model: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvquant_compile.lowering.cpp import dispatch

    monkeypatch.setattr(dispatch, "refusal", lambda layout: "")
    ((name, text),) = only(model, 1).items()
    assert name.startswith("attend_k4v2_d16x16")
    assert text.startswith("// Generated: attention over k4v2 slots1/0")
    assert 'extern "C"' in text
    report = str(kvquant_compile.explain(model, layer=1, source=True))
    assert f"// layer 1: {name}" in report
    assert "#include <cstdint>" in report
