"""CPU seconds and memory of capture and proof, by number of layers; writes capture-time.json.

    python scripts/capture_time.py [--layers 2 8 32 80] [--out docs/results]

A Llama of small width with random weights, one thread; processor time, so that other work on the
machine does not count. Memory is what the process grew by while the model was captured and its
rotations proved, beside the bytes of the weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from kvquant_compile.capture import capture
from kvquant_compile.passes.recognise import recognise


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", nargs="*", type=int, default=[2, 8, 32, 80])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(2, 64)  # imports and first uses
    rows = [measure(layers, arguments.width) for layers in arguments.layers]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version()}  # fmt: skip
    record = {"versions": versions, "rows": rows}
    path = arguments.out / "capture-time.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


def measure(layers: int, width: int) -> dict[str, float]:
    """One model: seconds of processor time, and MB."""
    config = LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, vocab_size=256)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    weights = sum(p.nbytes for p in model.parameters())
    before, start = _peak(), time.process_time()
    captured = capture(model)
    traced = time.process_time()
    recognise(captured)
    end = time.process_time()
    row = {"layers": layers, "weights_mb": weights / 1e6, "capture_s": traced - start,
           "proof_s": end - traced, "grown_mb": _peak() - before}  # fmt: skip
    print(row, flush=True)
    return {name: round(value, 2) for name, value in row.items()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
