"""The platform's class and its allocator; apart from cpu_platform.py, since SGLang imports that one too early."""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU on which everything runs in plain torch."""

    _enum = PlatformEnum.OOT

    def is_cpu(self) -> bool:
        # SGLang reads this as "sgl-kernel's CPU operators are there".
        return False

    def get_device(self, device_id: int = 0) -> str:
        # ServerArgs takes it as the value of --device, which is a string.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        return cpu_allocator_class()

    def get_dispatch_key_name(self) -> str:
        return "native"

    # For /start_profile: without them the scheduler ends there.

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU


def cpu_allocator_class() -> type:
    """SGLang's paged allocator with its two Triton launches replaced by torch. Built late to avoid import cycles."""
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, alloc_extend_naive
    from sglang.srt.utils import get_num_new_pages

    class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
        """Same contract and same page order as the base class."""

        def alloc_extend(
            self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages=None
        ):
            if num_new_pages is None:
                num_new_pages = get_num_new_pages(
                    seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
                )
            if num_new_pages > len(self.free_pages):
                return None
            slots = torch.empty((extend_num_tokens,), dtype=torch.int64, device=self.device)
            alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device)
            self.free_pages = self.free_pages[num_new_pages:]
            return slots

        def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc):
            opens_page = (seq_lens - 1) % self.page_size == 0
            new_pages = int(opens_page.sum())
            if new_pages > len(self.free_pages):
                return None
            slots = last_loc.to(torch.int64) + 1
            slots[opens_page] = self.free_pages[:new_pages] * self.page_size
            self.free_pages = self.free_pages[new_pages:]
            return slots

    return CpuPagedAllocator
