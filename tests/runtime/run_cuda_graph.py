"""Decode steps as CUDA graphs on a real device. Run as a module:

    python -m tests.runtime.run_cuda_graph [--json FILE] [MODEL ...]

Every model is generated with, greedily, with graphs and without, alone and in a left-padded batch;
then the cases that could break a graph. Prints one line per case; exits with 1 if one failed. On a
machine without a GPU the recording backend of the tests stands in, which tests this script.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.runtime.installed import installed
from tests.runtime.cuda_graph_models import (
    CUDA,
    DEVICE,
    LENGTH,
    SHAPES,
    failure,
    generate,
    optimised,
    prompt,
    same_text,
    steps,
    switched,
    timed,
    wait,
)
from tests.zoo import tokens


def case_generate(model: Any, batch: int) -> dict[str, Any]:
    """The text of both ways, milliseconds a token, and peak memory."""
    record: dict[str, Any] = {}
    texts = {}
    for enabled in (False, True):
        with switched(model, enabled) as backend:
            generate(model, batch, 5)
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            texts[enabled], seconds = timed(lambda: generate(model, batch))
            key = "graph" if enabled else "eager"
            record[f"{key}_ms"] = round(1e3 * seconds / LENGTH, 3)
            if CUDA:
                record[f"{key}_peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            record["captures"], record["replays"] = backend.captures, backend.replays
    # Either generate runs one decode step eagerly, captures at the next, and replays the rest.
    assert record["captures"] == 2, f"{record['captures']} captures; {failure(model)}"
    assert record["replays"] == 3 + LENGTH - 2, f"{record['replays']} replays"
    record["note"] = same_text(texts[False], texts[True])
    assert not record["note"], record["note"]
    return record


def case_no_sync(model: Any, batch: int) -> dict[str, Any]:
    """Whole model calls in torch's synchronisation check, and their time."""
    record: dict[str, Any] = {}
    count = 50 if CUDA else 3
    ids = tokens(batch, count, seed=3).to(DEVICE)
    for enabled in (False, True):
        with switched(model, enabled) as backend:
            cache = prompt(model, batch)
            cache.reserve(512)
            steps(model, cache, tokens(batch, 30, seed=2).to(DEVICE))
            if CUDA:
                torch.cuda.set_sync_debug_mode("error")
            try:
                steps(model, cache, ids[:, :2])
            finally:
                if CUDA:
                    torch.cuda.set_sync_debug_mode("default")
            before = backend.replays
            _, seconds = timed(lambda: steps(model, cache, ids))  # noqa: B023  called at once
            assert backend.replays - before == (count if enabled else 0), failure(model)
            record["graph_ms" if enabled else "eager_ms"] = round(1e3 * seconds / count, 3)
    return record


def case_two_caches(model: Any) -> dict[str, Any]:
    """Two caches take turns, and one is cropped between its steps."""

    def play() -> list[Tensor]:
        caches = [prompt(model, seed=seed) for seed in (1, 2)]
        out = []
        for i in range(8):
            out.append(steps(model, caches[i % 2], tokens(1, 1, seed=i).to(DEVICE)))
            if i == 5:
                caches[1].crop(-2)
        return out

    with switched(model, False):
        expected = play()
    with switched(model, True) as backend:
        got = play()
    assert (backend.captures, backend.replays) == (2, 6), (backend.captures, backend.replays)
    assert all(map(torch.equal, got, expected)), "other logits"
    return {"captures": backend.captures, "replays": backend.replays}


def case_growth(model: Any) -> dict[str, Any]:
    """A plain loop, over the end of several slabs."""
    ids = tokens(2, 150, seed=5).to(DEVICE)
    with switched(model, False):
        expected = steps(model, prompt(model, 2), ids)
    with switched(model, True) as backend:
        got = steps(model, prompt(model, 2), ids)
    assert torch.equal(got, expected), "other logits"
    assert backend.captures == 3, f"{backend.captures} captures"
    return {"captures": backend.captures, "replays": backend.replays}


def case_modes(model: Any) -> dict[str, Any]:
    """Beam search, assisted decoding, and generate in inference mode."""
    count = 40 if CUDA else 8
    for batch, options in ((2, {"num_beams": 3}), (1, {"prompt_lookup_num_tokens": 3}), (1, {})):
        with switched(model, False):
            expected = generate(model, batch, count, **options)
        with switched(model, True) as backend, torch.inference_mode():
            got = generate(model, batch, count, **options)
        note = same_text(expected, got)
        assert not note, f"{options}: {note}"
    return {"captures": backend.captures, "replays": backend.replays}


def case_kept_output(model: Any) -> dict[str, Any]:
    """What a user kept of a step is not overwritten by the next."""
    cache = prompt(model)
    backbone = model.get_decoder()
    kept = []
    with torch.no_grad():
        for seed in range(5):
            ids = tokens(1, 1, seed=seed).to(DEVICE)
            hidden = backbone(input_ids=ids, past_key_values=cache).last_hidden_state
            kept.append((hidden, hidden.clone()))
    wait()
    assert all(torch.equal(a, b) for a, b in kept)
    return {}


def case_threads(model: Any) -> dict[str, Any]:
    """Two threads, each on a stream of its own."""
    with switched(model, False):
        expected = [generate(model, batch) for batch in (1, 2)]
    got: dict[int, Tensor] = {}

    def work(batch: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if CUDA else contextlib.nullcontext():
            got[batch] = generate(model, batch)
            wait()

    with switched(model, True) as backend:
        threads = [threading.Thread(target=work, args=(batch,)) for batch in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    notes = [same_text(expected[batch - 1], got[batch]) for batch in (1, 2)]
    assert not any(notes), str(notes)
    return {"captures": backend.captures, "replays": backend.replays}


def case_memory(model: Any) -> dict[str, Any]:
    """Generating again and again reserves nothing more."""
    reserved = []
    for _ in range(8 if CUDA else 2):
        generate(model, 1, 8)
        reserved.append(torch.cuda.memory_reserved() / 2**20 if CUDA else 0.0)
    assert reserved[-1] <= reserved[1], f"reserved MiB after each: {reserved}"
    return {"note": f"{reserved[-1]:.0f} MiB reserved"}


def case_failed_capture(model: Any) -> dict[str, Any]:
    """Waiting inside a capture fails; the text is the eager one, and graphs work afterwards."""
    with switched(model, False):
        expected = generate(model, 1, 12)
    program = installed(model).decode.program
    compute = type(program).compute

    def waiting(self: Any, *args: Any) -> Tensor:
        output = compute(self, *args)
        if CUDA and torch.cuda.is_current_stream_capturing():
            output.sum().item()
        return output

    if not CUDA:
        installed(model).decode._backend.fail = RuntimeError("asked for")
    type(program).compute = waiting
    try:
        with warnings.catch_warnings(), switched(model, True):
            warnings.simplefilter("ignore")
            note = same_text(expected, generate(model, 1, 12))
            reason = failure(model)
    finally:
        type(program).compute = compute
    assert "capture failed" in reason, reason
    torch.rand(4, device=DEVICE).multinomial(1)  # random numbers must survive a failed capture
    assert not note, note
    if not CUDA:
        installed(model).decode._backend.fail = None
    with switched(model, True) as backend:
        note = same_text(expected, generate(model, 1, 12))
    assert not note, f"afterwards: {note}"
    assert (backend.captures, backend.replays) == (1, 10), failure(model)
    return {"note": reason[-60:]}


def case_copied_cache(model: Any) -> dict[str, Any]:
    """A deep copy of a cache goes its own way."""
    cache = prompt(model)
    steps(model, cache, tokens(1, 3, seed=1).to(DEVICE))
    twin = copy.deepcopy(cache)
    more = tokens(1, 4, seed=2).to(DEVICE)
    assert torch.equal(steps(model, cache, more), steps(model, twin, more)), "other logits"
    return {}


def cases(names: list[str]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(name, what to run) of every case; the model is made by its first."""
    models: dict[str, Any] = {}

    def make(name: str) -> dict[str, Any]:
        models[name], seconds = timed(lambda: optimised(name))
        return {"note": f"{seconds:.1f} s; {failure(models[name])}"}

    for name in names:
        yield f"{name}: optimise", lambda name=name: make(name)
        for batch in (1, 3):
            yield (
                f"{name}: generate, batch {batch}",
                lambda n=name, b=batch: case_generate(models[n], b),
            )
        yield f"{name}: no waits", lambda n=name: case_no_sync(models[n], 1)
    others = (case_no_sync_batch, case_two_caches, case_growth, case_modes, case_kept_output,
              case_threads, case_memory, case_copied_cache, case_failed_capture)  # fmt: skip
    for case in others:
        yield (
            f"{names[0]}: {case.__name__.removeprefix('case_')}",
            lambda c=case: c(models[names[0]]),
        )


def case_no_sync_batch(model: Any) -> dict[str, Any]:
    return case_no_sync(model, 8)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(SHAPES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if CUDA else "cpu, recorded"
    records: list[dict[str, Any]] = [{"device": device, "torch": torch.__version__}]
    print(records[0], flush=True)
    begun = time.perf_counter()
    for name, call in cases(options.models or list(SHAPES)):
        record: dict[str, Any] = {"case": name, "ok": True}
        start = time.perf_counter()
        try:
            record |= call()
        except Exception as error:
            record |= {"ok": False, "note": f"{type(error).__name__}: {error}"[:300]}
            traceback.print_exc()
        record["seconds"] = round(time.perf_counter() - start, 1)
        records.append(record)
        shown = {k: v for k, v in record.items() if k not in ("case", "ok") and v != ""}
        print(f"{'ok  ' if record['ok'] else 'FAIL'} {name:32s} {shown}", flush=True)
    failed = [r["case"] for r in records[1:] if not r["ok"]]
    print(f"{len(failed)} failed, {time.perf_counter() - begun:.0f} s", *failed, flush=True)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
