"""Caches on disk: what is loaded goes on as what was saved; nothing else is loaded."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile import ArtifactError, CacheError, QuantizedCache
from kvquant_compile.files import checksum
from tests.zoo import tiny, tokens


def optimised(kind: str = "llama", **options) -> PreTrainedModel:
    options.setdefault("bits", 3)
    seed = options.pop("model_seed", 0)
    calibration = options.pop("calibration", tokens(8, 64, seed=7))
    return kvquant_compile.optimize(tiny(kind, seed=seed), calibration=calibration, **options)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return optimised()


def prefill(model: PreTrainedModel, ids: torch.Tensor, mask=None, cache=None) -> QuantizedCache:
    with torch.no_grad():
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return out.past_key_values


def step(model: PreTrainedModel, cache: QuantizedCache, count: int = 3, mask=None) -> torch.Tensor:
    """Logits of further tokens, with more than a page between the first and the last."""
    out = []
    for i in range(count):
        more = tokens(cache.batch, 1 if i else 70, seed=20 + i)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(more)], 1)
        with torch.no_grad():
            logits = model(more, past_key_values=cache, attention_mask=mask).logits
        out.append(logits[:, -1])
    return torch.stack(out)


def test_a_loaded_cache_generates_the_same_tokens(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = tokens(1, 100)
    cache = prefill(model, ids[:, :99])
    cache.save(tmp_path / "prefix.safetensors")
    loaded = kvquant_compile.load_cache(tmp_path / "prefix.safetensors", model)
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(model.generate(ids, past_key_values=loaded, **settings), expected)
    assert loaded.lengths.tolist() == cache.lengths.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 16},
        {"recipe": "kivi", "bits": 4},
        pytest.param({"kind": "gemma2", "sinks": 3, "slots": 2}, marks=pytest.mark.slow),
    ],
    ids=["lossless", "exact tail", "windows"],
)
def test_other_formats_go_on_as_saved(options: dict, tmp_path: Path) -> None:
    model = optimised(**options)
    cache = prefill(model, tokens(2, 90))
    cache.save(tmp_path / "c.safetensors")
    loaded = kvquant_compile.load_cache(tmp_path / "c.safetensors", model)
    assert torch.equal(step(model, loaded), step(model, cache))


def test_recurrent_states_are_saved_too(tmp_path: Path) -> None:
    sizes = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    network = tiny("lfm2", num_key_value_heads=2, **sizes)
    model = kvquant_compile.optimize(network, bits=3, calibration=tokens(8, 64, seed=7))
    cache = prefill(model, tokens(2, 30))
    assert cache.recurrent_layers()
    cache.save(tmp_path / "c.safetensors")
    loaded = kvquant_compile.load_cache(tmp_path / "c.safetensors", model)
    assert loaded.nbytes() == cache.nbytes()
    assert torch.equal(step(model, loaded), step(model, cache))


def test_padding_hidden_tokens_and_crops_survive(model: PreTrainedModel, tmp_path: Path) -> None:
    mask = torch.ones(3, 150, dtype=torch.int64)
    mask[0, :20] = 0
    mask[1, :149] = 0
    cache = prefill(model, tokens(3, 150), mask)
    cache.crop(-5)
    mask = mask[:, :145]
    mask[2, 100:110] = 0  # hidden after the fact
    mask = torch.cat([mask, torch.ones(3, 2, dtype=torch.int64)], 1)
    cache = prefill(model, tokens(3, 2, seed=3), mask, cache)
    cache.save(tmp_path / "c.safetensors")
    loaded = kvquant_compile.load_cache(tmp_path / "c.safetensors", model)
    assert loaded.lengths.tolist() == [127, 2, 147]
    assert torch.equal(step(model, loaded, mask=mask), step(model, cache, mask=mask))


def test_an_empty_cache_and_a_bigger_one(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    kvquant_compile.new_cache(model).save(path)
    empty = kvquant_compile.load_cache(path, model)
    assert empty.nbytes() == 0
    big = prefill(model, tokens(2, 64 * 3), cache=empty)
    big.crop(-64 * 2)
    big.save(path)
    loaded = kvquant_compile.load_cache(path, model)
    assert loaded.layers[0].slabs[0].shape[0] == 2, "pages that hold nothing are not written"
    assert torch.equal(step(model, loaded), step(model, big))
    big.crop(-big.columns)
    big.save(path)
    assert torch.equal(step(model, kvquant_compile.load_cache(path, model)), step(model, big))


@pytest.fixture
def path(model: PreTrainedModel, tmp_path: Path) -> Path:
    prefill(model, tokens(1, 70)).save(tmp_path / "prefix.safetensors")
    return tmp_path / "prefix.safetensors"


def test_missing_and_truncated_files_are_refused(model: PreTrainedModel, path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such cache"):
        kvquant_compile.load_cache(path.with_name("absent"), model)
    content = path.read_bytes()
    for length in (0, 4, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match="damaged"):
            kvquant_compile.load_cache(path, model)


def test_flipped_bytes_are_refused(model: PreTrainedModel, path: Path) -> None:
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(content), (150,), generator=generator).tolist():
        if content[place : place + 1] == b" ":  # safetensors pads its header with blanks
            continue
        broken = bytearray(content)
        broken[place] ^= 1 << place % 8
        path.write_bytes(bytes(broken))
        with pytest.raises(ArtifactError):
            kvquant_compile.load_cache(path, model)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"model_seed": 1}, "the model"),
        ({"bits": 4}, "page format"),
        ({"calibration": tokens(8, 64, seed=8)}, "the tables"),
    ],
)
def test_other_models_and_tables_are_refused(path: Path, options: dict, what: str) -> None:
    with pytest.raises(ArtifactError, match=f"not the same: .*{what}"):
        kvquant_compile.load_cache(path, optimised(**options))


def test_other_dtypes_and_changed_weights_are_refused(tmp_path: Path) -> None:
    model = optimised()
    path = tmp_path / "c.safetensors"
    prefill(model, tokens(1, 70)).save(path)
    tables = kvquant_compile.artifact(model)
    half = kvquant_compile.optimize(tiny("llama").bfloat16(), calibration=tokens(2, 32))
    with pytest.raises(ArtifactError, match="dtype"):
        kvquant_compile.load_cache(path, half)
    same = kvquant_compile.optimize(tiny("llama"), calibration=tables)
    assert kvquant_compile.load_cache(path, same).columns == 70
    with torch.no_grad():
        same.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    with pytest.raises(ArtifactError, match="weight samples"):
        kvquant_compile.load_cache(path, same)


def rewritten(path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """The file with other content and a checksum that fits it."""
    with safe_open(path, framework="pt") as file:
        known = {**file.metadata(), **metadata}
        content = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118
    known["checksum"] = metadata.get("checksum", checksum(known["header"], content))
    save_file(content, path, metadata=known)


@pytest.mark.parametrize("change", [{"version": "0"}, {"kind": "x"}, {"header": "{}"}])
def test_other_versions_and_kinds_are_refused(
    model: PreTrainedModel, path: Path, change: dict[str, str]
) -> None:
    rewritten(path, change, {})
    with pytest.raises(ArtifactError):
        kvquant_compile.load_cache(path, model)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("table", torch.tensor([[0, 7]], dtype=torch.int32)),
        ("table", torch.tensor([[0, -3]], dtype=torch.int32)),
        ("table", torch.tensor([[0, 1]])),
        ("lengths", torch.tensor([200], dtype=torch.int32)),
        ("lengths", torch.tensor([60], dtype=torch.int32)),
        ("lengths", torch.tensor([-1], dtype=torch.int32)),
        ("positions", torch.zeros(1, 64, dtype=torch.int32)),
        ("pages.1", torch.zeros(1, 2, 16, dtype=torch.uint8)),
        ("columns.stored", torch.zeros(1, 70, dtype=torch.bool)),
    ],
)
def test_parts_that_do_not_fit_are_refused_whatever_the_checksum(
    model: PreTrainedModel, path: Path, name: str, tensor: torch.Tensor
) -> None:
    rewritten(path, {}, {name: tensor})
    with pytest.raises(ArtifactError, match="damaged"):
        kvquant_compile.load_cache(path, model)


def test_a_failed_save_leaves_the_older_file(model: PreTrainedModel, path: Path) -> None:
    before = path.read_bytes()
    cache = prefill(model, tokens(1, 30))
    with pytest.raises(ArtifactError, match="cannot write"):
        cache.save(path.parent / "absent" / "c.safetensors")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing is left beside it"


def test_pickle_is_refused(model: PreTrainedModel) -> None:
    cache = prefill(model, tokens(1, 10))
    with pytest.raises(CacheError, match="pickled"):
        pickle.dumps(cache)


def test_caches_of_no_model_are_not_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    layout = prefill(model, tokens(1, 10)).layers[0].layout
    with pytest.raises(CacheError, match="cannot be saved"):
        QuantizedCache([layout], torch.float32, torch.device("cpu")).save(tmp_path / "c")
