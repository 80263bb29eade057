"""A compiler pass that stores the KV cache of any decoder in 2 to 4 bits.

    model = kvquant_compile.optimize(model, bits=3)

See :func:`optimize`; the package's README lists the parts.
"""

import os

from kvquant_compile import logs
from kvquant_compile.api import (
    artifact,
    certificates,
    explain,
    load_cache,
    new_cache,
    optimize,
    restore,
    sample_calibration,
    use_cuda_graphs,
)
from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.errors import (
    ArtifactError,
    CacheError,
    CalibrationError,
    KVQuantError,
    MissingDependencyError,
    OptionError,
    UnsupportedLayerError,
    UnsupportedModelError,
    ValidationError,
)
from kvquant_compile.evaluate.score import quantised_attention
from kvquant_compile.export import OnnxSession, export_onnx, export_pt2, load_pt2
from kvquant_compile.memory import MemoryReport, max_context, memory_report
from kvquant_compile.pretrained import from_pretrained, save_pretrained
from kvquant_compile.runtime.cache import QuantizedCache

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "ArtifactError",
    "CacheError",
    "CalibrationError",
    "KVQuantError",
    "MemoryReport",
    "MissingDependencyError",
    "OnnxSession",
    "OptionError",
    "QuantizedCache",
    "UnsupportedLayerError",
    "UnsupportedModelError",
    "ValidationError",
    "artifact",
    "certificates",
    "explain",
    "export_onnx",
    "export_pt2",
    "from_pretrained",
    "load_cache",
    "load_pt2",
    "max_context",
    "memory_report",
    "new_cache",
    "optimize",
    "quantised_attention",
    "restore",
    "sample_calibration",
    "save_pretrained",
    "use_cuda_graphs",
]

logs.configure(os.environ.get(logs.VARIABLE, ""))
