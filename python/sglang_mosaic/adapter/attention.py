"""SGLang attention backend ``mosaic``: SGLang's torch attention on dense pages, ours where a page is mosaic.

Requests without a mosaic page go through the unchanged ``torch_native`` code on translated slots, so that with
compression off the output is bit-identical to it. On a GPU, kernels read both kinds of pages; CUDA graphs can replay
their decode steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from sglang_mosaic.cache.continuing import Continuing
from sglang_mosaic.cache.mixed_attention import MixedAttention, Sequence
from sglang_mosaic.cache.readers import Readers
from sglang_mosaic.cache.reading import Reading, most_pages, room_for
from sglang_mosaic.page import PAGE_SIZE, pages_for

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_mosaic.cache.decode_attention import DecodeStep
    from sglang_mosaic.cache.prefill_attention import PrefillAttention


@dataclasses.dataclass
class _Plan:
    """What all layers of one forward share."""

    write_loc: KVWriteLoc
    rows: torch.Tensor
    """int64 [requests, longest context]: dense slab row of each token; meaningless where a page is mosaic."""
    seq_lens: torch.Tensor
    prefix_lens: torch.Tensor
    extend_lens: torch.Tensor
    dense: list[range]
    """Runs of requests without a mosaic page."""
    first_query: list[int]
    """Row of each request's first query, and the total."""
    mixed: MixedAttention | None


@dataclasses.dataclass
class _Decode:
    """What all layers of one decode step by kernels share."""

    step: DecodeStep
    reading: Reading
    write_loc: KVWriteLoc


@dataclasses.dataclass
class _Prefill:
    """What all layers of one prefill by kernels share."""

    attention: PrefillAttention
    write_loc: KVWriteLoc


class MosaicAttentionBackend(TorchNativeAttnBackend):
    """One per model runner."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.memory = runner.token_to_kv_pool.memory
        self.start_layer = runner.token_to_kv_pool.start_layer
        self._plan: _Plan | _Decode | _Prefill | None = None
        heads = runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        self._readers = Readers(self.memory, heads // self.memory.dense_k[0].shape[1])
        self._decoding = self._readers.decoding
        self._longest = runner.req_to_token_pool.req_to_token.shape[1]
        self._continuing = Continuing(self.memory.config.select_steps)
        self._eager: tuple[tuple[int, int], DecodeStep] | None = None
        self._steps: dict[int, DecodeStep] = {}
        """Of CUDA graphs, by requests."""
        self._captured: Any = None
        """What the tables were like when graphs were captured."""
        self.reading: Reading | None = None
        """Of the decode step that is planned or captured next."""

    @property
    def compressed_pages(self) -> int:
        """That the prefill which was planned last reads."""
        plan = self._plan
        reader = plan.attention if isinstance(plan, _Prefill) else plan.mixed if isinstance(plan, _Plan) else None
        return 0 if reader is None else reader.compressed_pages

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._plan = None
        if forward_batch.forward_mode.is_idle():
            return
        if self._decoding is None:
            self._plan = self._make_plan(forward_batch)
        elif forward_batch.forward_mode.is_decode():
            self._plan_eager(forward_batch)
        else:
            self._plan = self._plan_prefill(forward_batch)

    # Decode steps by kernels.

    def _plan_eager(self, batch: ForwardBatch) -> None:
        lengths = _lengths(batch)
        # Few sizes, so that buffers last.
        size = len(lengths), 1 << max(sum(map(pages_for, lengths)) - 1, 63).bit_length()
        if self._eager is None or self._eager[0] != size:
            self._eager = size, self._decoding.allocate(*size)
        step = self._eager[1]
        self.choose_reading(batch, step)
        self._decoding.plan(
            step, self.reading, self.req_to_token_pool.req_to_token, batch.req_pool_indices, batch.seq_lens
        )
        self._plan = _Decode(step, self.reading, self._write_loc(batch))

    def _write_loc(self, batch: ForwardBatch) -> KVWriteLoc:
        return KVWriteLoc(batch.out_cache_loc, full_loc=self.memory.table.dense_slots(batch.out_cache_loc))

    def choose_reading(self, batch: ForwardBatch, buffers: object | None) -> None:
        """Decide what the next decode step reads; `buffers` tells where it would keep a selection, None: nowhere."""
        lengths = _lengths(batch)
        self.reading = self._decoding.reading(lengths)
        if self.reading is not Reading.SELECTED or buffers is None or batch.rids is None:
            self._continuing.forget()
        elif self._continuing.goes_on(buffers, batch.rids, lengths, self.memory.lifecycle.counters.encoded):
            self.reading = Reading.AS_BEFORE

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps can be captured."""
        return self._decoding is not None

    @property
    def readings(self) -> list[Reading]:
        """What CUDA graphs are captured for."""
        return self._decoding.readings

    def can_replay(self, batch: ForwardBatch) -> bool:
        """Whether graphs fit what a batch reads."""
        if not self._steps or self._captured != self._readers.table_sizes():
            return False
        return sum(map(pages_for, _lengths(batch))) + max(self._steps) <= most_pages(self._longest)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self._captured = self._readers.table_sizes()

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        requests = forward_batch.batch_size
        if requests not in self._steps:
            self._steps[requests] = self._decoding.allocate(requests, room_for(requests, self._longest))
        self._decoding.plan(
            self._steps[requests],
            self.reading,
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
        )

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        step = self._steps[forward_batch.batch_size]
        self._plan = _Decode(step, self.reading, self._write_loc(forward_batch))

    # Prefills by kernels.

    def _plan_prefill(self, batch: ForwardBatch) -> _Prefill:
        write_loc, news = self._write_loc(batch), batch.extend_seq_lens_cpu
        if news is not None and news == _lengths(batch):
            return _Prefill(self._readers.prefill_new(write_loc.full_loc, news), write_loc)
        return _Prefill(self._readers.prefill(self._sequences(batch)), write_loc)

    # By the reference.

    def _make_plan(self, batch: ForwardBatch) -> _Plan:
        first_mosaic = self.memory.table.first_mosaic
        sequences = self._sequences(batch)
        is_dense = [not bool((sequence.frames >= first_mosaic).any()) for sequence in sequences]
        mixed = [sequence for sequence, dense in zip(sequences, is_dense, strict=True) if not dense]
        seq_lens, extend_lens = (torch.tensor(x) for x in zip(*((s.tokens, s.queries) for s in sequences), strict=True))
        slots = self.req_to_token_pool.req_to_token[batch.req_pool_indices, : int(seq_lens.max())]
        return _Plan(
            write_loc=self._write_loc(batch),
            rows=self.memory.table.dense_slots(slots),
            seq_lens=seq_lens,
            prefix_lens=seq_lens - extend_lens,
            extend_lens=extend_lens,
            dense=_runs(is_dense),
            first_query=[*(sequence.first_query for sequence in sequences), int(extend_lens.sum())],
            mixed=self._readers.plan(mixed) if mixed else None,
        )

    def _sequences(self, batch: ForwardBatch) -> list[Sequence]:
        """The requests of a batch; waits for the device."""
        decoding, lengths = batch.forward_mode.is_decode(), _lengths(batch)
        news = [1] * len(lengths) if decoding else batch.extend_seq_lens_cpu
        if news is None:
            news = batch.extend_seq_lens.tolist()
        firsts = itertools.accumulate(news, initial=0)
        pages = self.req_to_token_pool.req_to_token[batch.req_pool_indices, : max(lengths) : PAGE_SIZE] // PAGE_SIZE
        frames = self.memory.table.frames[pages.long()].cpu()
        selecting = bool(self.memory.config.select) and decoding
        keys = batch.req_pool_indices.tolist() if selecting else [None] * len(lengths)
        rows = zip(frames, lengths, firsts, news, keys, strict=False)  # firsts has the end as well
        return [Sequence(own[: pages_for(tokens)], tokens, first, new, key) for own, tokens, first, new, key in rows]

    def forward_extend(
        self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache: bool = True
    ) -> torch.Tensor:
        self._observe(q, layer)
        return self._attend(q, k, v, layer, save_kv_cache, self._extend_run)

    def forward_decode(
        self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache: bool = True
    ) -> torch.Tensor:
        return self._attend(q, k, v, layer, save_kv_cache, self._decode_run)

    def _attend(self, q, k, v, layer: RadixAttention, save_kv_cache: bool, run_dense) -> torch.Tensor:
        plan = self._plan
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, plan.write_loc, k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        index = layer.layer_id - self.start_layer
        if isinstance(plan, _Decode):
            out = self._decoding.run(plan.step, plan.reading, index, queries, layer.scaling)
        elif isinstance(plan, _Prefill):
            if k is not None and v is not None:
                k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
                v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
            out = plan.attention.run(index, queries, k, v, layer.scaling)
        else:
            out = q.new_empty(queries.shape[0], layer.tp_q_head_num, layer.v_head_dim)
            for run in plan.dense:
                tokens = slice(plan.first_query[run.start], plan.first_query[run.stop])
                run_dense(queries[tokens], out[tokens], layer, run)
            if plan.mixed is not None:
                plan.mixed.run(index, queries, out, layer.scaling)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _decode_run(self, q: torch.Tensor, out: torch.Tensor, layer: RadixAttention, run: range) -> None:
        operands, options = self._operands(layer, run)
        self._run_sdpa_forward_decode(q, out, *operands, causal=False, **options)

    def _extend_run(self, q: torch.Tensor, out: torch.Tensor, layer: RadixAttention, run: range) -> None:
        operands, options = self._operands(layer, run)
        requests = slice(run.start, run.stop)
        lengths = self._plan.prefix_lens[requests], self._plan.extend_lens[requests]
        self._run_sdpa_forward_extend(q, out, *operands, *lengths, causal=True, **options)

    def _operands(self, layer: RadixAttention, run: range) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """What both of torch_native's loops take: dense slabs, rows of each request in them, context lengths."""
        operands = (
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self._plan.rows,
            torch.arange(run.start, run.stop),
            self._plan.seq_lens[run.start : run.stop],
        )
        return operands, {"scaling": layer.scaling, "enable_gqa": layer.tp_q_head_num != layer.tp_k_head_num}

    def _observe(self, q: torch.Tensor, layer: RadixAttention) -> None:
        if self.memory.config.compresses:
            queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
            self.memory.codec.observe_queries(layer.layer_id - self.start_layer, queries)


def _lengths(batch: ForwardBatch) -> list[int]:
    """Tokens of every request's context, the new ones included."""
    lengths = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu
    return lengths.tolist()


def _runs(flags: list[bool]) -> list[range]:
    """Maximal runs of true flags."""
    runs: list[range] = []
    for i, flag in enumerate(flags):
        if not flag:
            continue
        if runs and runs[-1].stop == i:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    return runs
