"""Device code that reads pages of planes as signed bytes (byte_table.py), which tensor cores multiply as they are.

All tokens are of one page of 64. `segment` is a [1, 1] pointer, `row` int32 [1, 1], `group` int32 [G, 1], the groups of
16 channels to read, `t` int32 [1, 64], the tokens in the order of the result.

A word of a plane has a quad of channels of one token in its bytes. Of K that is what a thread of a tensor core wants
(channels are added up); of V four words of four tokens change bytes first (tokens are added up). For both, tiles are
put together tokens first: Triton then finds the layout in which no value changes threads, and V is transposed as a
whole.
"""

import triton
import triton.language as tl

from mosaic_kernels import byte_table, segment_table
from mosaic_kernels.load_segment import scale_of
from mosaic_kernels.load_words import load_four, load_one_byte
from mosaic_kernels.unpack_bytes import INTERPRETED

BYTE_WORDS = tl.constexpr(byte_table.BYTE_WORDS)
SECOND = tl.constexpr(byte_table.MASKS)
"""The second four words of a group."""
_ONE_BIT = tl.constexpr(byte_table.ONE_BIT)
_FOUR_BITS = tl.constexpr(byte_table.FOUR_BITS)
_SCALARS = tl.constexpr(segment_table.SCALARS)
_V = tl.constexpr(segment_table.V_CODED)
_EVERY_BYTE = tl.constexpr(0x01010101)
_SIGNS = tl.constexpr(0x80808080)
# Two words, or twice the first. As one load of both beside one of the first it took a sixth longer.
_WORDS = tl.constexpr(
    """{
    .reg .b64 at;
    .reg .pred two;
    mad.wide.u32 at, $3, $4, $2;
    setp.ne.u32 two, $5, 0;
    ld.global.b32 $0, [at];
    @two ld.global.b32 $1, [at+4];
    selp.b32 $1, $1, $0, two;
    }"""
)
# Bytes of four words change places: byte i of word j goes to byte j of word i.
_ACROSS = tl.constexpr(
    """{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $4, $5, 0x5140;
    prmt.b32 b, $6, $7, 0x5140;
    prmt.b32 c, $4, $5, 0x7362;
    prmt.b32 d, $6, $7, 0x7362;
    prmt.b32 $0, a, b, 0x5410;
    prmt.b32 $1, a, b, 0x7632;
    prmt.b32 $2, c, d, 0x5410;
    prmt.b32 $3, c, d, 0x7632;
    }"""
)


@triton.jit
def fetch_bytes(segment, words, row, group, t, REFINED: tl.constexpr, WIDTH: tl.constexpr):
    """What `key_bytes` and `value_bytes` unpack; WIDTH is the dimension filled up to a power of two."""
    shape: tl.constexpr = [group.shape[0], t.shape[1]]
    at = words + (row * (WIDTH // 16) + group) * BYTE_WORDS
    base, refinement, factors, turns = load_four(tl.broadcast_to(at, shape))
    masks, flags, _, _ = load_four(tl.broadcast_to(at + SECOND, shape))
    # A row of one bit has two tokens, the odd one four places higher.
    odd = t & 1
    low, high = _plane_words(segment, base, flags, t)
    factors = factors >> odd * (flags & _ONE_BIT) * 4
    mask = (masks & 0xFF).to(tl.uint32) * _EVERY_BYTE
    if REFINED:
        more_low, more_high = _plane_words(segment, refinement, flags >> 8, t)
        turns -= odd * (flags >> 8 & _ONE_BIT) * (4 * _EVERY_BYTE)
        more_mask = (masks >> 8).to(tl.uint32) * _EVERY_BYTE
        return low, high, more_low, more_high, factors, turns, mask, more_mask
    else:
        return low, high, low, high, factors, turns, mask, mask


@triton.jit
def key_bytes(fetched, REFINED: tl.constexpr):
    """K of `fetch_bytes`, of four groups: int8 [64, 64], channels as `key_channel`."""
    a, b = _bytes(_quad(fetched, 0, REFINED)), _bytes(_quad(fetched, 1, REFINED))
    c, d = _bytes(_quad(fetched, 2, REFINED)), _bytes(_quad(fetched, 3, REFINED))
    joined = _join_quads(a, b, c, d)
    return tl.reshape(tl.permute(joined, 1, 4, 0, 5, 2, 3), [joined.shape[1], 64])


@triton.jit
def key_channel(CHUNK: tl.constexpr, EIGHT):
    """Which channel is column 8 * EIGHT of `key_bytes` of the groups from 4 * CHUNK on; seven more follow both."""
    return CHUNK * 64 + EIGHT % 4 * 16 + EIGHT // 4 * 8


@triton.jit
def value_bytes(fetched):
    """V of `fetch_bytes`: int8 [G * 16, 64]; row i is channel i // G of group i % G."""
    a, b = _bytes_across(_quad(fetched, 0, True)), _bytes_across(_quad(fetched, 1, True))
    c, d = _bytes_across(_quad(fetched, 2, True)), _bytes_across(_quad(fetched, 3, True))
    joined = _join_quads(a, b, c, d)
    G: tl.constexpr = joined.shape[0]
    return tl.trans(tl.reshape(tl.permute(joined, 1, 4, 5, 2, 3, 0), [joined.shape[1], 16 * G]))


@triton.jit
def token_scales(segment, scalars, row, t):
    """V's scales of tokens of a page of planes, float32 as `t`; 0 if nothing is coded. row: scalar."""
    coded, scales_at, _, _ = load_four(scalars + row * _SCALARS + _V)
    return scale_of(load_one_byte(segment + scales_at + t, t < tl.where(coded > 0, 256, 0)))


@triton.jit
def channel_means(segment, scalars, row, channel, DIM: tl.constexpr):
    """Mean V of channels without codes of a page of planes, float32 as `channel`; of others 0. row: scalar."""
    coded, _, means_at, scale_at = load_four(scalars + row * _SCALARS + _V)
    mean = load_one_byte(segment + means_at + channel, (channel >= coded) & (channel < DIM))
    scale = load_one_byte(segment + scale_at + channel * 0, channel < DIM)
    return ((mean ^ 128) - 128).to(tl.float32) * scale_of(scale)


@triton.jit
def _plane_words(segment, plane, flags, t):
    """Of each group and token, uint32 [G, 64]: the word with quad 0 and that with quad 1."""
    one_bit, stride = flags & _ONE_BIT, plane >> 16
    # Eight tokens are eight rows or four: what a thread adds up for its tokens are constants.
    at = segment + ((plane & 0xFFFF) + ((t & 7) >> one_bit) * stride)
    step, two = stride * 8 >> one_bit, flags & _FOUR_BITS
    if INTERPRETED:
        first = (at + (t >> 3) * step).to(tl.pointer_type(tl.uint32))
        low = tl.load(first)
        high = tl.where(two > 0, tl.load(first + 1, mask=two > 0, other=0), low)
    else:
        low, high = tl.inline_asm_elementwise(
            _WORDS, "=&r,=&r,l,r,r,r", [at.to(tl.int64), step, t >> 3, two],
            dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    return low, high


@triton.jit
def _quad(fetched, Q: tl.constexpr, REFINED: tl.constexpr):
    """Signed bytes of the channels 4 Q .. 4 Q + 3 of each group, uint32 [G, 64]."""
    low, high, more_low, more_high, factors, turns, mask, more_mask = fetched
    # Integers are multiplied on other units than those that shift and mask, which have more to do.
    top = (high if Q % 2 else low) * (factors >> 8 * Q & 0xFF).to(tl.uint32)
    code = top & mask ^ _SIGNS
    if REFINED:
        word = more_high if Q % 2 else more_low
        turn = (turns >> 8 * Q & 31).to(tl.uint32)
        code |= (word << turn | word >> (32 - turn & 31)) & more_mask
    return code


@triton.jit
def _bytes(word):
    """uint32 -> int8 four times."""
    low, high = (word & 0xFFFF).to(tl.uint16), (word >> 16).to(tl.uint16)
    return (low & 0xFF).to(tl.int8), (low >> 8).to(tl.int8), (high & 0xFF).to(tl.int8), (high >> 8).to(tl.int8)


@triton.jit
def _bytes_across(word):
    """The same, where a thread puts bytes of four tokens together."""
    if INTERPRETED:
        a, b, c, d = _bytes(word)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _ACROSS, "=&r,=&r,=&r,=r,r,r,r,r", [word],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    return a, b, c, d


@triton.jit
def _join_quads(a, b, c, d):
    """Four bytes of four quads -> [G, 64, byte / 2, byte % 2, quad / 2, quad % 2]."""
    return tl.join(tl.join(_join(a), _join(c)), tl.join(_join(b), _join(d)))


@triton.jit
def _join(four):
    return tl.join(tl.join(four[0], four[2]), tl.join(four[1], four[3]))
