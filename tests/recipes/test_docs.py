"""The documentation's own text runs: the recipe, the block, the tests of a user's codec."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import kvquant_compile
from kvquant_compile import testing
from kvquant_compile.codec.algebra import BlockLayout
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.recipes import NAMED, Recipe
from kvquant_compile.recipes.choice import choose
from tests.zoo import tiny, tokens

DOCS = Path(__file__).parents[2] / "docs"
IDS = tokens(2, 100, seed=3)


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's module with a model in it, calibrated on the spot."""
    module = types.ModuleType("users_module")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    optimize = kvquant_compile.optimize
    text = list(tokens(4, 96, seed=7).split(1))
    monkeypatch.setattr(
        kvquant_compile, "optimize", lambda *a, **k: optimize(*a, calibration=text, **k)
    )
    vars(module).update(model=tiny("llama"), kvquant_compile=kvquant_compile)
    return vars(module)


def quantised(model: Any) -> torch.Tensor:
    with torch.no_grad(), kvquant_compile.quantised_attention(model):
        return model(IDS).logits


def test_a_recipe_in_under_thirty_lines(
    namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = snippets("recipes.md")[0]
    assert len(text.splitlines()) < 30
    exec(text, namespace)
    shown = capsys.readouterr().out
    assert "mine k3v2" in shown
    assert "reference op" in shown
    with torch.no_grad():
        exact = tiny("llama")(IDS).logits
    assert 1e-2 < float((quantised(namespace["model"]) - exact).norm() / exact.norm()) < 0.6
    recipe = namespace["mine"](3, 2)
    x = testing.named_profiles()["keys"].tensor()
    testing.assert_append_order_invariant(recipe, x)
    testing.assert_effective_bits(recipe, x)


def test_a_block_of_ones_own(namespace: dict[str, Any], tmp_path: Path) -> None:
    exec(snippets("recipes.md")[1], namespace)
    model, block = namespace["model"], namespace["Ternary"]
    x = testing.named_profiles()["values"].tensor()
    testing.assert_deterministic(block(), x)
    testing.assert_effective_bits(block(), x, 2 + 16 / 32)
    testing.assert_bytes_matter(block(), x)
    recipe = Recipe("r", block(), block(threshold=0.25))
    assert str(recipe) == (
        "Recipe(name='r', keys=users_module.Ternary(), values=users_module.Ternary(threshold=0.25))"
    )
    assert Recipe.parse(str(recipe)) == recipe
    path = tmp_path / "tables.safetensors"
    kvquant_compile.artifact(model).save(path)
    expected = quantised(model)
    sys.modules.pop("users_module")
    with pytest.raises(kvquant_compile.OptionError, match="Import users_module first"):
        kvquant_compile.Artifact.load(path)
    assert torch.equal(quantised(model), expected)


def test_no_file_makes_the_library_import_or_run_anything() -> None:
    for text in ("Recipe(name='r', keys=os.system(command='true'), values=Raw())",
                 "Recipe(name='r', keys=antigravity.Thing(), values=Raw())",
                 "Recipe(name='r', keys=pathlib.Path(), values=Raw())"):  # fmt: skip
        with pytest.raises(kvquant_compile.OptionError, match="no block named"):
            Recipe.parse(text)
    assert "antigravity" not in sys.modules
    for text in ("Recipe(", "Raw()", "[1, 2]", "Recipe(name='r', keys=Raw(), values=lambda: 1)"):
        with pytest.raises(ValueError):  # noqa: PT011
            Recipe.parse(text)


def test_the_table_lists_every_recipe_with_its_size() -> None:
    text = (DOCS / "recipes.md").read_text()
    for name in (*NAMED, "kvquant", "kvquant+"):
        assert f"| `{name}` |" in text
    rows = re.findall(r"\| `(\S+)` \|.*?\| (\S+) / (\S+) / (\S+) \|", text)
    assert len(rows) == len(NAMED) + 1  # fp8 has a single size
    for name, *sizes in rows:
        for bits, shown in zip((2, 3, 4), sizes, strict=True):
            spec = choose(name, bits).formats([0])[0]
            layout = (BlockLayout if isinstance(spec, Recipe) else PageLayout)(spec, 8, 128, 128, 2)
            assert float(shown) == pytest.approx(layout.effective_bits, abs=0.0051), name


def test_the_testing_example_passes_as_it_stands() -> None:
    found: dict[str, Any] = {}
    exec(snippets("testing.md")[0], found)
    tests = [value for name, value in found.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_every_assertion_and_strategy_is_documented() -> None:
    text = (DOCS / "testing.md").read_text()
    helpers = {"Code", "Profile", "Quantiser", "Stored", "Testable", "half_pairs", "rotate",
               "streamed"}  # fmt: skip
    for name in set(testing.__all__) - helpers:
        assert f"`{name}" in text, name
