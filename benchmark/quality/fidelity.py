"""Teacher-forced agreement with stock SGLang: next-token choice and KL divergence on real prose.

    python benchmark/quality/fidelity.py --compare --model-path MODEL --kv-tokens 8192 \
        --server-args='...' --mosaic-args='--mosaic-encode seal'

Both servers score the same prompts (/generate with input_ids and return_logprob). A prompt is prefilled in chunks, and
pages that have left the recent window are encoded between chunks, so later chunks are scored over mosaic pages. Only
positions with at least ``--from`` tokens before them count. KL(stock || ours) is taken over stock's ``--top`` tokens
plus one bucket for all others; a token that ours does not list counts with ours' smallest listed probability.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

import requests
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmark.common import compare
from benchmark.common.errors import BenchmarkError
from benchmark.common.novels import novels
from benchmark.common.options import add_serving_options, integer
from benchmark.common.report import COLOURS, new_figure
from benchmark.common.script import Results, run_script
from benchmark.common.stats import format_table
from benchmark.quality.scoring import Agreement, agreement

NEAR_TIE = 0.01  # gap of stock's two best log-probabilities under which stock flips its own choice, too


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load = parser.add_argument_group("workload")
    load.add_argument("--prompts", type=integer(1), default=20, help="number of prompts (default %(default)s)")
    load.add_argument("--prompt-tokens", type=integer(64), default=2000, help="length of each (default %(default)s)")
    load.add_argument(
        "--from", dest="start", type=integer(0), default=640, metavar="POSITION",
        help="first position that counts: before it nothing is encoded (default %(default)s)",
    )  # fmt: skip
    load.add_argument("--top", type=integer(2), default=64, help="log-probabilities per position (default %(default)s)")
    load.add_argument("--text", type=Path, help="a long text instead of the novels of benchmark/common/novels.py")
    add_serving_options(parser)
    args = parser.parse_args(argv)
    if not args.compare:
        parser.error("argument --compare: this benchmark needs both systems")
    if args.start >= args.prompt_tokens:
        parser.error(f"argument --from: {args.start} is not below --prompt-tokens {args.prompt_tokens}")
    return args


def make_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Token ids of evenly spaced passages."""
    from transformers import AutoTokenizer

    texts = [args.text.read_text()] if args.text else novels()
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    stride = len(ids) // args.prompts
    if stride < args.prompt_tokens:
        raise BenchmarkError(f"--text has {len(ids)} tokens, fewer than {args.prompts} x {args.prompt_tokens}")
    return [ids[i * stride : i * stride + args.prompt_tokens] for i in range(args.prompts)]


def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Score every prompt on one server: per prompt and position the listed (token, log-probability) pairs."""
    scored = []
    for ids in tqdm(make_prompts(args), desc="scoring", unit="prompt"):
        response = requests.post(
            f"{url}/generate",
            json={
                "input_ids": ids,
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": args.top,
            },
            timeout=args.timeout,
        )
        if not response.ok:
            raise BenchmarkError(f"/generate answered HTTP {response.status_code}: {response.text[:300]}")
        meta = response.json()["meta_info"]
        listed = [{token: value for value, token, _ in row} for row in meta["input_top_logprobs"][args.start + 1 :]]
        own = [row[0] for row in meta["input_token_logprobs"][args.start + 1 :]]
        scored.append({"listed": listed, "own": own, "cached_tokens": meta["cached_tokens"]})
    info = requests.get(f"{url}/get_server_info", timeout=args.timeout).json()
    state = info["internal_states"][0].get("mosaic") or {}
    own = [value for prompt in scored for value in prompt["own"]]
    return {
        "scored": scored,
        "summary": {
            "positions": len(own),
            "perplexity": math.exp(-sum(own) / len(own)),
            "pages_encoded": state.get("pages_encoded", 0),
        },
    }


def compare_systems(results: Results) -> None:
    """Add the agreement of every prompt; drop the raw log-probabilities, which are large."""
    stock, ours = (results[name].pop("scored") for name in (compare.STOCK, compare.MOSAIC))
    rows = [agreement(a["listed"], b["listed"], NEAR_TIE) for a, b in zip(stock, ours, strict=True)]
    total = Agreement.total(rows)
    results[compare.MOSAIC]["prompts"] = [row.as_dict() for row in rows]
    results[compare.MOSAIC]["agreement"] = total.as_dict()


def gate(results: Results) -> list[str]:
    """Why the figures must not be used."""
    failures = []
    if results[compare.STOCK]["summary"]["positions"] != results[compare.MOSAIC]["summary"]["positions"]:
        failures.append("the servers scored different numbers of positions")
    if not results[compare.MOSAIC]["summary"]["pages_encoded"]:
        failures.append(
            "no page was encoded, so compression was not measured; pass --mosaic-args='--mosaic-encode seal'"
        )
    return failures


def describe(results: Results) -> str:
    figures = results[compare.MOSAIC]["agreement"]
    rows = [[name, value] for name, value in figures.items()]
    return compare.figures_table(results) + "\n\n" + format_table(["mosaic against stock", "value"], rows)


def draw(results: Results) -> Figure:
    figure = new_figure(2)
    prompts = results[compare.MOSAIC]["prompts"]
    for axis, key, label in zip(
        figure.axes, ("agreement", "mean_kl"), ("next-token agreement", "mean KL to stock, nats"), strict=True
    ):
        axis.bar(range(len(prompts)), [row[key] for row in prompts], color=COLOURS["mosaic"])
        axis.set_xlabel("prompt")
        axis.set_title(label)
    figure.axes[0].set_ylim(0.8, 1.0)
    return figure


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return run_script("fidelity", args, lambda url: measure(url, args), gate, describe, draw, complete=compare_systems)


if __name__ == "__main__":
    raise SystemExit(main())
