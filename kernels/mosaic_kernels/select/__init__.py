"""Which tokens a query reads, and what stands for the others."""
