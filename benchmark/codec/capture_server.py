"""The server of sglang_mosaic, writing what its attention backend is given: `capture_server.py FOLDER N [flags]`.

Of every N-th layer, each prefill of a single request writes q, k and v (after RoPE) to FOLDER, if that exists, as
`layer-first_token.safetensors`. One rank only.

The backend lives in a process that SGLang spawns. Python's spawn runs this file again there, as `__mp_main__` and with
the same `sys.argv`, before SGLang loads its plugins: so the wrapper below is installed where the backend is made.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def install(folder: Path, every: int) -> None:
    """Have every mosaic attention backend that this process makes write its prefills."""
    from sglang_mosaic.adapter import backends

    create = backends.create_attention_backend

    @functools.wraps(create)
    def create_recording(runner: Any) -> Any:
        backend = create(runner)
        backend.forward_extend = recording(backend.forward_extend, folder, every)
        return backend

    backends.create_attention_backend = create_recording


def recording(forward_extend: Callable[..., Any], folder: Path, every: int) -> Callable[..., Any]:
    """`forward_extend` of an attention backend, writing what it was given once it is done."""
    from safetensors.torch import save_file

    @functools.wraps(forward_extend)
    def forward(q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward_extend(q, k, v, layer, forward_batch, *args, **kwargs)
        if layer.layer_id % every == 0 and forward_batch.batch_size == 1 and folder.is_dir():
            tokens = len(q)
            tensors = {
                "q": q.view(tokens, layer.tp_q_head_num, layer.qk_head_dim),
                "k": k.view(tokens, layer.tp_k_head_num, layer.qk_head_dim),
                "v": v.view(tokens, layer.tp_v_head_num, layer.v_head_dim),
            }
            start = int(forward_batch.extend_prefix_lens[0])
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                folder / f"{layer.layer_id:04d}-{start:08d}.safetensors",
                metadata={"scaling": repr(float(layer.scaling))},
            )
        return output

    return forward


if __name__ in ("__main__", "__mp_main__"):
    install(Path(sys.argv[1]), int(sys.argv[2]))

if __name__ == "__main__":
    from sglang_mosaic.launch_server import main

    main(sys.argv[3:])
