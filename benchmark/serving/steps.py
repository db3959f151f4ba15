"""Time of a token and of a prompt by the length of the context, over HTTP on a running SGLang server.

    python benchmark/serving/steps.py --url http://127.0.0.1:30000
    python benchmark/serving/steps.py --compare --model-path MODEL --kv-tokens 150000

Per context: the first prompt; the time of a token for batches that share the cached context (step_probe.py says how);
new tokens after the cached context, up to the first output token. Prompts are random token ids, so the model's weights
do not matter: shaped_model.py makes a model for --server-args='--load-format dummy'. It FLUSHES the server's cache and
needs a server without other traffic. What does not fit into a server's KV memory is left out there, which fails the
gate unless the server is stock SGLang beside sglang_mosaic. Exit status: 0, 1 when the gate failed, 2 when there is no
result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

from tqdm import tqdm

from benchmark.common import compare, sglang_http
from benchmark.common.kv_bytes import load_config
from benchmark.common.options import add_serving_options, integer
from benchmark.common.script import run_script
from benchmark.serving import step_summary
from benchmark.serving.step_probe import FEW_TOKENS, NEW_TOKENS, PAGE_TOKENS, Limits, Sender, StepProbe, StepWorkload

CONTEXTS = (2048, 8192, 32768, 131072)
WARM_UP_TOKENS = 4096
# Below the vocabulary of every model there is, nearly.
VOCABULARY = 30_000


def add_cells(group: Any, contexts: Sequence[int]) -> None:
    """Options for what is measured of each: contexts, and requests that share one.

    Args:
        group: of an argument parser.
        contexts: the default, in tokens.
    """
    many = {"nargs": "+", "metavar": "N"}
    group.add_argument(
        "--contexts",
        type=integer(PAGE_TOKENS),
        default=list(contexts),
        help="tokens of the cached contexts (default %(default)s)",
        **many,
    )
    group.add_argument(
        "--batches",
        type=integer(1),
        default=[1, 8],
        help=f"requests at a time, which share the context and add {NEW_TOKENS} tokens each (default %(default)s)",
        **many,
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load = parser.add_argument_group("workload")
    add_cells(load, CONTEXTS)
    load.add_argument(
        "--suffixes",
        type=integer(1),
        default=[64, 2400],
        help="new tokens after a cached context (default %(default)s)",
        nargs="+",
        metavar="N",
    )
    load.add_argument(
        "--new-prompt", type=integer(1), default=512, metavar="N", help="tokens of a short prompt (default %(default)s)"
    )
    load.add_argument(
        "--output-tokens",
        type=integer(1),
        default=96,
        metavar="N",
        help=f"that are timed: answers have {FEW_TOKENS} and {FEW_TOKENS} more than this (default %(default)s)",
    )
    load.add_argument(
        "--repeats",
        type=integer(1),
        default=3,
        help="of all but first prompts; the median counts (default %(default)s)",
    )
    load.add_argument(
        "--warm-up",
        type=integer(0),
        metavar="N",
        help="tokens of a prompt before all measurements, to which suffixes and every batch size are then tried; 0: no "
        f"warm-up (default: {WARM_UP_TOKENS}, or the shortest context if that is less)",
    )
    load.add_argument(
        "--vocabulary",
        type=integer(2),
        metavar="N",
        help=f"token ids are below this (default: the model's with --compare, {VOCABULARY} with --url)",
    )
    load.add_argument("--seed", type=int, default=0, help="of the prompts (default %(default)s)")
    add_serving_options(parser)
    args = parser.parse_args(argv)
    for name in ("contexts", "batches", "suffixes"):
        setattr(args, name, sorted(set(getattr(args, name))))
    if args.warm_up is None:
        args.warm_up = min(WARM_UP_TOKENS, args.contexts[0])
    return args


def workload(args: argparse.Namespace) -> StepWorkload:
    """What the options ask for."""
    vocabulary = args.vocabulary
    if vocabulary is None:
        vocabulary = load_config(args.model_path)["vocab_size"] if args.compare else VOCABULARY
    return StepWorkload(
        contexts=tuple(args.contexts),
        batches=tuple(args.batches),
        suffixes=tuple(args.suffixes),
        new_prompt=args.new_prompt,
        output_tokens=args.output_tokens,
        repeats=args.repeats,
        warm_up=args.warm_up,
        vocabulary=vocabulary,
        seed=args.seed,
    )


def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the workload on one server: summary, time of a token by context and batch, raw rows."""
    load = workload(args)
    limits = Limits.of(url, sglang_http.server_info(url))
    send = Sender(url, args.timeout, max(load.batches))
    try:
        with tqdm(total=load.measurements, desc="measurements") as bar:
            rows = StepProbe(load, limits, send, lambda: sglang_http.flush_cache(url), bar.update).run()
    finally:
        send.close()
    return {
        "summary": step_summary.summarise(rows, load),
        "per_token": step_summary.per_token(rows, load),
        "rows": rows,
    }


def describe(results: dict[str, dict[str, Any]]) -> str:
    """The table, and what is missing from it."""
    notes = [
        f"{name}: not measured: {reason}"
        for name, result in results.items()
        for reason in step_summary.unmeasured(result["rows"])
    ]
    return "\n".join(["", compare.figures_table(results), *notes])


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    return run_script(
        "steps",
        args,
        measure=lambda url: measure(url, args),
        gate=step_summary.gate,
        describe=describe,
        draw=step_summary.draw,
    )


if __name__ == "__main__":
    sys.exit(main())
