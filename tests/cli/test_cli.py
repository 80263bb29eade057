"""The command line on the embedded demo model, or on three layers of it, in this process."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from kvquant_compile import cli
from kvquant_compile.demo import ASSETS, PROMPT
from kvquant_compile.evaluate.results import schema
from kvquant_compile.loading import load_model
from kvquant_compile.runtime.validate import TOLERANCE

MODEL, HELD_OUT = str(ASSETS), str(ASSETS / "heldout.txt")
QUICK = ("--windows", "2")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line; returns (exit code, stdout, stderr)."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvquant-compile", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return command


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three of the demo model's six layers, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = load_model(MODEL, "auto")
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A short text: the model need not sample its own."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((ASSETS / "heldout.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return str(path)


def test_eval_prints_results_and_goes_on_from_them(
    run: Any, small: str, calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("eval", "--model", small, "--text", HELD_OUT, "--window", "64", "--limit", "2",
               "--bits", "3,16", "--recipes", "kvquant+@r0,bf16", "--windows", "4",
               "--calibration", calibration, "--results", str(tmp_path / "results.json"),
               "--json")  # fmt: skip
    code, out, _ = run(*command)
    record = json.loads(out)
    assert code == 0
    jsonschema.validate(record, schema())
    found = {
        (r["identity"]["recipe"], r["identity"]["bits"]): r["value"] for r in record["results"]
    }
    assert found.keys() == {
        ("original", ""),
        ("kvquant+@r0", "3"),
        ("kvquant+@r0", "16"),
        ("bf16", ""),
    }
    assert all(len(value["windows"]) == 2 for value in found.values())
    kl = {k: sum(w["kl"] for w in value["windows"]) for k, value in found.items()}
    assert kl["kvquant+@r0", "3"] > 1e-3 > kl["bf16", ""] > 1e-6 > abs(kl["kvquant+@r0", "16"])
    assert (
        found["kvquant+@r0", "3"]["cache_bytes"] < 0.3 * found["kvquant+@r0", "16"]["cache_bytes"]
    )

    monkeypatch.setattr("kvquant_compile.evaluate.source.prepare", None)
    assert run(*command)[:2] == (0, out)


def test_eval_prints_tables_and_plots(
    run: Any, small: str, calibration: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    plot = tmp_path / "front.svg"
    code, out, _ = run("eval", "--model", small, "--text", HELD_OUT, "--window", "128",
                       "--limit", "1", "--bits", "2", "--recipes", "kvquant+,fp8",
                       "--windows", "1", "--calibration", calibration, "--grid", "--needle",
                       "--agreement", "8", "--errors", "--plot", str(plot))  # fmt: skip
    assert code == 0
    for words in ("perplexity", "kvquant+ 2 *", "fp8 *", "key bits down", "needle in 128 tokens",
                  "greedy agreement over 8 tokens", "kvquant+ 2: what hurts most"):  # fmt: skip
        assert words in out
    assert "Pareto front" in plot.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "bits"),
    [(None, None), ("3", 3), ("4,2", (4, 2)), ("2.5", 2.5), ("auto", "auto"), ("16", 16)],
)
def test_one_format_as_it_is_spelled(text: str | None, bits: Any) -> None:
    assert cli._one_format(text) == bits


def test_a_budget_chooses_the_widths(
    run: Any, small: str, calibration: str, tmp_path: Path
) -> None:
    code, out, _ = run("explain", "--model", small, "--calibration", calibration, "--windows", "1",
                       "--bits", "auto", "--budget", "2.5", "--json",
                       "--dump", str(tmp_path))  # fmt: skip
    report = json.loads(out)
    assert code == 0
    assert 2.3 < report["totals"]["effective_bits"] <= 2.5
    assert report["calibration"]["mixed"]["asked"] == "2.5 effective bits"
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Levels over what they code, layer 2" in page or find_spec("matplotlib") is None
    assert len(page.encode()) < 2_000_000


def test_calibrate_then_explain_and_optimize_from_the_artifact(
    run: Any, small: str, calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "tables.safetensors")
    code, out, _ = run("calibrate", "--model", small, path, "--bits", "4,2",
                       "--calibration", calibration, *QUICK)  # fmt: skip
    assert code == 0
    assert f"wrote {path}" in out

    monkeypatch.setattr("kvquant_compile.asked.calibrate", None)
    code, out, _ = run("explain", "--model", small, "--calibration", path, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["model"] == "LlamaForCausalLM"
    assert report["calibration"]["source"] == "given and sampled by the model"
    for layer in report["layers"]:
        assert (layer["key_bits"], layer["value_bits"]) == (4, 2)
        assert layer["proof"] == "symbolic"
        assert layer["rope"] == "half 64"
        assert "modeling_llama.py" in layer["source"]
    assert report["totals"]["compression"] > 3
    assert max(report["validation"].values()) < TOLERANCE[getattr(torch, report["dtype"])]

    code, out, _ = run("optimize", "--model", small, "--prompt", PROMPT, "--tokens", "6",
                       "--calibration", path, "--dump", str(tmp_path / "dump"))  # fmt: skip
    assert code == 0
    page = (tmp_path / "dump" / "index.html").read_text(encoding="utf-8")
    assert "backbone.layers.0 to backbone.layers.2 (3 alike)" in page
    assert len(page.encode()) < 2_000_000
    assert out.startswith(PROMPT)
    assert len(out.strip()) > len(PROMPT)


def test_explain_prints_a_table(run: Any, small: str) -> None:
    code, out, _ = run("explain", "--model", small, "--bits", "16")
    assert code == 0
    for word in ("LlamaForCausalLM", "half 64", "symbolic", "16/16", "worst relative error"):
        assert word in out


def test_selftest_tells_by_its_exit_code(
    run: Any, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run("selftest", "--model", small)
    assert code == 0
    assert out.count("ok  ") == 3
    monkeypatch.setattr("kvquant_compile.evaluate.selftest.sabotaged", lambda program: program)
    code, out, _ = run("selftest", "--model", small)
    assert code == 1
    assert "FAIL a sabotaged cache changes the scores" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "--model", "no/such/folder"), "cannot load the model no/such/folder"),
        (("explain", "--model", MODEL, "--bits", "x"), "--bits x"),
        (("explain", "--model", MODEL, "--bits", "3,3,3"), "one model has one format"),
        (("explain", "--model", MODEL, "--bits", "17"), "bits=17"),
        (("explain", "--model", MODEL, "--windows", "0"), "windows=0"),
        (("explain", "--model", MODEL, "--calibration", "no.safetensors"), "does not exist"),
        (("explain", "--model", MODEL, "--calibration", "no.txt"), "cannot read the text"),
        (("eval", "--model", MODEL, "--text", "no.txt"), "cannot read the text"),
        (("eval", "--model", MODEL, "--text", HELD_OUT, "--window", "1"), "windows of 1 tokens"),
        (("eval", "--model", MODEL, "--text", HELD_OUT, "--bits", "0"), "bits=0"),
        (("eval", "--model", MODEL, "--text", HELD_OUT, "--bits", "4/x"), "--bits 4/x"),
        (("eval", "--model", MODEL, "--text", HELD_OUT, "--recipes", "best"), "'best'"),
        (("eval", "--model", MODEL, "--text", HELD_OUT, "--agreement", "4096"), "--agreement"),
        (("eval", "--model", MODEL, "--text", HELD_OUT, "--results", HELD_OUT), "cannot go on"),
        (("eval", "--model", MODEL, "--text", HELD_OUT, "--limit", "0"), "limit"),
        (("demo", "--bits", "0"), "bits=0"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x[:1] + x[3:4]),
)  # fmt: skip
def test_errors_are_one_message_and_exit_code_2(
    run: Any, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert err.count("error:") == 1
    assert "Traceback" not in out + err


@pytest.mark.parametrize("arguments", [("eval",), ("nonsense",), ("demo", "--window", "x")])
def test_wrong_usage_exits_with_2(run: Any, arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0] == 2


@pytest.mark.slow
def test_demo_prints_one_record(run: Any) -> None:
    code, out, _ = run("demo", "--json", "--bits", "3", "--limit", "1", "--window", "256",
                       "--tokens", "8")  # fmt: skip
    record = json.loads(out)
    assert code == 0
    assert record["continuations"].keys() == {"original", "3 bits"}
    assert record["prompt"] == PROMPT
    assert record["reports"]["3"]["layers"][0]["key_bits"] == 3
    assert record["rows"][0]["name"] == "original"
    assert {"int3 per token", "fp8 e4m3", "ours, 3 bits"} <= {r["name"] for r in record["rows"]}
    assert {"sampling its own calibration text", "optimize to 3 bits"} <= record["seconds"].keys()


def test_explain_prints_one_layer_and_its_kernel(
    run: Any, small: str, calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQUANT_KERNELS", "torch")  # else it is this machine's
    command = ("explain", "--model", small, "--bits", "3", "--calibration", calibration,
               "--windows", "1", "--layer", "1", "--source")  # fmt: skip
    code, out, _ = run(*command)
    assert code == 0
    assert "1 attention layers rewritten" in out
    assert "# layer 1: history_k3v3_" in out
    assert "def history_k3v3_" in out
    assert "tl.store(partial" in out
    assert "# layer 0" not in out
    code, _, err = run("explain", "--model", small, "--bits", "16", "--layer", "99")
    assert code == 2
    assert "layer=99" in err
