"""Flash attention with log-sum-exp against the reference; on a CPU it is the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from mosaic_kernels.attend import reference
from mosaic_kernels.attend.launch import attend, attend_causally
from mosaic_kernels.attend.ragged import RaggedAttention
from triton_device import DEVICE

SCALE = 0.1


def tensors(tokens, keys, heads, group, dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads * group, dim, generator=generator).to(DEVICE, dtype)
    # As decoded pages are: head-major, and a view of more.
    k, v = (torch.randn(heads, keys, 2 * dim, generator=generator)[..., :dim].to(DEVICE, dtype) for _ in range(2))
    return q, k, v


def assert_close(found, wanted, dtype):
    error = torch.finfo(dtype).eps if DEVICE == "cuda" else 0.0
    torch.testing.assert_close(found[0].float(), wanted[0], rtol=4 * error, atol=2 * error)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-3 if error else 0.0)
    assert found[0].dtype in (dtype, torch.float32) and found[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "keys", "heads", "group", "dim"),
    [(1, 1, 1, 1, 64), (70, 70, 2, 3, 64), (33, 500, 8, 4, 128), (200, 201, 1, 8, 128), (5, 64, 3, 1, 80),
     (9, 40, 2, 2, 256)],
)  # fmt: skip
def test_every_shape(tokens, keys, heads, group, dim, dtype) -> None:
    q, k, v = tensors(tokens, keys, heads, group, dim, dtype)
    assert_close(attend(q, k, v, SCALE), reference.attend(q, k, v, SCALE), dtype)


def test_few_queries_of_many_keys() -> None:
    for tokens, keys in ((1, 5000), (65, 2049), (200, 9000)):
        q, k, v = tensors(tokens, keys, 2, 4, 64, torch.float16)
        assert_close(attend(q, k, v, SCALE), reference.attend(q, k, v, SCALE), torch.float16)


def test_token_major_keys_and_float32_queries() -> None:
    q, k, v = tensors(20, 90, 2, 4, 64, torch.float16)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    assert_close(attend(q.float(), k, v, SCALE), reference.attend(q, k, v, SCALE), torch.float16)


def test_large_queries_do_not_become_infinite() -> None:
    q, k, v = tensors(4, 30, 1, 2, 64, torch.float16)
    out, lse = attend(q.float() * 1e6, k, v, 1e-3)
    assert out.isfinite().all() and lse.isfinite().all()


def test_no_keys() -> None:
    q, k, v = tensors(12, 0, 2, 2, 64, torch.bfloat16)
    found, wanted = attend(q, k, v, SCALE), reference.attend(q, k, v, SCALE)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_different_dimensions_of_keys_and_values() -> None:
    q, k, v = tensors(6, 30, 2, 2, 128, torch.bfloat16)
    found, wanted = attend(q, k, v[..., :64], SCALE), reference.attend(q, k, v[..., :64], SCALE)
    assert found[0].shape == (6, 4, 64) and torch.equal(found[0], wanted[0])


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = tensors(6, 30, 2, 2, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="Hq a multiple of Hkv"):
        attend(q[:, :3], k, v, SCALE)


@pytest.mark.parametrize("contexts", [[(3, 3)], [(1, 1), (70, 70), (5, 300)], [(64, 129), (1, 40), (9, 9)]], ids=str)
@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 3, 64), (1, 8, 128)])
def test_new_tokens_of_several_contexts(contexts, heads, group, dim) -> None:
    news, alls = zip(*contexts, strict=True)
    q, k, v, wanted = joined(contexts, heads, group, dim)
    starts = (x.to(DEVICE) for x in starts_of(contexts))
    assert_all_close(attend_causally(q, k, v, *starts, max(news), max(alls), SCALE), wanted)


def joined(contexts, heads, group, dim, dtype=torch.bfloat16):
    """Queries, keys and values of several contexts (new tokens, all tokens), and what the reference makes of them."""
    parts = [tensors(new, tokens, heads, group, dim, dtype, i) for i, (new, tokens) in enumerate(contexts)]
    wanted = [
        reference.attend(q, k, v, SCALE, tokens - new) for (q, k, v), (new, tokens) in zip(parts, contexts, strict=True)
    ]
    q = torch.cat([q for q, *_ in parts])
    k, v = (torch.cat([part[i].transpose(0, 1) for part in parts]) for i in (1, 2))
    return q, k, v, tuple(map(torch.cat, zip(*wanted, strict=True)))


def starts_of(contexts):
    return tuple(torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in zip(*contexts, strict=True))


def assert_all_close(found, wanted, dtype=torch.bfloat16, lse=1e-3):
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    torch.testing.assert_close(found[0].float(), wanted[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=lse)


needs_flashinfer = pytest.mark.skipif(DEVICE == "cpu", reason="FlashInfer needs a GPU")


@needs_flashinfer
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "group"), [(2, 7), (8, 4), (3, 1)])
def test_flashinfer_gives_the_same(heads, group, dim) -> None:
    ragged = RaggedAttention(torch.device(DEVICE), heads * group, heads, dim)
    many = 2 * 128 * 200 // (heads * group)
    # FlashInfer's FlashAttention-2 adds up probabilities as it multiplies them with V, in bf16: off by 2^-9 at most.
    rounded = torch.finfo(torch.bfloat16).eps / 4
    for contexts in ([(1, 1)], [(70, 9000)], [(64, 129), (1, 40), (9, 9)], [(many, many + 300), (5, 3000), (7, 7)]):
        assert ragged.fills(sum(new for new, _ in contexts)) == (contexts[0][0] == many)
        q, k, v, wanted = joined(contexts, heads, group, dim)
        starts = starts_of(contexts)
        for scale in (2 * SCALE, SCALE):  # planned anew for another one
            found = ragged.attend_causally(q, k, v, starts, scale)
        assert_all_close(found, wanted, lse=1e-3 if ragged.fills(len(q)) else rounded)
        assert torch.equal(ragged.attend_causally(q, k, v, starts, SCALE)[0], found[0])


@needs_flashinfer
@pytest.mark.parametrize("tokens", [3, 5000])
def test_flashinfer_reads_decoded_pages(tokens) -> None:
    ragged = RaggedAttention(torch.device(DEVICE), 32, 8, 128)
    q, k, v = tensors(tokens, 2300, 8, 4, 128, torch.float16)
    assert_all_close(ragged.attend(q, k, v, SCALE), reference.attend(q, k, v, SCALE), torch.float16)


def test_only_what_flashinfer_has_kernels_for() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert RaggedAttention.can(gpu, torch.bfloat16, 128, 128) and RaggedAttention.can(gpu, torch.float16, 64, 64)
    for device, dtype, dims in ((cpu, torch.bfloat16, (128, 128)), (gpu, torch.float32, (64, 64)),
                                (gpu, torch.bfloat16, (80, 80)), (gpu, torch.bfloat16, (128, 64))):  # fmt: skip
        assert not RaggedAttention.can(device, dtype, *dims)
