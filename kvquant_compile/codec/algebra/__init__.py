"""Quantisers as composable blocks, and recipes made of them; see ``docs/recipes.md``."""

from kvquant_compile.codec.algebra.affine import Affine
from kvquant_compile.codec.algebra.base import (
    Block,
    Codec,
    Constants,
    Map,
    Sample,
    Stage,
)
from kvquant_compile.codec.algebra.compose import Chain, Pipeline, Sum
from kvquant_compile.codec.algebra.floats import Fp8, LowRank, Raw
from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.algebra.maps import (
    Centre,
    ChannelScale,
    Hadamard,
    Interleave,
    Reorder,
    Rotation,
)
from kvquant_compile.codec.algebra.parts import Part, Parts, code_part, float16_part
from kvquant_compile.codec.algebra.recipe import Recipe, RecipeTables, Tail
from kvquant_compile.codec.algebra.stored_stages import Normalise, Outliers
from kvquant_compile.codec.algebra.tables import Lut, Vq, repeated

__all__ = [
    "Affine",
    "Block",
    "BlockLayout",
    "Centre",
    "Chain",
    "ChannelScale",
    "Codec",
    "Constants",
    "Fp8",
    "Hadamard",
    "Interleave",
    "LowRank",
    "Lut",
    "Map",
    "Normalise",
    "Outliers",
    "Part",
    "Parts",
    "Pipeline",
    "Raw",
    "Recipe",
    "RecipeTables",
    "Reorder",
    "Rotation",
    "Sample",
    "Stage",
    "Sum",
    "Tail",
    "Vq",
    "code_part",
    "float16_part",
    "repeated",
]
