"""The first stage: the split, the tokenizer and the encoded training documents."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.console import console
from demo_model.corpus import drop_overlaps, read_documents, sample_held_out

EOS = "<|endoftext|>"


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
