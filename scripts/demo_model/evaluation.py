"""The third stage: what the saved model can do."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model.console import console
from demo_model.network import token_losses, window_losses

PROMPTS = (
    "The history of",
    "The city is the capital of",
    "He opened the door and",
)


@torch.no_grad()
def perplexity_by_context(model: Any, ids: torch.Tensor, longest: int) -> dict[int, float]:
    """Perplexity of the same tokens, scored with less or more text before them.

    Quarters of a window hold different texts, some easier than others; here only the context
    changes. Scored are some 32 blocks of a sixteenth of the longest window, spread over the text.
    """
    block = longest // 16
    first, last = longest - block, ids.numel() - block
    starts = range(first, last, max(block, (last - first) // 32))
    result = {}
    for context in (block // 4, block, 3 * block, 7 * block, longest - block):
        total = 0.0
        for start in starts:
            window = ids[start - context : start + block][None]
            total += float(token_losses(model, window)[:, -block:].sum())
        result[context] = round(math.exp(total / (block * len(starts))), 3)
    return result


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """Continue a prompt greedily by up to 60 tokens."""
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=60, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def evaluate(args: argparse.Namespace) -> None:
    """Reload the saved model on the CPU, in its own bf16 values, and measure it."""
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    text = (args.out / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    bytes_per_token = len(text.encode("utf-8")) / ids.numel()
    report: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": ids.numel(),
        "bytes_per_token": round(bytes_per_token, 3),
        "windows": {},
        "continuations": {p: continuation(model, tokenizer, p) for p in PROMPTS},
    }
    for length in (512, 1024, 2048, 4096):
        losses = window_losses(model, ids, length)
        if losses.numel() == 0:
            continue
        quarters = [math.exp(float(part.mean())) for part in losses.tensor_split(4, dim=1)]
        report["windows"][length] = {
            "count": losses.shape[0],
            "perplexity": round(math.exp(float(losses.mean())), 3),
            "bits_per_byte": round(float(losses.mean()) / math.log(2) / bytes_per_token, 4),
            "perplexity_by_quarter": [round(q, 3) for q in quarters],
        }
    report["perplexity_by_context"] = perplexity_by_context(model, ids, args.long_context)
    (args.work / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(report)
