"""An interpreter of the PTX that Triton emits for NVIDIA Hopper, in numpy, as a test tool.

A warp is 32 lanes, a register an array of them. Statements are decoded once, to closures
(:mod:`.text`, :mod:`.operands`, :mod:`.decode`); what an instruction computes stands in tables by
opcode (:mod:`.integers`, :mod:`.floats`, :mod:`.lanes`, :mod:`.access`). An instruction that is in
no table is an error, never skipped.

It is made to find mistakes that a device would hide: programs and warps run in a random order
that a seed fixes (:mod:`.machine`), bulk copies land late, and memory knows who may look at what
(:mod:`.memory`, :mod:`.shared`).
"""
