"""Measures this machine's GPU: kernels, the time of a token and of a prompt, chats, and pages that come back from the
host, one after another.

    make bench-gpu
    make bench-gpu ARGS="--only steps chat --out results"

Figures and tables go to benchmark/results/ (or --out) as NAME-GPU.json and NAME-GPU.png, servers' logs to
build/bench-gpu/. A benchmark that fails does not keep the others from running. Exit status: 0, 1 when one failed, 2
when there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `import benchmark` when run by path

from benchmark.common.stats import format_table

ROOT = Path(__file__).resolve().parents[1]
# Relative to it, as steps run there: reports keep the command lines.
RESULTS = Path("benchmark/results")
SCRATCH = Path("build/bench-gpu")
MODEL = SCRATCH / "llama-3-8b-shape"
SERVERS = (
    "--load-format dummy --sampling-backend pytorch --disable-piecewise-cuda-graph --cuda-graph-max-bs 32 "
    "--mem-fraction-static 0.85 --context-length 140000"
)
STOCK = "--stock-args=--attention-backend flashinfer"
SELECTING = "--mosaic-args=--mosaic-encode seal --mosaic-select 0.05 --mosaic-select-steps 4"
PAIR = "--compare", "--model-path", str(MODEL), f"--server-args={SERVERS}", STOCK, SELECTING
# One process takes .2 s to tokenise 66,000 tokens of text, and 24 users would wait for it one after another.
TOKENIZERS = 4
HOST_GB, HOST_KV_TOKENS = 16, 40_960
HOST_SERVERS = f"{SERVERS} --page-size 64"
VERDICTS = {0: "passed", 1: "gate failed"}


@dataclass(frozen=True)
class Step:
    """A script, run in the repository's root with these options and, if it writes a report, with --json and --png."""

    name: str
    script: str
    options: tuple[str, ...] = ()
    # Of its files, without the GPU's name; None: it writes none.
    report: str | None = None
    # Whether there is a figure.
    draws: bool = True
    # Starts servers of the shaped model.
    serves: bool = False
    # And takes --log-dir for what they say.
    logs: bool = False

    def files(self, out: Path, gpu: str) -> list[Path]:
        """What it writes."""
        kinds = ("json", "png") if self.draws else ("json",)
        return [out / f"{self.report}-{gpu}.{kind}" for kind in kinds] if self.report else []

    def command(self, out: Path, gpu: str) -> list[str]:
        """The command line."""
        logs = ("--log-dir", str(SCRATCH / self.name)) if self.logs else ()
        files = [word for file in self.files(out, gpu) for word in (f"--{file.suffix[1:]}", str(file))]
        return [sys.executable, self.script, *self.options, *logs, *files]


SHAPED_MODEL = Step("model", "benchmark/common/shaped_model.py", (str(MODEL),))
STEPS = (
    Step("kernels", "benchmark/kernels/run.py", ("--crossover",), report="kernels"),
    Step("prefill", "benchmark/kernels/prefill.py", report="kernels-prefill", draws=False),
    Step(
        "steps",
        "benchmark/serving/steps.py",
        (*PAIR, "--kv-tokens", "150000"),
        report="served-steps-8b",
        serves=True,
        logs=True,
    ),
    Step(
        "chat",
        "benchmark/serving/shared_prefix_chat.py",
        (
            # Stock holds the prompt that all share and the documents of eight users.
            *("--compare", "--model-path", str(MODEL), STOCK, SELECTING),
            *(f"--server-args={SERVERS} --tokenizer-worker-num {TOKENIZERS}", "--kv-tokens", "300000"),
            *("--users", "24", "--turns", "4", "--warm-turns", "1"),
            *("--system-tokens", "32000", "--first-tokens", "32000", "--user-tokens", "1000", "--output-tokens", "256"),
        ),
        report="served-chat-8b",
        serves=True,
        logs=True,
    ),
    Step(
        "host",
        "benchmark/serving/shared_prefix_chat.py",
        (
            *("--compare", "--model-path", str(MODEL), f"--server-args={HOST_SERVERS}", STOCK),
            # Prompts of six times the KV memory. In the first turn kernels are compiled and the codec is calibrated.
            *("--kv-tokens", str(HOST_KV_TOKENS), "--host-gb", str(HOST_GB), "--users", "20", "--turns", "5"),
            *("--warm-turns", "1", "--system-tokens", "2000", "--user-tokens", "2400", "--output-tokens", "16"),
            *("--concurrency", "4", "--think-time", "1"),
        ),
        report="served-host-8b",
        serves=True,
        logs=True,
    ),
    Step(
        "break-even",
        "benchmark/manager/break_even.py",
        (
            *("--model-path", str(MODEL), "--pages", "16", "64", "256", "1024"),
            f"--server-args={SERVERS} --mosaic-encode seal --mosaic-kv-mib 5120 --mosaic-host-gb {HOST_GB} "
            "--mosaic-restore-from 1",
        ),
        report="break-even",
        serves=True,
    ),
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    described = "\n".join(f"  {step.name:8} {step.script}" for step in STEPS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"names:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="(default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of the results (default: {RESULTS})")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    args = parser.parse_args(argv)
    args.out = args.out.resolve() if args.out else RESULTS
    return args


def chosen(names: list[str]) -> list[Step]:
    """The steps of these names, and before them what they need."""
    steps = [step for step in STEPS if step.name in names]
    return [*([SHAPED_MODEL] if any(step.serves for step in steps) else []), *steps]


def gpu_name() -> str | None:
    """What torch calls the GPU that it would take; None when it sees none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def short_name(gpu: str) -> str:
    """For file names: "NVIDIA H100 80GB HBM3" is h100."""
    model = re.search(r"\b[A-Z]{1,2}\d+[A-Z]?\b", gpu)
    return (model[0] if model else re.sub(r"\W+", "-", gpu.removeprefix("NVIDIA ")).strip("-")).lower()


def run(step: Step, out: Path, gpu: str) -> tuple[int, float]:
    """Run a step in the terminal; its exit status and seconds."""
    # A local model needs no hub, and a server that asks for one waits where there is none. Of several tokenizers SGLang
    # ends those that take more than 10 s to start.
    serving = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "120"}
    started = time.monotonic()
    environment = {**os.environ, **(serving if step.serves else {})}
    status = subprocess.run(step.command(out, gpu), cwd=ROOT, env=environment).returncode
    return status, time.monotonic() - started


def _is_newer(file: Path, begun: float) -> bool:
    # File systems round times, some to two seconds.
    return file.exists() and file.stat().st_mtime > begun - 2


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    found = gpu_name()
    if found is None and not args.dry_run:
        print("bench_gpu: torch sees no CUDA device; --dry-run prints the commands without one", file=sys.stderr)
        return 2
    gpu = short_name(found or "GPU")
    rows, failed = [], False
    for step in chosen(args.only):
        print(f"--- {step.name}: {shlex.join(step.command(args.out, gpu))}", flush=True)
        if args.dry_run:
            continue
        begun = time.time()
        status, seconds = run(step, args.out, gpu)
        failed |= status != 0
        # Files of an earlier run are none of this one's.
        written = [str(file) for file in step.files(args.out, gpu) if _is_newer(ROOT / file, begun)]
        verdict = VERDICTS.get(status, f"no result (exit status {status})")
        rows.append([step.name, verdict, round(seconds), " ".join(written) or None])
    if rows:
        print(f"\n{found}\n{format_table(['benchmark', 'verdict', 'seconds', 'results'], rows)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
