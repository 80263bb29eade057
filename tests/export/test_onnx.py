"""One exported file: its contents, and the text and logits that onnxruntime alone makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.export import OnnxCache, OnnxSession, export_onnx
from kvquant_compile.export.cache_steps import appender
from kvquant_compile.export.codec_steps import run
from kvquant_compile.export.step import stores_of
from kvquant_compile.runtime.installed import installed
from tests.zoo import tiny, tokens

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

CALIBRATION = tokens(4, 64, seed=7)
NEW = 50
SLOW_TYPES = ("gemma2", "qwen3", "gpt_neox", "gpt2", "bloom")


def exported(model: Any, folder: Path, **options: Any) -> OnnxSession:
    return OnnxSession(export_onnx(model, folder / "model.onnx", **options))


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return kvquant_compile.optimize(tiny("llama"), 3, calibration=CALIBRATION, recent_window=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def session(llama: PreTrainedModel, folder: Path) -> OnnxSession:
    return exported(llama, folder)


@pytest.fixture(scope="module")
def proto(session: OnnxSession, folder: Path) -> Any:
    return onnx.load(folder / "model.onnx")


def assert_same_text(model: Any, session: OnnxSession, ids: Tensor, mask: Tensor) -> Tensor:
    """Greedy tokens; int64 [batch, prompt and new ones]."""
    whole = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    new = session.generate(ids.numpy(), NEW, mask.numpy())
    assert new.tolist() == whole[:, ids.shape[1] :].tolist()
    return whole


def logit_error(
    model: Any, session: OnnxSession, ids: Tensor, prompt: int, one_cache: bool = False
) -> float:
    """Largest relative error of a prompt's logits, and of every token's after it.

    Each side goes on from its own cache or, for ``one_cache``, both from torch's: then no rounding
    of a key that lies between two codes adds up.
    """
    theirs, ours, errors = None, session.new_cache(len(ids)), []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        part = ids[:, start:end]
        if one_cache and theirs is not None:
            give_pages(theirs, ours)
        with torch.no_grad():
            out = model(part, past_key_values=theirs, use_cache=True)
        theirs = out.past_key_values
        got = torch.from_numpy(session.step(part.numpy(), ours))
        errors.append(float((got - out.logits).norm() / out.logits.norm()))
    return max(errors)


def give_pages(theirs: Any, ours: OnnxCache) -> None:
    """Copy torch's cache into a session's."""
    for layer, known in enumerate(theirs.pages):
        pages = torch.cat(known.slabs)[theirs.table.long()]
        ours.tensors[f"past.{layer}.pages"] = pages.numpy().copy()
        ours.tensors[f"past.{layer}.sinks"] = known.sinks.numpy().copy()


def test_text_and_logits(llama: PreTrainedModel, session: OnnxSession) -> None:
    ids = tokens(2, 70)
    whole = assert_same_text(llama, session, ids, torch.ones_like(ids))
    assert logit_error(llama, session, whole, 70) < 1e-4


def test_left_padding_and_one_sequence_alone(llama: PreTrainedModel, session: OnnxSession) -> None:
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.int64)
    mask[1, :13], mask[2, :39] = 0, 0
    whole = assert_same_text(llama, session, ids, mask)
    alone = session.generate(ids[1:2, 13:].numpy(), NEW)
    assert alone.tolist() == whole[1:2, 40:].tolist()


def test_spare_capacity_and_chunks_of_any_length(session: OnnxSession) -> None:
    ids = tokens(1, 66).numpy()
    cache, roomy = session.new_cache(1), session.new_cache(1)
    first = session.step(ids[:, :2], cache)
    for name, x in roomy.tensors.items():
        if name.endswith(".pages"):
            roomy.tensors[name] = np.zeros((1, 5, *x.shape[2:]), x.dtype)
    again = session.step(ids[:, :2], roomy)
    assert (first == again).all()
    rest, more = session.step(ids[:, 2:], cache), session.step(ids[:, 2:], roomy)
    assert abs(rest - more).max() < 1e-4
    shapes = [c.tensors["past.0.pages"].shape[1] for c in (cache, roomy)]
    assert shapes == [2, 5]


def test_a_cache_that_is_too_small_is_refused(session: OnnxSession) -> None:
    cache, ids = session.new_cache(1), tokens(1, 65).numpy()
    session.step(ids[:, :1], cache)  # has one page now
    feed = {"input_ids": ids, "token_mask": ids * 0 + 1, "past_lengths": cache.lengths}
    with pytest.raises(Exception, match="out of data bounds"):
        session.session.run(None, feed | cache.tensors)


def test_onnxruntime_writes_the_bytes_that_torch_writes(llama: Any, proto: Any) -> None:
    store = stores_of(installed(llama))[1]
    function = appender(store)
    torch.manual_seed(0)
    slots = torch.tensor([[-1, -1, 3, 4], [60, 61, 62, 63]])
    step = (torch.randn(2, 2, 4, 16) * 3, torch.randn(2, 2, 4, 16), slots)
    cache = [torch.zeros_like(x.example({"batch": 2, "capacity": 3})) for x in store.cache]
    cache[0].random_(256)
    cache[0] &= 0x3B  # no infinite scales
    inputs = [*step, *cache]
    constants = store.tables | store.geometry
    inputs += [constants[x.name] for x in function.signature.inputs[len(inputs) :]]
    expected = run(function, inputs)
    found = _alone(proto, "append").run(
        None, {x.name: t.numpy() for x, t in zip(function.signature.inputs, inputs, strict=True)}
    )
    for got, wanted in zip(found, expected, strict=True):
        assert got.tobytes() == wanted.numpy().tobytes()
    assert not torch.equal(expected[0], cache[0])


def _alone(proto: Any, name: str) -> Any:
    """A session of one function of a file."""
    node = next(n for n in proto.graph.node if n.op_type == name)
    function = next(f for f in proto.functions if f.name == name)
    initializers = {x.name: (x.data_type, x.dims) for x in proto.graph.initializer}
    types = {x.name: x.type for x in proto.graph.value_info}
    inputs = []
    helper = onnx.helper
    for own, given in zip(function.input, node.input, strict=True):
        if given in initializers:
            kind, shape = initializers[given]
        else:
            known = types.get(given) or next(x.type for x in proto.graph.input if x.name == given)
            kind = known.tensor_type.elem_type
            shape = [None] * len(known.tensor_type.shape.dim)
        inputs.append(helper.make_tensor_value_info(own, kind, shape))
    outputs = [
        helper.make_tensor_value_info(own, x.type.tensor_type.elem_type, None)
        for own, given in zip(function.output, node.output, strict=True)
        for x in proto.graph.output
        if x.name == given
    ]
    alone = helper.make_node(name, function.input, function.output, domain="kvquant")
    graph = helper.make_graph([alone], name, inputs, outputs)
    model = helper.make_model(
        graph, functions=proto.functions, opset_imports=proto.opset_import, ir_version=10
    )
    return onnxruntime.InferenceSession(model.SerializeToString())


def test_the_packed_cache_matters(session: OnnxSession) -> None:
    ids = tokens(1, 70).numpy()
    cache = session.new_cache(1)
    session.step(ids[:, :69], cache)
    lengths, before = cache.lengths, {n: x.copy() for n, x in cache.tensors.items()}
    honest = session.step(ids[:, 69:], cache)
    cache.lengths, cache.tensors = lengths, before
    codes = cache.tensors["past.0.pages"][..., : 64 * 16 * 3 // 8]  # of the keys
    codes ^= 0x11
    assert abs(session.step(ids[:, 69:], cache) - honest).max() > 1e-2


def test_bytes_are_those_that_explain_reports(llama: Any, session: OnnxSession) -> None:
    report, cache = kvquant_compile.explain(llama), session.new_cache(2)
    session.step(tokens(2, 128).numpy(), cache)
    assert cache.nbytes == 2 * 128 * report.bytes_per_token
    elements = sum(x.kv_heads * (x.key_dim + x.value_dim) for x in report.layers)
    ratio = 2 * 2 * 128 * elements / cache.nbytes  # bfloat16 over packed
    assert float(session.metadata["kvquant.times_smaller_than_bf16"]) == pytest.approx(ratio)
    assert ratio == pytest.approx(16 / report.effective_bits)


def test_metadata(llama: Any, session: OnnxSession) -> None:
    known = session.metadata
    assert known["kvquant.model"] == kvquant_compile.artifact(llama).model
    assert (known["kvquant.recipe"], known["kvquant.class"]) == ("kvquant+", "LlamaForCausalLM")
    layers = json.loads(known["kvquant.layers"])
    assert [(x["key_bits"], x["value_bits"]) for x in layers.values()] == [(3, 3)] * 2


def test_nodes_of_our_domain_have_bodies_of_standard_operators(proto: Any) -> None:
    functions = {f.name: f for f in proto.functions}
    nodes = [n for owner in (proto.graph, *proto.functions) for n in getattr(owner, "node", [])]
    assert {n.domain for n in nodes} == {"", "kvquant"}
    assert {n.op_type for n in nodes if n.domain} == set(functions)
    assert [n.op_type for n in proto.graph.node if n.domain] == ["append", "attend"] * 2
    assert all(f.domain == "kvquant" and f.node and f.doc_string for f in functions.values())


def test_tables_and_weights_keep_their_names(llama: Any, proto: Any) -> None:
    kept = {x.name: onnx.numpy_helper.to_array(x) for x in proto.graph.initializer}
    program = llama._kvquant.program.graph_module
    for layer in (0, 1):
        for name in ("key_table", "key_scale", "key_zero", "value_table", "frequencies"):
            expected = getattr(program, f"kvquant_{layer}_{name}").numpy()
            assert (kept[f"kvquant.{layer}.{name}"] == expected).all()
    weights = {name: x.detach().numpy() for name, x in llama.named_parameters()}
    assert set(weights) <= set(kept)
    assert all((kept[name] == x).all() for name, x in weights.items())


def test_shapes_are_inferred_with_free_sizes_by_name(proto: Any) -> None:
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    sizes = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in (*inferred.graph.input, *inferred.graph.output)
    }
    assert sizes["input_ids"] == sizes["token_mask"] == ["batch", "sequence"]
    assert sizes["logits"] == ["batch", "sequence", 128]
    assert sizes["past.0.pages"] == sizes["present.0.pages"] == ["batch", "capacity", 2, 1344]
    assert sizes["past.1.sinks"] == sizes["present.1.sinks"] == ["batch", 2, 1, 32]


def test_attributes_of_a_node_are_alive(proto: Any) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    scales = [a for n in changed.graph.node if n.op_type == "attend" for a in n.attribute]
    assert {a.name for a in scales} == {"scale"}
    for attribute in scales:
        attribute.f *= 2
    ids, logits = tokens(1, 20).numpy(), []
    for model in (proto, changed):
        session = OnnxSession.__new__(OnnxSession)
        session.session = onnxruntime.InferenceSession(model.SerializeToString())
        session.inputs = {x.name: x for x in session.session.get_inputs()}
        logits.append(session.step(ids, session.new_cache(1)))
    assert abs(logits[0] - logits[1]).max() > 1e-3


def test_the_loop_in_the_docs(llama: Any, session: OnnxSession, folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    loop = next(x for x in page.split("```python\n") if "onnxruntime.Inf" in x).split("```")[0]
    (folder / "loop.py").write_text(loop + "assert 'torch' not in sys.modules\n", "utf-8")
    ids = tokens(1, 9)
    prompt = ",".join(map(str, ids[0].tolist()))
    command = [sys.executable, "loop.py", "model.onnx", prompt]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole = assert_same_text(llama, session, ids, torch.ones_like(ids))
    assert [int(x) for x in done.stdout.split()] == whole[0, 9:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SLOW_TYPES)
def test_architectures(model_type: str, tmp_path: Path) -> None:
    options = {"calibration": CALIBRATION, "recent_window": 0}
    model = kvquant_compile.optimize(tiny(model_type), 3, **options)
    session, ids = exported(model, tmp_path), tokens(2, 70)
    whole = assert_same_text(model, session, ids, torch.ones_like(ids))
    assert logit_error(model, session, whole, 70) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"opset": 18, "external_data": True}, {"opset": 23}], ids=str)
def test_options(llama: Any, options: dict[str, Any], tmp_path: Path) -> None:
    session, ids = exported(llama, tmp_path, **options), tokens(1, 20)
    assert_same_text(llama, session, ids, torch.ones_like(ids))
    assert (tmp_path / "model.onnx.data").exists() == ("external_data" in options)
    imports = {x.domain: x.version for x in onnx.load(tmp_path / "model.onnx").opset_import}
    assert imports == {"": options["opset"], "kvquant": 1}


@pytest.mark.slow
def test_mixed_widths_slots_sinks_and_a_quantised_step(tmp_path: Path) -> None:
    model = kvquant_compile.optimize(
        tiny("llama"), {0: (5, 2), 1: (2, 8)}, calibration=CALIBRATION, slots=2, sinks=4,
        attend_quantized=True, recent_window=0,
    )  # fmt: skip
    session, ids = exported(model, tmp_path), tokens(2, 70)
    whole = assert_same_text(model, session, ids, torch.ones_like(ids))
    assert logit_error(model, session, whole, 70) < 1e-4


@pytest.mark.slow
@pytest.mark.shared
def test_a_trained_model(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared / "models" / "llama-63m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = (shared / "data" / "wikitext2_test.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:400], return_tensors="pt", add_special_tokens=False).input_ids
    calibration = (shared / "data" / "calibration.txt").read_text(encoding="utf-8")[:200_000]
    kvquant_compile.optimize(
        model, 3, calibration=calibration, tokenizer=tokenizer, windows=8, recent_window=0
    )
    session = exported(model, tmp_path)
    assert (tmp_path / "model.onnx.data").exists()
    whole = assert_same_text(model, session, ids, torch.ones_like(ids))
    error = logit_error(model, session, whole, ids.shape[1], one_cache=True)
    print(f"relative logit error {error:.2e}")
    assert error < 1e-4
