"""The source of one kernel: constants, what unpacks its pages, and the C++ text common to all."""

from __future__ import annotations

import functools
from importlib import resources

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import table_limit
from kvquant_compile.lowering.cpp.spec import CppSpec, index_types, page_constants
from kvquant_compile.lowering.cpp.writer import CodeWords, CppSource

_KEY_ARGUMENTS = (
    "const uint8_t* page, int chunk, int half, const HeadConstants& head, const float* turns, "
    "float* keys"
)
_VALUE_ARGUMENTS = (
    "const uint8_t* page, int chunk, int half, const float* levels, const float* weights, "
    "int queries, float* sums"
)

_BYTE_ARGUMENTS = (
    "const uint8_t* page, int half, const float* levels, const uint8_t* weights, "
    "const float* units, int queries, float* sums"
)


def kernel_source(spec: CppSpec) -> str:
    """C++ of one kernel; its entry is ``extern "C" attend``."""
    out = CppSource()
    out(f"// Generated: attention over {spec.layout} pages; {spec.name}.")
    out(_shared("common.h"), _shared("threads.h"), _shared("simd.h"))
    _write_constants(out, spec.layout, spec.constants())
    out("", _shared("keys.h"))
    _write_keys(out, spec)
    out("", _shared("values.h"))
    _write_values(out, spec)
    out(f"#define VALUE_BITS_LOOKED_UP {int(spec.layout.spec.value_bits <= 4)}")
    out(_shared("value_bytes.h"))
    _write_value_bytes(out, spec)
    out("", _shared("exact.h"), _shared("page.h"), _shared("attend.h"))
    return out.text()


def append_source(layout: PageLayout) -> str:
    """C++ that quantises tokens into pages; its entry is ``extern "C" append``."""
    out = CppSource()
    out(f"// Generated: append to {layout} pages.")
    out(_shared("common.h"), _shared("threads.h"))
    most = max(padded(layout.key_dim), padded(layout.value_dim))
    limits = {"MOST_CHANNELS": most, "VALUE_LIMIT": table_limit(layout.spec.value_bits)}
    _write_constants(out, layout, page_constants(layout) | limits)
    out("", _shared("exact.h"), _shared("append.h"))
    return out.text()


def _write_constants(out: CppSource, layout: PageLayout, constants: dict[str, int]) -> None:
    for name, number in constants.items():
        out(f"constexpr int {name} = {number};")
    for name, kind in index_types(layout).items():
        out(f"typedef {kind} {name};")


@functools.cache
def _shared(name: str) -> str:
    return resources.files("kvquant_compile").joinpath("assets", "cpp", name).read_text("utf-8")


def _write_keys(out: CppSource, spec: CppSpec) -> None:
    """``unpack_keys``: sixteen turned keys of a page."""
    layout = spec.layout
    words = CodeWords(layout.offsets["key_codes"][0], layout.spec.key_bits, spec.pairs // 4)
    for chunk in range(3 - words.sections):
        suffix = "" if words.sections == 2 else f"_{chunk}"
        with out.block(f"static void unpack_keys{suffix}({_KEY_ARGUMENTS})"):
            words.read(out, chunk)
            _write_key_tiles(out, spec, words)
    if words.sections == 1:
        _write_choice(out, "unpack_keys", _KEY_ARGUMENTS)


def _write_key_tiles(out: CppSource, spec: CppSpec, words: CodeWords) -> None:
    layout = spec.layout
    out("vf table = load<vf>(head.table);", "vf scales[4];")
    if layout.spec.key_token_scale:
        offset = layout.offsets["key_token_scale"][0]
        out(f"token_scales(page + {offset} + 64 * chunk + 32 * half, scales);")
    else:
        out("for (vf& scale : scales) scale = splat(1.0f);")
    full = spec.pairs // 16
    slices = spec.pairs // 8
    table = "table" if layout.spec.key_bits <= 4 else "head.table"
    for tile in range(2):
        for u in range(full):
            first = tile * slices + 2 * u
            levels = words.levels([first, first + 1], table)
            turns = str(4 * u < spec.turning).lower()
            out(f"put_slices<{turns}>({levels}, {tile}, {4 * u}, scales, head, turns, keys);")
        if spec.pairs % 16:
            levels = words.levels([tile * slices + 2 * full], table)
            turns = str(4 * full < spec.turning).lower()
            out(f"put_last<{turns}>({levels}, {tile}, {4 * full}, scales, head, turns, keys);")


def _write_values(out: CppSource, spec: CppSpec) -> None:
    """``unpack_values``: weighted sums of a page's values, eight tokens of sixteen lanes."""
    layout = spec.layout
    bits, channels = layout.spec.value_bits, spec.value_channels
    words = CodeWords(layout.offsets["value_codes"][0], bits, channels // 8)
    for chunk in range(3 - words.sections):
        suffix = "" if words.sections == 2 else f"_{chunk}"
        with out.block(f"static void unpack_values{suffix}({_VALUE_ARGUMENTS})"):
            words.read(out, chunk)
            out("vf table = load<vf>(levels);")
            for mt in range(channels // 16):
                found = words.levels([2 * mt, 2 * mt + 1], "table" if bits <= 4 else "levels")
                at = f"half * {channels // 8} + {2 * mt}"
                out(f"add_channels({found}, weights, queries, {at}, sums);")
    if words.sections == 1:
        _write_choice(out, "unpack_values", _VALUE_ARGUMENTS)


def _write_value_bytes(out: CppSource, spec: CppSpec) -> None:
    """``add_bytes``: weighted sums of all tokens of a page for sixteen lanes, in whole numbers."""
    layout = spec.layout
    bits, channels = layout.spec.value_bits, spec.value_channels
    words = CodeWords(layout.offsets["value_codes"][0], bits, channels // 8)
    out("#if BYTE_VALUES")
    with out.block(f"static void add_bytes({_BYTE_ARGUMENTS})"):
        words.read(out, 0, name="a", which="0")
        words.read(out, 1, name="b", which="1")
        out("__m512i table = byte_table(levels);")
        for mt in range(channels // 16):
            selectors = ", ".join(f"{chunk}{2 * mt + xy}" for chunk in "ab" for xy in range(2))
            at = f"half * {channels // 8} + {2 * mt}"
            out(f"add_byte_channels({selectors}, table, weights, units, queries, {at}, sums);")
    out("#endif")


def _write_choice(out: CppSource, name: str, arguments: str) -> None:
    """A function that calls one of two by the chunk."""
    names = ", ".join(part.split()[-1] for part in arguments.split(", "))
    with out.block(f"static void {name}({arguments})"):
        out(f"(chunk ? {name}_1 : {name}_0)({names});")
