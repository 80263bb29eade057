"""The honest table: ours and the baselines on the same windows, at their effective bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from kvquant_compile.calib.observe import Observed, run_captured
from kvquant_compile.capture.captured import Captured
from kvquant_compile.evaluate.baselines import Fp8, KVQuantReleased, RoundTrip
from kvquant_compile.evaluate.fake import FakeCodec, fake_logits
from kvquant_compile.evaluate.score import Logits, Score, score
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.recipes.named import int_per_token, kivi
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.program import Program


@dataclass(frozen=True)
class Row:
    """One codec's line.

    Attributes:
        name: of the codec.
        bits: nominal width, the mean of the keys' and the values'; 16 for the original.
        effective_bits: stored bits per element over a window, everything counted; measured on
            the cache for ours, computed for codecs that store nothing here.
        cache_bytes: of one window's cache, measured for ours; None for the others.
        score: see :class:`Score`.
        loss_percent: perplexity over the original's, minus one, in percent.
    """

    name: str
    bits: float
    effective_bits: float
    cache_bytes: int | None
    score: Score
    loss_percent: float

    @property
    def loss_error(self) -> float | None:
        """Standard error of ``loss_percent``; None for a single window."""
        error = self.score.loss_error
        return None if error is None else (100 + self.loss_percent) * error

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def program_logits(captured: Captured, program: Program) -> tuple[Logits, list[QuantizedCache]]:
    """Logits through a program's packed cache, every token read from it.

    Returns:
        The function, and a list that holds the last call's cache.
    """
    names = [str(n.target) for n in captured.graph_module.graph.find_nodes(op="placeholder")]
    last: list[QuantizedCache] = []

    def run(*inputs: Any) -> Tensor:
        values = dict(zip(names, inputs, strict=True))
        batch, steps = values["hidden" if "hidden" in values else "ids"].shape[:2]
        positions = torch.arange(steps, device=program.device).expand(batch, steps)
        last[:] = [program.new_cache()]
        return program.run(values, last[0], positions, None, exact_chunk=False)

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return run_captured(captured, run, ids.to(captured.device))

    return logits, last


def baseline_codecs(
    bits: Sequence[int], observed: Mapping[int, Observed] | None
) -> dict[str, tuple[int, FakeCodec]]:
    """name -> (bits, codec); KVQuant as released needs calibration tokens."""
    codecs: dict[str, tuple[int, FakeCodec]] = {"fp8 e4m3": (8, Fp8())}
    for b in bits:
        codecs[f"int{b} per token"] = (b, RoundTrip(int_per_token(b)))
        codecs[f"int{b} (g32)"] = (b, RoundTrip(int_per_token(b, group=32)))
        codecs[f"kivi-{b} (g64)"] = (b, RoundTrip(kivi(b, group=64, window=0)))
        if observed is not None:
            codecs[f"kvquant-{b} (code)"] = (b, KVQuantReleased.fit(observed, b))
    return codecs


def evaluate_table(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    programs: Mapping[str, tuple[int, Program]],
    codecs: Mapping[str, tuple[int, FakeCodec]],
    windows: Sequence[Tensor],
    track: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> list[Row]:
    """Score everything on the same windows, the original first.

    Args:
        captured: the captured original.
        layers: its matched layers.
        programs: name -> (bits, program): ours.
        codecs: name -> (bits, codec): baselines.
        windows: int64 [1, S] each.
        track: wraps the windows, for a progress bar.
    """
    ours = {name: program_logits(captured, program) for name, (_, program) in programs.items()}
    candidates = {name: logits for name, (logits, _) in ours.items()}
    candidates |= {
        name: fake_logits(captured, layers, codec) for name, (_, codec) in codecs.items()
    }
    original = original_logits(captured)
    scores = score(original, candidates, windows, track)
    base, tokens = scores["original"].perplexity, windows[0].shape[1]
    rows = [Row("original", 16, 8.0 * captured.dtype.itemsize, None, scores["original"], 0.0)]
    for name, (bits, codec) in codecs.items():
        effective = mean_bits(layers, codec, tokens)
        rows.append(_row(name, bits, effective, None, scores[name], base))
    for name, (bits, _) in programs.items():
        cache = ours[name][1][0]
        effective = cache.effective_bits()
        rows.append(_row(name, bits, effective, cache.nbytes(), scores[name], base))
    return rows


def _row(
    name: str, bits: int, effective: float, cache: int | None, result: Score, base: float
) -> Row:
    return Row(name, bits, effective, cache, result, 100 * (result.perplexity / base - 1))


def original_logits(captured: Captured) -> Logits:
    """Logits of the captured original, nothing quantised."""
    gm = captured.graph_module

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return run_captured(captured, gm, ids.to(captured.device))

    return logits


def mean_bits(layers: Sequence[MatchedLayer], codec: FakeCodec, tokens: int) -> float:
    """Effective bits of a codec that stores nothing here, over all layers."""
    plans = [layer.plan for layer in layers]
    sizes = [p.kv_heads * p.key_dim for p in plans]
    bits = [codec.effective_bits(p.kv_heads, p.key_dim, tokens) for p in plans]
    return sum(b * s for b, s in zip(bits, sizes, strict=True)) / sum(sizes)


def render(rows: Sequence[Row], title: str, best: Collection[str] = ()) -> Table:
    """A terminal table; rows named in ``best`` are marked as such."""
    notes = ["± standard errors over windows, of the loss of its paired difference"]
    if best:
        notes.insert(0, "* nothing here has fewer bits and less divergence")
    caption = "\n".join(notes)
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in ("codec", "eff. bits", "perplexity", "loss", "KL (nats)", "top-1"):
        table.add_column(name, justify="left" if name == "codec" else "right")
    for row in rows:
        s = row.score
        table.add_row(
            f"{row.name} *" if row.name in best else row.name,
            f"{row.effective_bits:.3f}",
            f"{s.perplexity:.4f}",
            f"{row.loss_percent:+.2f}{_plus_minus(row.loss_error, 2)} %",
            f"{s.kl:.5f}{_plus_minus(s.kl_error, 5)}",
            f"{100 * s.top1:.1f} %",
        )
    return table


def _plus_minus(error: float | None, digits: int) -> str:
    return "" if error is None else f" ± {error:.{digits}f}"
