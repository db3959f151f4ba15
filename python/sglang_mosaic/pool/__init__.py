"""Floor 1: the memory itself. Frames and who may use them, the page table, and the slabs behind both."""
