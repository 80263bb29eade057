"""What explain says, number by number."""

from __future__ import annotations

import json

import pytest

import kvquant_compile
from kvquant_compile.inspect.report import Report
from tests.zoo import tiny, tokens, unproved

TEXT = tokens(4, 64, seed=7)
FIELDS = {"index", "kv_heads", "query_heads", "key_dim", "value_dim", "rope", "proof", "source",
          "window", "softcap", "chunk", "position_bias", "selects", "bias_extent", "key_bits",
          "value_bits", "slots", "effective_bits",
          "bytes_per_token", "reference_bytes", "kernel", "refusal", "certificate", "recipe",
          "implementation", "exact_bytes", "fallback", "sites", "plan"}  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    model = kvquant_compile.optimize(tiny("llama"), {0: 3, 1: (4, 2)}, calibration=TEXT)
    return kvquant_compile.explain(model)


def test_geometry_and_formats(report: Report) -> None:
    assert (report.model, report.convention) == ("LlamaForCausalLM", "transformers")
    assert (report.dtype, report.device, report.sinks) == ("float32", "cpu", 1)
    seen = [(x.index, x.query_heads, x.kv_heads, x.key_dim, x.value_dim, x.key_bits,
             x.value_bits, x.slots, x.rope, x.window, x.softcap)
            for x in report.layers]  # fmt: skip
    assert seen == [
        (0, 4, 2, 16, 16, 3, 3, "1+0", "half 16", 0, 0.0),
        (1, 4, 2, 16, 16, 4, 2, "1+0", "half 16", 0, 0.0),
    ]


def test_the_bytes_add_up_by_hand(report: Report) -> None:
    # 16 channels at 3 + 3 or 4 + 2 bits; a key scale; value scale and zero; a slot of 1 + 2.
    per_head = 16 * 6 / 8 + 2 + 4 + 3
    assert [x.bytes_per_token for x in report.layers] == [2 * per_head] * 2
    assert report.bytes_per_token == 4 * per_head
    assert report.effective_bits == 8 * per_head / 32
    assert [x.effective_bits for x in report.layers] == [8 * per_head / 32] * 2
    assert [x.reference_bytes for x in report.layers] == [2 * 32 * 4] * 2
    assert report.compression == pytest.approx(32 * 4 / per_head)


def test_the_proof_is_named_with_its_line_and_evidence(report: Report) -> None:
    for layer in report.layers:
        assert layer.proof == "symbolic"
        assert "modeling_llama.py:" in layer.source
        assert "apply_rotary_pos_emb" in layer.source
        assert layer.refusal == ""
        assert layer.certificate["pairing"] == "half"
        assert layer.certificate["group_law_residual"] < 1e-12


def test_validation_covers_prefill_decode_and_both_ways_of_reading(report: Report) -> None:
    assert len(report.validation) == 6
    assert all("exact chunk" in case or "through pages" in case for case in report.validation)
    assert 0 < max(report.validation.values()) < 1e-5


def test_the_dict_is_json_and_complete(report: Report) -> None:
    record = json.loads(json.dumps(report.to_dict()))
    assert record.keys() == {"model", "convention", "dtype", "device", "layers", "validation",
                             "calibration", "sinks", "recent", "decode_step", "totals",
                             "refused"}  # fmt: skip
    assert all(layer.keys() == FIELDS for layer in record["layers"])
    assert record["totals"]["effective_bits"] == report.effective_bits
    assert record["calibration"]["tokens"] == 4 * 4 * 64
    assert record["calibration"]["fit"]["sensitivity"] is True


def test_the_text_shows_every_kind_of_layer(report: Report) -> None:
    text = str(report)
    for part in ("LlamaForCausalLM (float32, cpu): 2 attention layers rewritten",
                 "5.250 effective bits", "6.10x smaller", "3/3", "4/2", "half 16", "symbolic",
                 "causal", "source given and sampled by the model, windows 16, tokens 1024",
                 "seed 0"):  # fmt: skip
        assert part in text


def test_equal_layers_share_a_line() -> None:
    text = str(kvquant_compile.explain(kvquant_compile.optimize(tiny("llama"), bits=16)))
    assert "0-1 " in text
    assert text.count(" 16/16 ") == 1


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gemma2", ("window 8, cap 5", "causal, cap 5")),
        ("gpt2", ("none", "no position reaches this tensor")),
        ("gpt_neox", ("half 4/16",)),
        ("cohere", ("interleaved 16",)),
    ],
)
def test_masks_and_rotations_are_named(name: str, parts: tuple[str, ...]) -> None:
    text = str(kvquant_compile.explain(kvquant_compile.optimize(tiny(name), bits=16)))
    assert all(part in text for part in parts), text


def test_a_refusal_is_told_with_its_reason() -> None:
    with pytest.warns(UserWarning, match="before RoPE"):
        model = kvquant_compile.optimize(unproved(), bits=16, strict=False)
    report = kvquant_compile.explain(model)
    assert {x.rope for x in report.layers} == {"kept"}
    assert {x.proof for x in report.layers} == {"refused"}
    assert all("no proved rotary embedding" in x.refusal for x in report.layers)
    assert "keys kept rotated" in str(report)


def test_what_was_moved_from_behind_the_rotation_is_told() -> None:
    model = kvquant_compile.optimize(tiny("hunyuan_v1_dense", num_hidden_layers=1), bits=16)
    told = "before RoPE, behind their norm, their weights moved to the query"
    assert told in " ".join(str(kvquant_compile.explain(model)).split())
