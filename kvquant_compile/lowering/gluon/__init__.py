"""The back end for NVIDIA Ampere and later: decode attention written one register a lane, in Gluon.

Every tensor of the generated kernels has one element per thread, so a kernel reads like CUDA C++:
data movement, packed arithmetic and matrix products are blocks of PTX, the rest is ordinary
scalar code. Warps never wait for each other inside the loop.
"""
