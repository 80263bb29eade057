"""Train the small model that ships in ``kvquant_compile/assets/demo``.

Three stages, run in order unless ``--stage`` names one:

* ``prepare``: split the corpus, train the tokenizer, encode the training documents;
* ``train``: train a Llama-architecture model from scratch and save it in bf16;
* ``evaluate``: reload what was saved, offline, and measure it.

The stages meet in two folders: ``--out`` receives what ships, ``--work`` what does not (the encoded
corpus, the training log), so a slow machine can prepare and a fast one train.

Example::

    python scripts/train_demo_model.py --corpus corpus.txt.xz --work /tmp/demo \\
        --out kvquant_compile/assets/demo --minutes 6
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

EOS = "<|endoftext|>"
SHINGLE_WORDS = 12
"""Two texts that share a run of this many words are taken to share a source."""
PROMPTS = (
    "The history of",
    "The city is the capital of",
    "He opened the door and",
)

console = Console(width=100)


# --- The corpus ----------------------------------------------------------------------------------


def read_documents(path: Path) -> list[str]:
    """Read a corpus (plain or xz) whose documents are separated by NUL."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return [doc for doc in raw.decode("utf-8").split("\0") if doc.strip()]


def shingles(text: str) -> set[int]:
    """Hash every run of ``SHINGLE_WORDS`` words of a text."""
    words = re.findall(r"\w+", text.lower())
    last = len(words) - SHINGLE_WORDS + 1
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(last)}


def drop_overlaps(documents: list[str], reserved: Iterable[str], limit: int) -> list[str]:
    """Leave out the documents that share ``limit`` or more shingles with a reserved text.

    Encyclopaedias repeat themselves across editions and in boilerplate, so holding a document out
    is not enough to keep its sentences out of the training set.
    """
    kept_back: set[int] = set()
    for text in reserved:
        kept_back |= shingles(text)
    return [doc for doc in documents if len(shingles(doc) & kept_back) < limit]


def cut_at_paragraph(text: str, limit: int) -> str:
    """Cut a text to at most ``limit`` characters, at the end of a line where there is one."""
    if len(text) <= limit:
        return text.strip()
    end = text.rfind("\n", 0, limit)
    return text[: end if end > limit // 2 else limit].strip()


def sample_held_out(documents: list[str], size: int, long_limit: int) -> str:
    """Pick the shipped sample from the held-out documents, half of it from long ones.

    Long documents (cut at ``long_limit``) let a 4096-token window see one text only; short ones
    bring variety. Stubs are left out because they say nothing about the use of context, and the
    encyclopaedia's project pages because they are one boilerplate sentence over and over.
    """
    documents = [doc for doc in documents if not doc.startswith("Wikipedia:")]
    long = sorted((d for d in documents if len(d) >= long_limit), key=len, reverse=True)
    short = [d for d in reversed(documents) if long_limit // 10 <= len(d) < long_limit]
    parts: list[str] = []
    spent = {"long": 0, "short": 0}
    while (long or short) and sum(spent.values()) < size:
        # Whichever half is behind goes next, so the two kinds alternate through the file.
        kind = "long" if long and (spent["long"] <= spent["short"] or not short) else "short"
        doc = (long if kind == "long" else short).pop(0)
        part = cut_at_paragraph(doc, min(long_limit, max(200, size - sum(spent.values()))))
        parts.append(part)
        spent[kind] += len(part.encode("utf-8"))
    return "\n\n".join(parts) + "\n"


# --- The tokenizer -------------------------------------------------------------------------------


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the end-of-text token gets id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer, length=len(documents))
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Encode documents into one stream, each followed by the end-of-text token."""
    eos = tokenizer.token_to_id(EOS)
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), 256):
        for encoding in tokenizer.encode_batch(documents[start : start + 256]):
            pieces.append(np.asarray([*encoding.ids, eos], dtype=np.uint16))
    return np.concatenate(pieces)


def prepare(args: argparse.Namespace) -> None:
    """Split the corpus, train and save the tokenizer, encode the training documents."""
    documents = read_documents(args.corpus)[-args.max_documents :]
    training, held_out = documents[: -args.hold_out], documents[-args.hold_out :]
    sample = sample_held_out(held_out, args.sample_bytes, args.sample_long)
    reserved = [*held_out, *(path.read_text(encoding="utf-8") for path in args.exclude)]
    kept = drop_overlaps(training, reserved, args.overlap_limit)
    tokenizer = train_tokenizer(kept, args.vocab)
    stream = encode(tokenizer, kept)

    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    np.save(args.work / "tokens.npy", stream)
    (args.out / "heldout.txt").write_text(sample, encoding="utf-8")
    wrapper: Any = PreTrainedTokenizerFast  # its constructor carries no annotations
    wrapper(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        model_max_length=args.long_context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(args.out)
    facts = {
        "documents": len(documents),
        "held_out": len(held_out),
        "dropped_for_overlap": len(training) - len(kept),
        "training_bytes": sum(len(d.encode("utf-8")) for d in kept),
        "training_tokens": int(stream.size),
        "sample_bytes": len(sample.encode("utf-8")),
    }
    (args.work / "prepare.json").write_text(json.dumps(facts, indent=1) + "\n")
    console.print(facts)


# --- The model -----------------------------------------------------------------------------------


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally with no mask tensor, which keeps the fused kernel available.

    Under ``torch.compile`` the stock path may build the mask, and a mask given as a tensor rules
    the fastest kernel out. Training windows are full, so causality is all the mask there is.
    """
    # Not every backend takes fewer key heads than query heads, and a silent fallback to the
    # unfused path would cost far more than these two copies.
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Stand in for the mask builder of ``causal_attention``."""


def build_model(args: argparse.Namespace) -> Any:
    """Build the untrained model."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.kv_heads,
        head_dim=64,
        max_position_embeddings=args.long_context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=True,
    )
    AttentionInterface.register("training_causal", causal_attention)
    AttentionMaskInterface.register("training_causal", no_mask)
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("training_causal")
    return model


def token_losses(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Next-token losses, one per predicted token, of windows one token longer than the input."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(batch.shape[0], -1)


def mean_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of a batch."""
    return token_losses(model, batch).mean()


# --- Training ------------------------------------------------------------------------------------


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


# --- Evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def window_losses(model: Any, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Losses of every whole window of ``length`` tokens, one row per window.

    A window is fed alone and its first token is context only, so a row has ``length - 1`` losses.
    """
    count = ids.numel() // length
    rows = ids[: count * length].view(count, length)
    per_call = max(1, 8192 // length)
    return torch.cat([token_losses(model, part) for part in torch.split(rows, per_call)])


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


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    add = parser.add_argument
    add("--stage", choices=("all", "prepare", "train", "evaluate"), default="all")
    add("--corpus", type=Path, help="text or .xz, documents separated by NUL")
    add("--exclude", type=Path, action="append", default=[], help="text to keep out of training")
    add("--work", type=Path, required=True, help="folder for what does not ship")
    add("--out", type=Path, required=True, help="folder for what ships")
    add("--hold-out", type=int, default=200, help="documents held out, from the corpus's end")
    add("--overlap-limit", type=int, default=10, help="shared shingles that drop a document")
    add("--max-documents", type=int, default=10**9, help="use only so many, from the end")
    add("--sample-bytes", type=int, default=120_000)
    add("--sample-long", type=int, default=20_000, help="characters kept of a long document")
    add("--vocab", type=int, default=4096)
    add("--hidden", type=int, default=256)
    add("--intermediate", type=int, default=704)
    add("--layers", type=int, default=6)
    add("--kv-heads", type=int, default=2)
    add("--context", type=int, default=1024)
    add("--long-context", type=int, default=4096)
    add("--long-share", type=float, default=0.15, help="last share of the run, in long windows")
    add("--batch-tokens", type=int, default=131_072)
    add("--tokens", type=float, default=3.0e8, help="stop after so many")
    add("--minutes", type=float, default=6.0, help="stop after so many")
    add("--lr", type=float, default=3e-3)
    add("--warmup", type=float, default=0.02, help="share of the run")
    add("--weight-decay", type=float, default=0.3)
    add("--seed", type=int, default=20)
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.corpus is None and args.stage in ("all", "prepare"):
        parser.error("--corpus is needed to prepare")
    return args


def main() -> None:
    """Run the stages asked for."""
    args = parse_arguments()
    if args.stage in ("all", "prepare"):
        prepare(args)
    if args.stage in ("all", "train"):
        Run(args).train()
    if args.stage in ("all", "evaluate"):
        evaluate(args)


if __name__ == "__main__":
    main()
