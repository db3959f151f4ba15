"""Two ranks: each compresses its own heads, and what changes the prefix tree is decided alike.

Ranks that disagree about a batch wait for each other for ever, or add up partial sums of different tokens.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from answers import Answer, largest_drift, wrong_answers
from benchmark.common.cpu import EXACT_CPU_FLAGS
from benchmark.common.text import make_text
from benchmark.soak.faults import pauses
from real_server import COMMON, Launch, Server, Servers, run_python

pytestmark = pytest.mark.server

RANKS = ("--tp-size", "2", *EXACT_CPU_FLAGS.split(), "--chunked-prefill-size", "256")
BIND = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
"""SGLang wants a NUMA node or named cores for each rank."""
SHARED = make_text(280, "two ranks")
PROMPTS = {f"{i}": f"{SHARED if i % 2 else ''} {make_text(200, f'rank prompt {i}')}" for i in range(16)}
MAKE_MODEL = """
import sys
import torch
from transformers import AutoConfig, LlamaForCausalLM
source, target = sys.argv[1:]
config = AutoConfig.from_pretrained(source)
config.update(dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3))
config.update(dict(intermediate_size=512, head_dim=64, initializer_range=0.3, dtype="float32"))
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained(target)
"""


@pytest.fixture(scope="module")
def even_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with an even number of KV heads: the default model has three."""
    target = tmp_path_factory.mktemp("even")
    done = run_python("-c", MAKE_MODEL, str(model), str(target))
    assert done.returncode == 0, done.stdout
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, target)
    return target


def launch(servers: Servers, name: str, module: str, model: Path, *flags: str) -> Server:
    servers.launches[name] = Launch(module, (*COMMON, *RANKS, *flags), BIND, name != "stock ranks", model)
    return servers[name]


@pytest.fixture(scope="module")
def expected(servers: Servers, even_model: Path) -> dict[str, Answer]:
    """Of stock SGLang on two ranks."""
    flags = ("--attention-backend", "torch_native", "--page-size", "64", "--max-total-tokens", "4096")
    server = launch(servers, "stock ranks", "sglang.launch_server", even_model, *flags)
    answers = {name: server.generate(prompt, 8) for name, prompt in PROMPTS.items()}
    servers.stop("stock ranks")
    return answers


def test_two_ranks_answer_as_stock_does(servers: Servers, even_model: Path, expected: dict[str, Answer]) -> None:
    flags = ("--mosaic-encode", "off", "--max-total-tokens", "4096", "--mosaic-audit")
    server = launch(servers, "ranks off", "sglang_mosaic.launch_server", even_model, *flags)
    found = {name: server.generate(prompt, 8) for name, prompt in PROMPTS.items()}
    assert not wrong_answers(expected, found)
    assert largest_drift(expected, found) == 0.0
    assert max(answer.cached_tokens for answer in found.values()) >= 256
    assert server.trouble() == []
    servers.stop("ranks off")


def test_ranks_stay_together_while_they_compress_and_evict(
    servers: Servers, even_model: Path, expected: dict[str, Answer]
) -> None:
    flags = ("--mosaic-encode", "seal", "--mosaic-kv-mib", "3", "--mosaic-refresh-pages", "8", "--mosaic-audit", "20")
    server = launch(servers, "ranks", "sglang_mosaic.launch_server", even_model, *flags)
    audits, evicted = server.stats()["audits"], server.metric("evicted_tokens_total")
    names = [name for _ in range(3) for name in PROMPTS]
    # Each rank is held up at moments of its own.
    with pauses(servers.jitter), ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda name: server.generate(PROMPTS[name], 8), names))
    stats = server.wait_for_audit(audits)
    print(f"{stats['pages_encoded']} pages compressed, {stats['epochs_started']} calibrations")
    assert stats["pages_encoded"] > 20 and stats["epochs_started"] > 1 and stats["step_audits"] > 0
    assert server.metric("evicted_tokens_total") > evicted
    assert all(len(answer.tokens) == 8 for answer in answers)
    # What is compressed changes little of what is read exactly besides.
    first = [abs(answer.logprobs[0] - expected[name].logprobs[0]) for name, answer in zip(names, answers, strict=True)]
    same = [answer.tokens[0] == expected[name].tokens[0] for name, answer in zip(names, answers, strict=True)]
    print(f"{sum(same)} of {len(same)} first tokens are stock's, largest drift {max(first):.3f}")
    server.flush()
    stats = server.stats()
    assert stats["dense_frames_used"] == stats["mosaic_frames_used"] == 0
    assert server.trouble() == []
    # By chance it would be none: partial sums of different pages give any of 49,152 tokens.
    assert sum(same) > len(same) / 3
