"""Frequencies read from SGLang's rotary embeddings turn keys as these do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_mosaic.torchvision_compat import declare_missing_operators

declare_missing_operators()

from sglang.srt.layers.rotary_embedding.base import LinearScalingRotaryEmbedding, RotaryEmbedding  # noqa: E402
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding  # noqa: E402
from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding  # noqa: E402
from sglang.srt.runtime_context import get_context  # noqa: E402

from sglang_mosaic.adapter.rope import rope_of  # noqa: E402
from sglang_mosaic.manager.recompress.rope import Rope  # noqa: E402

DIM, TOKENS = 64, 1024
EMBEDDINGS = {
    "plain": lambda neox: RotaryEmbedding(DIM, DIM, TOKENS, 10000, neox, torch.bfloat16),
    "half of the channels": lambda neox: RotaryEmbedding(DIM, DIM // 2, TOKENS, 500000, neox, torch.float32),
    "linear": lambda neox: LinearScalingRotaryEmbedding(DIM, DIM, TOKENS, 10000, neox, 4.0, torch.float32),
    "llama 3": lambda neox: Llama3RotaryEmbedding(DIM, DIM, TOKENS, 500000, neox, torch.float32, 8.0, 1.0, 4.0, 256),
    "yarn": lambda neox: YaRNScalingRotaryEmbedding(DIM, DIM, TOKENS // 4, 10000, neox, 4.0, torch.float32),
}


@pytest.fixture(autouse=True)
def server_arguments():
    """SGLang's layers ask them."""
    with get_context().preserve_config(), get_context().override_server_args():
        yield


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_keys_are_turned_alike(kind: str, neox: bool) -> None:
    module = EMBEDDINGS[kind](neox)
    found = rope_of(torch.nn.ModuleList([module, torch.nn.Linear(1, 1), module]))
    assert len(found.frequencies) == module.rotary_dim // 2 and found.interleaved is not neox
    module.cos_sin_cache = module._compute_cos_sin_cache()  # of bfloat16 there may be one
    keys = torch.randn(TOKENS - 100, DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(100, TOKENS)
    _, wanted = module.forward_native(positions, keys.clone(), keys.clone())
    turned = keys.numpy()[None].copy()
    Rope(found.frequencies, found.interleaved).turn(turned, 100, forward=True)
    # YaRN makes keys longer, too.
    length = np.linalg.norm(wanted) / np.linalg.norm(turned)
    assert (kind == "yarn") == (length > 1.01)
    np.testing.assert_allclose(turned[0] * length, wanted.numpy(), atol=2e-3)


def test_layers_that_differ_have_no_answer() -> None:
    modules = [EMBEDDINGS[kind](True) for kind in ("plain", "linear")]
    assert rope_of(torch.nn.ModuleList(modules)).frequencies == ()
    assert rope_of(torch.nn.Linear(1, 1)).frequencies == ()
