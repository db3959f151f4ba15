"""Answers from a compressed cache without a server: what budgets and calibrations do, in seconds each.

    python benchmark/codec/replay.py --model-path MODEL --ratios 5.3 6.4 --length 4096 --json replay.json

Contexts of the quality benchmark are prefilled once, exactly, by transformers on the CPU. Then, for every budget and
calibration, all of their full pages but the first go through the codec, and the questions are asked over the result.
That is what a server does with a shared prefix; it is no substitute for measuring one (benchmark/quality/run.py).
With --selects the questions read a part of them, chosen afresh by every token (--mosaic-select of the server).

Calibrated on `one`: a context of RULER's repeated sentences; `own`: the context itself; `mixed`: pages of other
contexts of all tasks. Exit status: 0, or 2 when there is no result.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

import torch
from tqdm import tqdm

from benchmark.codec.cached_model import CachedModel, Context
from benchmark.codec.methods import PAGE, pages
from benchmark.codec.selecting import SelectingAttention
from benchmark.common.errors import BenchmarkError
from benchmark.common.options import integer, number
from benchmark.common.report import environment, write_json
from benchmark.common.stats import format_table
from benchmark.quality import needles, recall, ruler, rules
from benchmark.quality.prompting import Prompter
from benchmark.quality.ruler_package import ruler_package
from benchmark.quality.samples import Group
from benchmark.quality.workload import Workload
from sglang_mosaic.codec import LayerSample, PlanesCodec, PlanesEpoch

REPEATED = "niah_single_1"
RULER_TASKS = ("niah_multikey_1", "niah_multikey_2", "niah_multivalue")
SAMPLED_PAGES, SAMPLED_QUERIES = 64, 2048
CALIBRATIONS = ("one", "own", "mixed")


class Coded(NamedTuple):
    """A context as the codec returns it, in the model's own basis; of every layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    data: list[torch.Tensor]
    """Bytes of the full pages but the first."""


class Prefilled(NamedTuple):
    """A context with its questions and what full KV answers."""

    task: str
    group: Group
    context: Context
    full: list[torch.Tensor]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or Hugging Face repository")
    parser.add_argument("--length", type=integer(1024), default=4096, help="of the prompts (default %(default)s)")
    parser.add_argument("--contexts", type=integer(1), default=1, help="to ask per task (default %(default)s)")
    parser.add_argument("--ratios", type=number(1.5), nargs="+", default=[4.5, 5.3, 6.4])
    parser.add_argument(
        "--selects", type=number(0), nargs="+", default=[0.0], metavar="SHARE",
        help="of the compressed tokens that a new one reads; 0: all (default)",
    )  # fmt: skip
    parser.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS, default=list(CALIBRATIONS))
    parser.add_argument("--seed", type=integer(0), default=0, help="of the prompts (default %(default)s)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="as of benchmark/quality/run.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and the environment")
    return parser.parse_args(argv)


def make_groups(args: argparse.Namespace) -> dict[str, list[Group]]:
    """By task, the contexts to ask and one more to calibrate on."""
    prompter, package = Prompter(args.model_path), ruler_package(args.data)
    wanted = args.contexts + 1
    work = Workload(prompter, wanted, args.seed)
    # The other suites ask five questions of a context.
    shared = Workload(prompter, 5 * wanted, args.seed)
    groups = {task: ruler.groups(work, args.length, [task], package) for task in (*RULER_TASKS, REPEATED)}
    return groups | {suite.SUITE: suite.groups(shared, args.length) for suite in (needles, recall, rules)}


def calibrate(contexts: Sequence[Context], ratio: float, scale: float) -> PlanesEpoch:
    """An epoch from an even sample of contexts."""
    keys, values = contexts[0].keys[0], contexts[0].values[0]
    codec = PlanesCodec(
        len(contexts[0].keys), keys.shape[0], keys.shape[2], values.shape[2], ratio=ratio, scale=scale,
    )  # fmt: skip
    share = SAMPLED_PAGES // len(contexts)
    samples = []
    for layer in range(len(contexts[0].keys)):
        k = [pages(context.keys[layer].transpose(0, 1)) for context in contexts]
        v = [pages(context.values[layer].transpose(0, 1)) for context in contexts]
        samples.append(LayerSample(_sample(k, share), _sample(v, share), len(contexts)))
        for context in contexts:
            stride = max(len(context.queries[layer]) * len(contexts) // SAMPLED_QUERIES, 1)
            codec.observe_queries(layer, context.queries[layer][::stride])
    return codec.calibrate(samples)


def _sample(contexts: Sequence[torch.Tensor], share: int) -> torch.Tensor:
    """First pages, then evenly chosen others, of [pages, PAGE, H, D] each."""
    others = [x[1 :: max((len(x) - 1) // share, 1)][:share] for x in contexts]
    return torch.cat([*(x[:1] for x in contexts), *others])


def through_codec(epoch: PlanesEpoch, context: Context) -> Coded:
    """What is left of a context once its full pages but the first are compressed."""
    coded = Coded([], [], [])
    for layer, (k, v) in enumerate(zip(context.keys, context.values, strict=True)):
        stop = k.shape[1] // PAGE * PAGE
        paged = [pages(x.transpose(0, 1))[1:] for x in (k, v)]
        data, _ = epoch.encode(layer, *paged)
        k_rot, v_rot = epoch.decode(layer, data)
        basis = epoch.layers[layer].basis
        turned = k_rot @ basis.q_basis.transpose(1, 2), v_rot @ basis.v_unrotate
        for target, exact, back in zip((coded.keys, coded.values), (k, v), turned, strict=True):
            target.append(exact.clone())
            target[-1][:, PAGE:stop] = back.transpose(0, 1).flatten(1, 2).to(exact.dtype)
        coded.data.append(data)
    return coded


def replay(
    model: CachedModel, asked: Sequence[Prefilled], epoch_of: Callable[[Context], PlanesEpoch], select: float = 0.0
) -> dict[str, dict[str, float]]:
    """By task: questions, those that full KV and this cache answer, mean KL to full KV in nats."""
    found: dict[str, list[tuple[bool, bool, float]]] = {}
    for one in asked:
        epoch = epoch_of(one.context)
        keys, values, data = through_codec(epoch, one.context)
        reader = SelectingAttention(epoch, data, select) if select else None
        for sample, full in zip(one.group.samples, one.full, strict=True):
            ours = model.answer(keys, values, sample, reader)
            target = torch.tensor([sample.answer[offset] for offset in sample.scored])
            kl = (full.exp() * (full - ours)).sum(-1).mean().item()
            right = [bool((x.argmax(-1) == target).all()) for x in (full, ours)]
            found.setdefault(one.task, []).append((*right, kl))
    return {
        task: {
            "questions": len(rows),
            "full": sum(full for full, _, _ in rows),
            "right": sum(right for _, right, _ in rows),
            "kl": sum(kl for *_, kl in rows) / len(rows),
        }
        for task, rows in found.items()
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every budget, calibration and selection."""
    groups = make_groups(args)
    model = CachedModel(args.model_path)
    asked, others, repeated = [], [], None
    for task, of_task in groups.items():
        for i, group in enumerate(tqdm(of_task, desc=task, unit="context")):
            context = model.prefill(group.context)
            if task == REPEATED:
                repeated = context
                break
            if i == args.contexts:
                others.append(context)
            else:
                answers = [model.answer(context.keys, context.values, sample) for sample in group.samples]
                asked.append(Prefilled(task, group, context, answers))
    scale = asked[0].context.keys[0].shape[2] ** -0.5
    rows = []
    for ratio, name, select in itertools.product(args.ratios, args.calibrations, args.selects):
        start = time.perf_counter()
        if name == "own":
            tasks = replay(model, asked, lambda context, ratio=ratio: calibrate([context], ratio, scale), select)
        else:
            epoch = calibrate(others if name == "mixed" else [repeated], ratio, scale)
            tasks = replay(model, asked, lambda context, epoch=epoch: epoch, select)
        rows.append(
            {
                "ratio": ratio,
                "calibrated_on": name,
                "select": select,
                "kl": sum(task["kl"] for task in tasks.values()) / len(tasks),
                **{key: sum(task[key] for task in tasks.values()) for key in ("right", "full", "questions")},
                "seconds": round(time.perf_counter() - start, 1),
                "tasks": tasks,
            }
        )
    return rows


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    names = list(rows[0]["tasks"])
    header = [
        "ratio",
        "calibrated on",
        "selected",
        "right",
        "full KV",
        "questions",
        "mean KL",
        *(f"KL {name}" for name in names),
    ]
    lines = [
        [row["ratio"], row["calibrated_on"], row["select"] or "all", row["right"], row["full"], row["questions"]]
        + [f"{row['kl']:.4f}"]
        + [f"{row['tasks'][name]['kl']:.4f}" for name in names]
        for row in rows
    ]
    return format_table(header, lines)


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    try:
        rows = measure(args)
    except BenchmarkError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    print(describe(rows))
    if args.json:
        options = {"model": Path(args.model_path).name, "length": args.length, "contexts": args.contexts}
        write_json(args.json, {"benchmark": "replay", "environment": environment(), **options, "rows": rows})
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
