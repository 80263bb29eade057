"""What flows into a tensor without being an input of it."""

from __future__ import annotations

import torch
from torch import nn

from kvquant_compile.capture.cleanup import flat_graph
from kvquant_compile.passes.taint import rotation_site, taint, writer_in_place


class _Key(nn.Module):
    """A projection, turned in place or as a value of its own."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.proj, self.in_place = nn.Linear(8, 8), in_place

    def forward(self, hidden, positions):
        key, angle = self.proj(hidden), positions[..., None].float()
        turned = key[..., :4] * angle.cos()
        if not self.in_place:
            return key * 2
        whole = key.new_empty(key.shape)
        whole[..., :4].copy_(turned)
        whole[..., 4:].copy_(key[..., 4:])
        return whole


def _end(in_place):
    inputs = torch.randn(2, 3, 8), torch.arange(3).repeat(2, 1)
    gm = flat_graph(torch.export.export(_Key(in_place), inputs, strict=False))
    end = gm.graph.output_node().args[0]
    return end, taint(gm.graph, gm.graph.find_nodes(op="placeholder")[0])


def test_a_tensor_written_in_place_is_not_known_to_be_unrotated():
    end, known = _end(in_place=True)
    assert not rotation_site(end, known).mixed  # no path leads through what is written
    assert writer_in_place(end, known).target is torch.ops.aten.copy_.default


def test_values_have_no_writer():
    end, known = _end(in_place=False)
    assert not rotation_site(end, known).mixed
    assert writer_in_place(end, known) is None
