"""Optimised models as files that other runtimes open: ONNX, and torch.export archives."""

from kvquant_compile.export.onnx_file import export_onnx
from kvquant_compile.export.session import OnnxCache, OnnxSession

__all__ = ["OnnxCache", "OnnxSession", "export_onnx"]
