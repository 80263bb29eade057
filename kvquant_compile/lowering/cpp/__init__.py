"""Generated C++ for ``kvquant::attend`` on a CPU: one source per page format.

:mod:`.spec` says which formats are generated, :mod:`.source` writes the text, :mod:`.build` has the
system's compiler translate it once, :mod:`.launch` calls it, :mod:`.dispatch` decides at call time.
"""
