"""The second stage: training by the clock, or up to a number of tokens."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer, LlamaForCausalLM

from demo_model.console import console
from demo_model.network import build_model, mean_loss, window_losses


def batches(
    stream: torch.Tensor, length: int, rows: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Yield batches of windows for ever, each epoch cut at another offset and shuffled."""
    offsets = torch.arange(length + 1)
    while True:
        shift = int(torch.randint(length, (1,), generator=generator))
        count = (stream.numel() - shift - 1) // length
        order = torch.randperm(count, generator=generator)
        if count < rows:
            raise ValueError(f"the corpus fills {count} windows of {length}; a batch needs {rows}")
        for first in range(0, count - rows + 1, rows):
            starts = order[first : first + rows, None] * length + shift
            index = (starts + offsets).to(stream.device)
            yield stream[index].long()


def optimizer_for(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].is_cuda
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def rate_at(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at a point of the run: linear warmup, then cosine to 1 %."""
    if progress < warmup:
        return max(progress, 1e-4) / warmup
    done = min(1.0, (progress - warmup) / (1.0 - warmup))
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done))


def autocast(device: torch.device) -> Any:
    """Bf16 autocast on an accelerator, nothing on a CPU, where it would slow a small model."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


class Run:
    """One training run: its model, its data, its place in the schedule and its log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stream = np.load(args.work / "tokens.npy").astype(np.int32)
        self.stream = torch.from_numpy(stream).to(self.device)
        tokenizer = AutoTokenizer.from_pretrained(args.out)
        text = (args.out / "heldout.txt").read_text(encoding="utf-8")
        self.held_out = torch.tensor(
            tokenizer(text, verbose=False)["input_ids"], device=self.device
        )
        self.text_bytes = len(text.encode("utf-8"))
        self.model = build_model(args).to(self.device)
        self.optimizer = optimizer_for(self.model, args)
        self.step_loss: Callable[..., torch.Tensor] = mean_loss
        if args.compile and self.device.type == "cuda":
            self.step_loss = torch.compile(mean_loss, dynamic=False)
        generator = torch.Generator().manual_seed(args.seed)
        self.sources = {
            length: batches(self.stream, length, max(1, args.batch_tokens // length), generator)
            for length in (args.context, args.long_context)
        }
        self.tokens = 0
        self.steps = 0
        self.log: list[dict[str, float]] = []

    def loss_of(self, batch: torch.Tensor) -> torch.Tensor:
        """Loss of a batch, in the precision of the run."""
        with autocast(self.device):
            return self.step_loss(self.model, batch)

    def warm_up(self) -> None:
        """Compile for both lengths before the clock starts, so that no schedule time goes there."""
        for length in self.sources:
            rows = max(1, self.args.batch_tokens // length)
            dummy = torch.zeros(rows, length + 1, dtype=torch.long, device=self.device)
            started = time.monotonic()
            try:
                self.loss_of(dummy).backward()  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                # A machine without a working compiler can still train, only more slowly.
                console.print(f"training uncompiled: {str(error)[:400]}")
                self.step_loss = mean_loss
                self.loss_of(dummy).backward()  # type: ignore[no-untyped-call]
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.optimizer.zero_grad(set_to_none=True)
            console.print(f"windows of {length} ready after {time.monotonic() - started:.1f} s")

    def step(self, progress: float) -> torch.Tensor:
        """Do one optimizer step and return its loss, still on the device."""
        long = progress >= 1.0 - self.args.long_share
        batch = next(self.sources[self.args.long_context if long else self.args.context])
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * rate_at(progress, self.args.warmup)
        loss = self.loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += batch.shape[0] * (batch.shape[1] - 1)
        self.steps += 1
        return loss.detach()

    def record(self, progress: float, loss: float, seconds: float) -> None:
        """Measure the held-out sample and add a line to the log."""
        with autocast(self.device):
            losses = window_losses(self.model, self.held_out, self.args.context)
        nll = float(losses.mean())
        entry = {
            "progress": round(progress, 4),
            "step": self.steps,
            "tokens": self.tokens,
            "seconds": round(seconds, 1),
            "train_loss": round(loss, 4),
            "held_out_loss": round(nll, 4),
            "held_out_perplexity": round(math.exp(nll), 3),
        }
        self.log.append(entry)
        console.print(
            f"{progress:6.1%}  step {self.steps:5d}  {self.tokens / 1e6:7.1f} M tokens  "
            f"{seconds:5.0f} s  train {loss:.3f}  held-out {nll:.3f} (ppl {math.exp(nll):.2f})"
        )

    def save(self) -> None:
        """Save the model in bf16, and the log beside the encoded corpus."""
        copy: Any = LlamaForCausalLM(self.model.config)
        copy.to(torch.bfloat16)
        copy.load_state_dict(self.model.state_dict())
        copy.save_pretrained(self.args.out)
        facts = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "settings": {k: v for k, v in vars(self.args).items() if isinstance(v, int | float)},
            "log": self.log,
        }
        (self.args.work / "training.json").write_text(json.dumps(facts, indent=1) + "\n")

    def train(self) -> None:
        """Train until the tokens or the minutes run out, whichever comes first.

        The schedule follows the larger of the two shares, so a run that the clock ends has still
        seen its whole learning-rate decay and its long windows.
        """
        self.warm_up()
        started, progress, marks, behind, smooth = time.monotonic(), 0.0, 0, None, 0.0
        columns = (TextColumn("training"), BarColumn(), TextColumn("{task.percentage:>5.1f} %"))
        with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
            task = bar.add_task("train", total=1.0)
            while progress < 1.0:
                loss = self.step(progress)
                if behind is not None:
                    # Reading the previous step's loss keeps the host one step ahead at most, so
                    # the clock below means what it says, without draining the device's queue.
                    value = float(behind)
                    smooth = value if smooth == 0.0 else 0.95 * smooth + 0.05 * value
                behind = loss
                seconds = time.monotonic() - started
                progress = max(self.tokens / self.args.tokens, seconds / (60 * self.args.minutes))
                bar.update(task, completed=min(progress, 1.0))
                if progress >= (marks + 1) / 20:
                    marks = int(progress * 20)
                    self.record(progress, smooth, seconds)
                    if marks in (10, 17):
                        self.save()
        self.save()
