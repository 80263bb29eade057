from __future__ import annotations

import pytest
import torch

from kvquant_compile.capture import ATTEND, run_marked
from tests import zoo

DECODERS = ("SdpaDecoder", "WindowDecoder", "MatmulDecoder", "CappedDecoder", "IsCausalDecoder")


@pytest.mark.parametrize("name", DECODERS)
def test_graph_equals_decoder_over_a_conversation(name):
    captured = zoo.captured_decoder(name)
    ids = zoo.tokens(3, 20, seed=4)
    store, past, cache = {}, 0, None
    with torch.no_grad():
        for tokens in (12, 1, 1, 1):
            now = ids[:, past : past + tokens]
            expected, cache = captured.model(now, cache)
            got = run_marked(captured.graph_module, store, now, past)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            past += tokens


@pytest.mark.parametrize("name", DECODERS)
def test_inputs_parameters_and_layout(name):
    captured = zoo.captured_decoder(name)
    names = [n.target for n in captured.graph_module.graph.find_nodes(op="placeholder")]
    assert names == ["ids", "past"]
    own = {id(p) for p in captured.model.parameters()}
    assert {id(p) for p in captured.graph_module.parameters()} == own
    expected = name not in ("MatmulDecoder", "CappedDecoder")
    assert set(captured.cache_layout.heads_first) == {expected}


@pytest.mark.parametrize(
    ("name", "window", "softcap"),
    [("SdpaDecoder", 0, 0.0), ("WindowDecoder", 6, 0.0), ("CappedDecoder", 0, 3.0)],
)
def test_site_parameters(name, window, softcap):
    graph = zoo.captured_decoder(name).graph_module.graph
    for attend in graph.find_nodes(op="call_function", target=ATTEND):
        assert attend.args[6:10] == (0.25, softcap, window, True)


def test_a_decoder_that_is_wrong_after_a_past_is_not_imitated():
    evidence = zoo.captured_decoder("IsCausalDecoder").evidence
    assert evidence["mask_assumed"]
    assert evidence["inconsistent_in_original"] == [[3, 8], [2, 5]]
