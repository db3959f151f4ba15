"""SGLang's radix cache over logical pages. Sharing, splitting and eviction are SGLang's own."""

from __future__ import annotations

from sglang.srt.mem_cache.radix_cache import RadixCache

from sglang_mosaic.page import PAGE_SIZE


class MosaicRadixCache(RadixCache):
    """A node's value holds logical slots, so that it stays valid when the pages behind it are compressed."""

    def pages(self) -> list[int]:
        """Every page that the tree holds, for audits."""
        held, stack = [], list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            held.extend((node.value[::PAGE_SIZE] // PAGE_SIZE).tolist())
        return held
