"""What uneven values cost: a slot for values, and static units of channels, on made-up outliers.

    python -m benchmarks.uneven_values --text TEXT --calibration OTHER --json uneven.json

A model's values are made uneven: one channel of every head is larger (``one8``: eight times), all
channels differ (``log1``: by factors whose logarithms have a deviation of 1), or one channel of
one token in fifty jumps (``rare30``: by thirty deviations). The output projection takes larger
channels back and leaves jumps out, so that the model means the same, or hardly less.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import environment, save
from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.config import FormatOptions
from kvquant_compile.evaluate.run import Prepared, build, prepare
from kvquant_compile.evaluate.score import compare
from kvquant_compile.evaluate.table import original_logits, program_logits
from kvquant_compile.evaluate.text import read_text, text_windows
from kvquant_compile.loading import load_model
from kvquant_compile.progress import Progress

DEMO = files("kvquant_compile") / "assets" / "demo"
KINDS = ("none", "one8", "one30", "log1", "rare8", "rare30")
RARE = 0.02
VARIANTS: dict[str, tuple[tuple[int, int], bool | None]] = {
    "slots 1/1, no units": ((1, 1), False),
    "slots 1/0, no units": ((1, 0), False),
    "slots 1/0": ((1, 0), None),
    "slots 1/1": ((1, 1), None),
}
"""Slots of keys and values, and ``value_transform`` of the fit; the third is the default."""


class Jumping(nn.Module):
    """A projection whose output jumps where the input's first channel is beyond a threshold.

    Args:
        linear: the projection.
        threshold: of the first channel.
        jump: float [output channels], what is added then.
    """

    def __init__(self, linear: nn.Module, threshold: float, jump: Tensor) -> None:
        super().__init__()
        self.linear, self.threshold = linear, threshold
        self.register_buffer("jump", jump)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., input channels] -> [..., output channels]."""
        far = (x[..., :1] > self.threshold).to(x.dtype)
        return self.linear(x) + far * self.jump


def make_uneven(model: Any, kind: str, ids: Tensor) -> None:
    """Change a Llama's values in place; ``ids`` show what is rare."""
    name, amount = re.fullmatch(r"([a-z]+)(\d*)", kind).groups()  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(0)
    heads = model.config.num_key_value_heads
    group = model.config.num_attention_heads // heads
    for layer in model.model.layers:
        block = layer.self_attn
        factors = torch.ones(heads, block.head_dim)
        places = torch.randint(block.head_dim, (heads,), generator=draw)
        if name == "one":
            factors[torch.arange(heads), places] = float(amount)
        elif name == "log":
            factors = (float(amount) * torch.randn(factors.shape, generator=draw)).exp()
        elif name == "rare":
            _let_jump(model, block, float(amount), places, ids)
            continue
        with torch.no_grad():
            block.v_proj.weight.mul_(factors.reshape(-1, 1))
            block.o_proj.weight.div_(factors.repeat_interleave(group, 0).reshape(1, -1))


def _let_jump(model: Any, block: Any, amount: float, places: Tensor, ids: Tensor) -> None:
    """Channels that jump, and that the output projection leaves out."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = block.v_proj.register_forward_hook(lambda _, x, y: seen.append((x[0][..., 0], y)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    ((first, values),) = seen
    heads = len(places)
    jump = torch.zeros(heads, block.head_dim)
    jump[torch.arange(heads), places] = amount * values.std()
    queries = block.o_proj.weight.shape[1] // block.head_dim
    column = places.repeat_interleave(queries // heads)
    with torch.no_grad():
        by_head = block.o_proj.weight.view(-1, queries, block.head_dim)
        by_head[:, torch.arange(queries), column] = 0
    threshold = float(first.flatten().quantile(1 - RARE))
    block.v_proj = Jumping(block.v_proj, threshold, jump.flatten())


def scores(
    prepared: Prepared, options: CalibrationOptions, windows: Sequence[Tensor], bits: int
) -> dict[str, dict[str, float]]:
    """Divergence of every variant at a width."""
    original = original_logits(prepared.captured)
    found = {}
    for name, (slots, units) in VARIANTS.items():
        fit = replace(options.fit, value_transform=units)
        form = FormatOptions(bits, slots)
        run, _ = program_logits(prepared.captured, build(prepared, form, replace(options, fit=fit)))
        kl = torch.tensor([_divergence(original, run, ids) for ids in windows])
        found[name] = {"kl": float(kl.mean()), "kl_error": float(kl.std()) / len(kl) ** 0.5}
    return found


def _divergence(original: Any, run: Any, ids: Tensor) -> float:
    with torch.inference_mode():
        exact, got = original(ids)[0, :-1], run(ids)[0, :-1]
        return float(compare(exact, got, ids[0, 1:].to(exact.device))[1])


def main() -> None:
    """Every kind at every width."""
    args = _arguments()
    rows: list[dict[str, Any]] = []
    for kind in args.kinds:
        model, tokenizer = load_model(args.model, "float32")
        windows = text_windows(read_text(args.text), tokenizer, args.window, args.limit)
        make_uneven(model, kind, windows[0])
        options = CalibrationOptions.make(windows=args.windows)
        with Progress(False) as bar:
            data = read_text(args.calibration)
            prepared = prepare(model.to(args.device), data, tokenizer, options, bar)
        for bits in args.bits:
            for name, found in scores(prepared, options, windows, bits).items():
                rows.append({"kind": kind, "bits": bits, "variant": name, **found})
                print(
                    f"{kind}, {bits} bits, {name}: KL {found['kl']:.5f} ± {found['kl_error']:.5f}"
                )
        save(args.json, {"environment": environment(), "windows": len(windows), "rows": rows})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(DEMO), help="a Llama; default: the embedded one")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--windows", type=int, default=8, help="of calibration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
