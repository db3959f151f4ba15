"""Answers from a compressed cache without a server: what budgets, calibrations and selections do, in seconds each.

    python benchmark/codec/replay.py --model-path MODEL --ratios 5.3 6.4 --length 4096 --json replay.json

Contexts of the quality benchmark are prefilled one by one, exactly, by transformers. For every budget and
calibration, all full pages of a context but the first go through the codec, and the questions are asked over the
result. That is what a server does with a shared prefix; it is no substitute for measuring one
(benchmark/quality/run.py).
With --selects the questions read a part of them (--mosaic-select of the server), chosen afresh by every token or, with
--select-steps, by every so many tokens of an answer.

Calibrated on `one`: a context of RULER's repeated sentences; `own`: the context itself; `mixed`: pages of other
contexts of all tasks. Points are of 100, over the tasks where full KV answers at least 80%, with the paired bootstrap's
95% interval: against full KV, and against reading all of the same cache. Exit status: 0, or 2 when there is no result.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
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
from benchmark.quality.pairing import interval
from benchmark.quality.prompting import Prompter
from benchmark.quality.ruler_package import ruler_package
from benchmark.quality.samples import Group
from benchmark.quality.workload import Workload
from sglang_mosaic.codec import LayerSample, PlanesCodec, PlanesEpoch

REPEATED = "niah_single_1"
RULER_TASKS = ("niah_multikey_1", "niah_multikey_2", "niah_multivalue")
SAMPLED_PAGES, SAMPLED_QUERIES = 64, 2048
CALIBRATIONS = ("one", "own", "mixed")
QUESTIONS = 5
"""That the other suites ask of a context."""
FLOOR = 0.8
"""Share that full KV must answer for a task to count."""


class Coded(NamedTuple):
    """A context as the codec returns it, in the model's own basis; of every layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    data: list[torch.Tensor]
    """Bytes of the full pages but the first."""


class Variant(NamedTuple):
    """A line of the table."""

    ratio: float
    calibrated_on: str
    select: float
    """Share of the compressed tokens that is read; 0: all."""
    steps: int
    """Tokens of an answer that share a selection."""


class Asked(NamedTuple):
    """One question."""

    full: bool
    """Full KV gives every scored token."""
    right: bool
    """So does the variant's cache."""
    kl: float
    """To full KV, mean of the scored tokens, in nats."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or Hugging Face repository")
    parser.add_argument("--length", type=integer(1024), default=4096, help="of the prompts (default %(default)s)")
    parser.add_argument("--samples", type=integer(1), default=5, help="questions per task (default %(default)s)")
    parser.add_argument("--ratios", type=number(1.5), nargs="+", default=[4.5, 5.3, 6.4])
    parser.add_argument(
        "--selects", type=number(0), nargs="+", default=[0.0], metavar="SHARE",
        help="of the compressed tokens that a new one reads; 0: all (default)",
    )  # fmt: skip
    parser.add_argument(
        "--select-steps", type=integer(1), nargs="+", default=[1], metavar="N",
        help="tokens of an answer that share a selection (default 1)",
    )  # fmt: skip
    parser.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS, default=list(CALIBRATIONS))
    parser.add_argument("--seed", type=integer(0), default=0, help="of the prompts (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="of torch, such as cuda (default %(default)s)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="as of benchmark/quality/run.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and the environment")
    return parser.parse_args(argv)


def make_groups(args: argparse.Namespace) -> tuple[dict[str, list[Group]], list[Group], Group]:
    """By task, the contexts to ask; one more of each to calibrate on; a context of repeated sentences."""
    prompter, package = Prompter(args.model_path), ruler_package(args.data)

    def work(contexts: int, questions: int) -> Workload:
        return Workload(prompter, contexts * questions, args.seed)

    groups = {task: ruler.groups(work(args.samples + 1, 1), args.length, [task], package) for task in RULER_TASKS}
    shared = work(-(-args.samples // QUESTIONS) + 1, QUESTIONS)
    groups |= {suite.SUITE: suite.groups(shared, args.length) for suite in (needles, recall, rules)}
    (repeated,) = ruler.groups(work(1, 1), args.length, [REPEATED], package)
    return {task: of_task[:-1] for task, of_task in groups.items()}, [x[-1] for x in groups.values()], repeated


def calibrate(contexts: Sequence[Context], ratio: float, scale: float) -> PlanesEpoch:
    """An epoch from an even sample of contexts."""
    keys, values = contexts[0].keys[0], contexts[0].values[0]
    codec = PlanesCodec(
        len(contexts[0].keys), keys.shape[0], keys.shape[2], values.shape[2], ratio=ratio, scale=scale,
        device=keys.device,
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


def ask(
    model: CachedModel,
    epoch: PlanesEpoch,
    context: Context,
    group: Group,
    full: Sequence[torch.Tensor],
    selects: Sequence[tuple[float, int]],
) -> list[list[Asked]]:
    """The questions of a group over its compressed context, for every share to select and number of steps.

    Args:
        full: log-probabilities of each question's scored tokens, from the exact cache.
    """
    keys, values, data = through_codec(epoch, context)
    found = []
    for select, steps in selects:
        found.append([])
        for sample, wanted in zip(group.samples, full, strict=True):
            reader = SelectingAttention(epoch, data, select, steps, len(sample.question)) if select else None
            ours = model.answer(keys, values, sample, reader)
            target = torch.tensor([sample.answer[offset] for offset in sample.scored])
            kl = (wanted.exp() * (wanted - ours)).sum(-1).mean().item()
            found[-1].append(Asked(*(bool((x.argmax(-1) == target).all()) for x in (wanted, ours)), kl))
    return found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every budget, calibration and selection."""
    groups, others, repeated = make_groups(args)
    model = CachedModel(args.model_path, args.device)
    scale = model.head_dim**-0.5
    shared: dict[str, list[Context]] = {}
    if "one" in args.calibrations:
        shared["one"] = [model.prefill(repeated.context)]
    if "mixed" in args.calibrations:
        shared["mixed"] = [model.prefill(group.context) for group in tqdm(others, desc="to calibrate", unit="context")]
    settings = list(itertools.product(args.ratios, args.calibrations))
    selects = [(select, steps) for select in args.selects for steps in (args.select_steps if select else [1])]
    epochs = {(ratio, name): calibrate(shared[name], ratio, scale) for ratio, name in settings if name in shared}
    shared.clear()

    found: dict[Variant, dict[str, list[Asked]]] = {}
    work = [(task, group) for task, of_task in groups.items() for group in of_task]
    for task, group in (progress := tqdm(work, unit="context")):
        progress.set_description(task)
        context = model.prefill(group.context)
        full = [model.answer(context.keys, context.values, sample) for sample in group.samples]
        for ratio, name in settings:
            epoch = epochs[ratio, name] if name != "own" else calibrate([context], ratio, scale)
            answers = ask(model, epoch, context, group, full, selects)
            for (select, steps), asked in zip(selects, answers, strict=True):
                found.setdefault(Variant(ratio, name, select, steps), {}).setdefault(task, []).extend(asked)
    return [summary(variant, found) for variant in found]


def summary(variant: Variant, found: dict[Variant, dict[str, list[Asked]]]) -> dict[str, Any]:
    """A row: totals, points lost and figures of each task; `whole` compares with reading all of the same cache."""
    tasks = found[variant]
    whole = found.get(variant._replace(select=0.0, steps=1)) if variant.select else None
    counted = [task for task, asked in tasks.items() if sum(x.full for x in asked) >= FLOOR * len(asked)]
    rows = {
        task: {
            "questions": len(asked),
            "full": sum(x.full for x in asked),
            "right": sum(x.right for x in asked),
            "kl": sum(x.kl for x in asked) / len(asked),
        }
        for task, asked in tasks.items()
    }
    return {
        **variant._asdict(),
        "kl": sum(row["kl"] for row in rows.values()) / len(rows),
        **{key: sum(row[key] for row in rows.values()) for key in ("right", "full", "questions")},
        "counted": counted,
        "points": points([[x.right - x.full for x in tasks[task]] for task in counted]),
        "points_to_whole": whole
        and points([[x.right - y.right for x, y in zip(tasks[task], whole[task], strict=True)] for task in counted]),
        "tasks": rows,
    }


def points(differences: Sequence[Sequence[int]]) -> tuple[float, float, float] | None:
    """Mean of the tasks' mean differences and its interval, in points of 100; None without tasks."""
    if not differences:
        return None
    mean = sum(sum(of_task) / len(of_task) for of_task in differences) / len(differences)
    return 100 * mean, *(100 * bound for bound in interval(differences))


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    names = list(rows[0]["tasks"])
    header = [
        "ratio",
        "calibrated on",
        "selected",
        "steps",
        "right",
        "full KV",
        "questions",
        "points",
        "points to whole",
    ]
    lines = [
        [row["ratio"], row["calibrated_on"], row["select"] or "all", row["steps"]]
        + [row["right"], row["full"], row["questions"]]
        + [_with_interval(row[key]) for key in ("points", "points_to_whole")]
        + [f"{row['kl']:.4f}"]
        + [f"{row['tasks'][name]['kl']:.4f}" for name in names]
        for row in rows
    ]
    return format_table([*header, "mean KL", *(f"KL {name}" for name in names)], lines)


def _with_interval(found: tuple[float, float, float] | None) -> str | None:
    return found and "{:+.1f} [{:.1f}, {:.1f}]".format(*found)


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
        options = {"model": Path(args.model_path).name, "length": args.length, "samples": args.samples}
        write_json(args.json, {"benchmark": "replay", "environment": environment(), **options, "rows": rows})
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
