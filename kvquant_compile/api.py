"""``optimize`` and its counterparts. Each stage below is one module of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvquant_compile.asked import Asked
from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.calib.data import WindowSettings, sample_windows
from kvquant_compile.capture import capture
from kvquant_compile.capture.cleanup import evaluation_mode
from kvquant_compile.checks import check_refusals, refuse_optimised
from kvquant_compile.codec.algebra import Recipe
from kvquant_compile.config import Bits, Slots
from kvquant_compile.dump import dumping
from kvquant_compile.inspect.certificates import certificates as layer_certificates
from kvquant_compile.inspect.explained import explained
from kvquant_compile.inspect.report import Report, build_report
from kvquant_compile.memory.fit import Request, optimize_within
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.progress import Progress
from kvquant_compile.runtime.adapters import unwrapped
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.chunks import PREFILL_CHUNK, check_chunk
from kvquant_compile.runtime.installed import ATTRIBUTE, Installed, installed
from kvquant_compile.runtime.plugback import install, output_type, uninstall
from kvquant_compile.runtime.program import build_program
from kvquant_compile.runtime.saved import load
from kvquant_compile.runtime.validate import validate_lossless

Model = TypeVar("Model", bound=nn.Module)


def optimize(
    model: Model,
    bits: Bits | Mapping[int, Bits] | float | str | None = None,
    *,
    budget: float | str | None = None,
    context: int | None = None,
    memory: int | float | str | None = None,
    batch: int = 1,
    allocation: str = "measured",
    recipe: str | Recipe | Callable[..., Recipe] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    slots: Slots | None = None,
    sinks: int | None = None,
    recent_window: int | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    strict: bool = True,
    seed: int = 0,
    windows: int | None = None,
    sensitivity: str = "fisher",
    own_text: float | None = None,
    attend_quantized: bool = False,
    cuda_graphs: bool = True,
    prefill_chunk: int | None = PREFILL_CHUNK,
    progress: bool | None = None,
    dump: str | Path | None = None,
) -> Model:
    """Store a decoder's KV cache in a few bits; ``generate`` and ``forward`` go on working.

    The model is changed in place (three instance attributes; see :func:`restore`) and returned.
    Its class, config, parameters and state dict stay as they are.

    Args:
        model: a transformers causal LM, PEFT's wrapper of one, or an ``nn.Module`` of one of three
            calling conventions (see ``example_inputs``).
        bits: width of keys and values, 1..8, or 16 for lossless storage; a pair
            (key_bits, value_bits); or cache layer -> either. None: 3, the recipe's own, or the
            artifact's. A fraction (2.5), or "auto" with a ``budget``: every layer's keys and
            values get widths of their own, by sensitivity, within the bytes of such a mixture.
        budget: for ``bits="auto"``: effective bits per element (2.9), everything stored for a
            full page included, or bytes a token over all layers ("1.5 kB").
        context: tokens of every sequence that have to fit into ``memory``. The widths are then the
            largest that fit, as measured on the result; given ones are only checked, and "auto"
            takes the memory as its budget.
        memory: bytes for everything, weights included: a number, "24 GB" or "24 GiB".
        batch: sequences that have to fit.
        allocation: how sensitivity is found: "measured" (divergence of the model's logits with
            one layer's keys or values quantised at a time) or "fisher" (from the gradients of
            calibration, much faster).
        recipe: how they are stored: "kvquant+" (the default), a published method ("kvquant",
            "kivi", "rotatekv", "qserve", "gear", "rvq", "fp8", "int"), a
            :class:`kvquant_compile.recipes.Recipe`, or a function of the widths that returns one.
        calibration: None (the model samples its own text), texts with ``tokenizer``, token
            tensors, an iterable of these, or a saved artifact (object or ``*.safetensors``
            path).
        tokenizer: for texts.
        slots: exact outlier slots of every (token, head): of keys and values each, or a pair of
            both; None: (1, 0), or the artifact's. Every slot makes decoding slower; where values
            have outliers that move from channel to channel, 1 pays (docs/accuracy.md, "The
            default").
        sinks: leading tokens of every sequence kept exactly; None: 1, or the artifact's.
        recent_window: last tokens of every sequence kept exactly besides, a multiple of 16, up to
            1024; None: 16, or the artifact's. They cost 16 bits a stored element each, whatever
            the context, and nearly no time; 0 keeps none.
        example_inputs: (ids, past) for modules that are not transformers': past an empty cache
            (None, or a cache object), or a start position (0, or positions): docs/conventions.md.
        strict: raise when a layer's keys must be stored after RoPE; else warn once.
        seed: of calibration; same seed, same tables.
        windows: calibration windows; None for the default.
        own_text: part of the calibration tokens that the model samples itself where text is given,
            which keeps tables from a narrow text good for others; None: three quarters. 0 takes the
            text alone, and four times as much of it.
        sensitivity: "fisher" (squared gradients of the loss) or "none" (no backward pass).
        attend_quantized: every token, the current step's own included, attends to quantised
            keys and values only. Slower and a little less accurate; what evaluation needs.
        cuda_graphs: on a GPU, run a decode step as one CUDA graph wherever that is possible
            (``explain`` says where not); see :func:`use_cuda_graphs`.
        prefill_chunk: longer prompts are run in chunks of so many tokens, which read the chunks
            before them from the packed cache; None never cuts.
        progress: show progress bars; None shows them on a terminal.
        dump: folder to write the graph after every pass, plots of the tables, certificates and
            sources to, with an ``index.html``; None: where KVQUANT_DUMP in the environment says.

    Returns:
        ``model``.

    Raises:
        KVQuantError: something cannot be honoured; nothing was changed then.
    """
    options_given = dict(locals())  # before anything else is bound
    refuse_optimised(model)
    network = unwrapped(model)
    if context is not None or memory is not None:
        return _optimize_within(**options_given)
    check_chunk(prefill_chunk)
    exact = slots, sinks, recent_window
    asked = Asked.make(bits, budget, allocation, recipe, exact, calibration, tokenizer)
    options = CalibrationOptions.make(seed, windows, sensitivity, own_text)
    observer = dumping(dump, type(model).__name__)
    # Gradients are needed in calibration, whatever mode the caller is in.
    with (
        observer.watching(),
        torch.inference_mode(False),
        evaluation_mode(model),
        Progress(progress) as bar,
    ):
        bar.stage("capture")
        captured = capture(network, example_inputs, observer)
        bar.stage("recognise and prove")
        layers = asked.stored(recognise(captured, observer))
        observer.matched(captured, layers)
        check_refusals(layers, strict)
        bar.stage("validate (lossless)")
        errors = validate_lossless(captured, layers)
        fitted = asked.fitted(captured, layers, options, bar, observer)
        specs, tables = fitted.for_model(captured, layers)
        bar.stage("rewrite")
        program = build_program(captured, layers, specs, tables, observer)
        report = build_report(captured, layers, program, errors, fitted)
        state = Installed(program, captured, layers, fitted, report, attend_quantized)
        state.cuda_graphs, state.prefill_chunk = cuda_graphs, prefill_chunk
        observer.finished(state)
    install(network, state, output_type(captured))
    return model


def _optimize_within(
    model: Model,
    context: int | None,
    memory: int | float | str | None,
    batch: int,
    **options: Any,
) -> Model:
    """``optimize`` with the widest format that fits."""
    request = Request.make(context, memory, batch)
    return optimize_within(optimize, model, request, options)


def sample_calibration(
    model: nn.Module, windows: int = 32, tokens: int = 512, seed: int = 0
) -> list[Tensor]:
    """Token windows int64 [1, tokens] that the model samples itself; what ``optimize`` uses when
    it is given no text. Reuse them to optimise at several widths (``calibration=windows,
    own_text=0``).

    Args:
        model: a causal LM, optimised or not.
        windows, tokens: how many, how long.
        seed: same seed, same windows.

    Raises:
        KVQuantError: the model cannot be captured or sampled from.
    """
    network = unwrapped(model)
    state = network.__dict__.get(ATTRIBUTE)
    settings = WindowSettings(windows, tokens, seed)
    with evaluation_mode(model):
        if state is None:
            return sample_windows(capture(network), settings)
        state.quiet = True
        try:
            return sample_windows(state.captured, settings)
        finally:
            state.quiet = False


def restore(model: Model) -> Model:
    """Give an optimised model its original behaviour back.

    Raises:
        OptionError: it is not optimised.
    """
    uninstall(model)
    return model


def explain(model: nn.Module, *, layer: int | None = None, source: bool = False) -> Report:
    """What was matched, proved and rewritten in an optimised model, and what it costs.

    Args:
        model: an optimised model.
        layer: a cache layer's index, to be told of that one only.
        source: add the source of the kernels that are generated for a decode step.

    Raises:
        OptionError: it is not optimised, or has no such layer.
    """
    return explained(installed(model), layer=layer, source=source)


def use_cuda_graphs(model: nn.Module, enabled: bool = True) -> None:
    """Switch CUDA graphs for decode steps on or off; captured ones are dropped either way.

    Raises:
        OptionError: it is not optimised.
    """
    installed(model).cuda_graphs = enabled


def certificates(model: nn.Module) -> dict[int, dict[str, Any]]:
    """What was proved of every cache layer, as JSON-able records; see
    :mod:`kvquant_compile.inspect.certificates`, which also writes and checks them.

    Raises:
        OptionError: the model is not optimised.
    """
    state = installed(model)
    return layer_certificates(state.captured, state.layers, state.report.validation)


def artifact(model: nn.Module) -> Artifact:
    """The formats and tables of an optimised model, to be saved and used again.

    Raises:
        OptionError: it is not optimised.
    """
    return installed(model).artifact


def new_cache(model: nn.Module) -> QuantizedCache:
    """An empty cache for an optimised model.

    Raises:
        OptionError: it is not optimised.
    """
    return installed(model).program.new_cache()


def load_cache(path: str | Path, model: nn.Module) -> QuantizedCache:
    """A cache that :meth:`QuantizedCache.save` wrote, to be passed on as ``past_key_values``.

    Args:
        path: the file.
        model: the optimised model that it was saved from, or the same loaded again and optimised
            with the same artifact.

    Raises:
        OptionError: the model is not optimised.
        ArtifactError: no such file, damaged, of another version, or of another model or tables.
    """
    program = installed(model).program
    return load(program.new_cache(), program.identity(), path)


__all__ = [
    "artifact",
    "certificates",
    "explain",
    "load_cache",
    "new_cache",
    "optimize",
    "restore",
    "sample_calibration",
    "use_cuda_graphs",
]
