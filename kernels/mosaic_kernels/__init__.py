"""Kernels of sglang_mosaic on torch and Triton; imports nothing of sglang_mosaic.

| op | does |
|---|---|
| `segment.SegmentFormat` | where every byte of one compressed segment lies |
| `query_squares` | sums of squares of queries' channels, for calibrations |
| `segment_choice` | which of its head's formats a segment gets |
| `segment_encode` | K and V of whole pages -> segment bytes |
| `segment_error` | the errors of encoded segments, and their headers |
| `segment_decode` | segment bytes -> K and V in the rotated bases |
| `attend` | attention over given keys, with log-sum-exp |
| `merge_lse` | joins two attention results over disjoint keys |
| `page_batch` | what a batch reads of its compressed pages, cut into pieces of equal length |
| `plan_step` | a decode step's plan, from the page table and without the host |
| `attend_dense` | attention of decoding requests over pages that are not compressed |
| `rotate_queries` | queries in the bases of the compressed pages |
| `attend_pages` | attention over all tokens of pages, straight from their bytes |
| `scan`, `select` | which tokens get most attention, and a list of them |
| `attend_selected`, `far_field` | attention over those, and over one mean token a page for the others |
| `combine` | joins pieces, epochs and dense pages |

Each op's `reference.py` is plain torch, runs on any device and arbitrates; `kernel.py` is device code for any format
(`segment_table`, `load_segment`), and `launch.py` checks arguments and launches it. Nothing is imported here: a caller
imports the op that it uses.
"""
