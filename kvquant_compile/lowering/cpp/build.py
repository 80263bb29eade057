"""From C++ text to a loaded library: the system's compiler, run once, and a folder that remembers.

A library's name is the hash of its source, the flags and the compiler's own predefined macros
(version and target instructions), so a folder may be shared by machines and versions. Files appear
by renaming, so processes may build the same kernel at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from kvquant_compile.errors import KVQuantError

FOLDER = "KVQUANT_CACHE_DIR"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi",
         "-Wno-ignored-attributes", "-pthread")  # fmt: skip
NATIVE = ("-march=native", "-mprefer-vector-width=512")
SECONDS = 300
"""A compiler that takes longer is taken for hung."""


class CompilationError(KVQuantError):
    """The system's compiler did not translate a generated kernel."""


@functools.cache
def compiler() -> str:
    """Path of a C++ compiler: ``CXX``, or the first of c++, g++, clang++; empty without one."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), "")


def flags(native: bool, contract: bool) -> tuple[str, ...]:
    """Compiler flags.

    Args:
        native: for this very machine, else for any of its architecture.
        contract: whether products and sums may be fused, which rounds once instead of twice.
    """
    common = (*FLAGS, f"-ffp-contract={'fast' if contract else 'off'}")
    return (*common, *(x for x in NATIVE if x in _accepted())) if native else common


@functools.cache
def _accepted() -> tuple[str, ...]:
    """Those of the flags for this machine that the compiler knows."""
    return tuple(flag for flag in NATIVE if _macros((flag,)))


@functools.cache
def _macros(extra: tuple[str, ...]) -> str:
    """What the compiler predefines under some flags; empty where it refuses them."""
    command = [compiler(), *extra, "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    return done.stdout if done.returncode == 0 else ""


def folder() -> Path:
    """Where libraries are kept: ``KVQUANT_CACHE_DIR``, or the user's cache folder, or where
    that cannot be written a temporary one of this process."""
    asked = os.environ.get(FOLDER)
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    chosen = Path(asked) if asked else Path(base) / "kvquant_compile" / "cpp"
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return _temporary()
    return chosen if os.access(chosen, os.W_OK) else _temporary()


@functools.cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="kvquant_compile_"))


@functools.cache
def toolchain_failure() -> str:
    """Why nothing can be compiled here; empty when a small program can."""
    try:
        build('#include <vector>\nextern "C" int probe() { return 1; }\n', "probe")
    except CompilationError as error:
        return str(error)
    return ""


def build(source: str, name: str, native: bool = True, contract: bool = True) -> ctypes.CDLL:
    """The loaded library of a source; arguments as of :func:`flags`.

    Raises:
        CompilationError: there is no compiler, or it fails.
    """
    if not compiler():
        raise CompilationError(
            "no kernel can be compiled",
            why="no C++ compiler was found (CXX, c++, g++, clang++)",
            do="Install one, or set KVQUANT_KERNELS=torch.",
        )
    options = flags(native, contract)
    macros = _macros(tuple(x for x in options if x in NATIVE))
    key = "\0".join([source, *options, macros])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    target = folder() / f"{name}_{digest}.so"
    if not target.exists():
        _compile(source, target, options)
    try:
        return ctypes.CDLL(str(target))
    except OSError:  # damaged since: once more
        _compile(source, target, options)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise _failed(f"its library cannot be loaded: {error}") from error


def _compile(source: str, target: Path, options: tuple[str, ...]) -> None:
    """Write the library and, beside it, its source."""
    with tempfile.TemporaryDirectory(dir=target.parent) as here:
        text, library = Path(here) / "kernel.cpp", Path(here) / "kernel.so"
        text.write_text(source, encoding="utf-8")
        command = [compiler(), *options, str(text), "-o", str(library)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise _failed(f"it ran for more than {SECONDS} s") from None
        if done.returncode != 0:
            lines = [x for x in done.stderr.splitlines() if "error" in x] or ["no message"]
            raise _failed(f"{compiler()} says: {lines[0].strip()}")
        os.replace(text, target.with_suffix(".cpp"))
        os.replace(library, target)


def _failed(why: str) -> CompilationError:
    return CompilationError(
        "a generated kernel was not compiled",
        why=why,
        do="Set CXX to another compiler, or KVQUANT_KERNELS=torch to do without.",
    )
