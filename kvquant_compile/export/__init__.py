"""Optimised models as files that other runtimes open: ONNX, and torch.export archives."""

from kvquant_compile.export.onnx_file import export_onnx
from kvquant_compile.export.pt2 import export_pt2, load_pt2
from kvquant_compile.export.session import OnnxCache, OnnxSession

__all__ = ["OnnxCache", "OnnxSession", "export_onnx", "export_pt2", "load_pt2"]
