"""Servers on a CPU."""

CPU_FLAGS = "--device cpu --dtype float32 --kv-cache-dtype bfloat16 --mem-fraction-static 0.1"
"""Pages of 16 bits, as on a GPU, beside a model in 32: a CPU without AVX-512 or AMX multiplies matrices of bf16 seven
times as slowly."""
EXACT_CPU_FLAGS = CPU_FLAGS.replace("--kv-cache-dtype bfloat16", "--kv-cache-dtype auto")
"""Pages of 32 bits, too."""
