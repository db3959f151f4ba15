"""Kernels of sglang_mosaic on torch alone (later triton); imports nothing of sglang_mosaic.

| op | does |
|---|---|
| `segment.SegmentFormat` | where every byte of one compressed segment lies |
| `segment_encode` | K and V of whole pages -> segment bytes |
| `segment_decode` | segment bytes -> K and V in the rotated bases |
| `attend` | attention over given keys, with log-sum-exp |
| `merge_lse` | joins two attention results over disjoint keys |

Each op's `reference.py` is plain torch, runs on any device and arbitrates tests and benchmarks of faster versions.
Nothing is imported here: a caller imports the op that it uses.
"""
