"""Device code that reads memory and does nothing else: what an op that streams cannot beat."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(data, found, count, BLOCK: tl.constexpr):
    """int32 [count] in blocks, shared out among the programs; found int32 [programs]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    mixed = tl.zeros([BLOCK], tl.int32)
    for block in range(program, tl.cdiv(count, BLOCK), programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        mixed ^= tl.load(data + at, mask=at < count, other=0)
    tl.store(found + program, tl.sum(mixed))
