"""The command line on the embedded demo model, in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant_compile import cli
from kvquant_compile.demo import ASSETS, PROMPT
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
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A short text: the model need not sample its own."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((ASSETS / "heldout.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return str(path)


def test_eval_prints_one_row_per_codec(run: Any, calibration: str) -> None:
    code, out, _ = run("eval", "--model", MODEL, "--text", HELD_OUT, "--json", "--window", "64",
                       "--limit", "2", "--bits", "3,16", "--windows", "4",
                       "--calibration", calibration, "--no-baselines")  # fmt: skip
    record = json.loads(out)
    assert code == 0
    assert record.keys() == {"model", "text", "window", "windows", "seconds", "rows"}
    assert (record["text"], record["window"], record["windows"]) == ("heldout.txt", 64, 2)
    assert {"capture", "observe", "fit 3 bits"} <= record["seconds"].keys()
    names = [row["name"] for row in record["rows"]]
    assert names == ["original", "ours, 3 bits", "ours, 16 bits"]
    fields = {"name", "bits", "effective_bits", "cache_bytes", "score", "loss_percent"}
    for row in record["rows"]:
        assert row.keys() == fields
        assert row["score"].keys() == {"perplexity", "kl", "top1", "windows", "tokens"}
        assert row["score"]["tokens"] == 126
    original, three, lossless = record["rows"]
    assert three["score"]["kl"] > 1e-3 > 1e-5 > lossless["score"]["kl"]
    assert lossless["score"]["perplexity"] == pytest.approx(original["score"]["perplexity"], 1e-5)
    assert three["cache_bytes"] < 0.3 * lossless["cache_bytes"]


def test_eval_prints_a_table(run: Any, calibration: str) -> None:
    code, out, _ = run("eval", "--model", MODEL, "--text", HELD_OUT, "--window", "64",
                       "--limit", "1", "--bits", "2", "--windows", "1",
                       "--calibration", calibration)  # fmt: skip
    assert code == 0
    for word in ("perplexity", "fp8 e4m3", "int2 per token", "kivi-2", "kvquant-2", "ours, 2 bits"):
        assert word in out


def test_calibrate_then_explain_and_optimize_from_the_artifact(
    run: Any, calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "tables.safetensors")
    code, out, _ = run("calibrate", "--model", MODEL, path, "--bits", "4,2",
                       "--calibration", calibration, *QUICK)  # fmt: skip
    assert code == 0
    assert f"wrote {path}" in out

    monkeypatch.setattr("kvquant_compile.api.calibrate", None)
    code, out, _ = run("explain", "--model", MODEL, "--calibration", path, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["model"] == "LlamaForCausalLM"
    assert report["calibration"]["source"] == "given"
    for layer in report["layers"]:
        assert (layer["key_bits"], layer["value_bits"]) == (4, 2)
        assert layer["proof"] == "symbolic"
        assert layer["rope"] == "half 64"
        assert "modeling_llama.py" in layer["source"]
    assert report["totals"]["compression"] > 3
    assert max(report["validation"].values()) < TOLERANCE[getattr(torch, report["dtype"])]

    code, out, _ = run("optimize", "--model", MODEL, "--prompt", PROMPT, "--tokens", "6",
                       "--calibration", path)  # fmt: skip
    assert code == 0
    assert out.startswith(PROMPT)
    assert len(out.strip()) > len(PROMPT)


def test_explain_prints_a_table(run: Any) -> None:
    code, out, _ = run("explain", "--model", MODEL, "--bits", "16")
    assert code == 0
    for word in ("LlamaForCausalLM", "half 64", "symbolic", "16/16", "worst relative error"):
        assert word in out


def test_selftest_tells_by_its_exit_code(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("selftest", "--model", MODEL)
    assert code == 0
    assert out.count("ok  ") == 3
    monkeypatch.setattr("kvquant_compile.evaluate.selftest.sabotaged", lambda program: program)
    code, out, _ = run("selftest", "--model", MODEL)
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


def test_explain_prints_one_layer_and_its_kernel(run: Any, calibration: str) -> None:
    command = ("explain", "--model", MODEL, "--bits", "3", "--calibration", calibration,
               "--windows", "1", "--layer", "1", "--source")  # fmt: skip
    code, out, _ = run(*command)
    assert code == 0
    assert "1 attention layers rewritten" in out
    assert "# layer 1: history_k3v3_" in out
    assert "def history_k3v3_" in out
    assert "tl.store(partial" in out
    assert "# layer 0" not in out
    code, _, err = run(*command[:-2], "99")
    assert code == 2
    assert "layer=99" in err
