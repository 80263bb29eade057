"""Generated Triton kernels for the two ops: portable, one source per format.

:mod:`.spec` says which formats are generated, :mod:`.history` writes the source of the kernel
that reads pages, :mod:`.dispatch` decides at call time. Importing this package never needs
Triton; running a kernel does.
"""
