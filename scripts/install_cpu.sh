#!/usr/bin/env bash
# Installs sglang_mosaic and the SGLang server for a machine without a GPU into a virtual environment.
#
#   SGLANG  0.5.17 (default) or 0.5.23
#   VENV    the virtual environment (default: .venv in the repository, .venv-0.5.23 for that version)
#   PYTHON  the Python to build it with, 3.10 or newer (default: python3.11, else python3)
#
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf) hold here too: where they offer a CPU build of torch,
# it is taken; elsewhere pip takes the far larger CUDA build.
#
# Running it again takes no time unless a requirement changed. Where $PYTHON (default: python3) already has SGLang
# 0.5.17 and a torch that sees a GPU, no environment is built: the project goes into that installation.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SGLANG=${SGLANG:-0.5.17}
VENV=${VENV:-$ROOT/.venv$([[ $SGLANG == 0.5.17 ]] || echo "-$SGLANG")}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
STAMP=$VENV/.mosaic-installed
UNFINISHED=$VENV/.mosaic-installing
TORCH=torch==2.13.0

say() { printf '%s\n' "$*" >&2; }
fail() { say "install_cpu.sh: $*"; exit 1; }

cd "$ROOT"
NODEPS=requirements/cpu-nodeps-$SGLANG.txt
[[ -f $NODEPS ]] || fail "SGLANG=$SGLANG is not served: set it to 0.5.17 or 0.5.23."
# The editable install points at this checkout, so its path is part of what was installed.
wanted=$({ echo "$ROOT $SGLANG"; cat requirements/*.txt pyproject.toml scripts/install_cpu.sh; } | sha256sum)

if [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$wanted" ]]; then
    say "$VENV is up to date"
    exit 0
fi

has_gpu_install() {
    # The metadata look-up is quick; torch is imported only where SGLang is there at all.
    "$1" -c 'import importlib.metadata as m; assert m.version("sglang") == "0.5.17"
import torch; assert torch.cuda.is_available()' 2>/dev/null
}
host_python=${PYTHON:-python3}
if [[ ! -e $VENV && $SGLANG == 0.5.17 ]] && has_gpu_install "$host_python"; then
    say "$host_python has SGLang 0.5.17 and a GPU: installing into it, no virtual environment is needed"
    "$host_python" -m pip install -r requirements/test.txt gguf accelerate
    exec "$host_python" -m pip install --no-deps -e .
fi

python=${PYTHON:-}
if [[ -z $python ]]; then
    # A version manager's shim can exist without a Python behind it: only running it tells.
    if python3.11 -c '' 2>/dev/null; then python=python3.11; else python=python3; fi
fi
"$python" -c '' 2>/dev/null ||
    fail "no working $python. On Debian install the packages python3 and python3-venv, or set PYTHON to a Python."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old: set PYTHON to a Python 3.10 or newer."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv or ensurepip. On Debian install the package python3-venv, or set PYTHON to another Python."

mkdir -p "$(dirname "$VENV")"
exec 9>"$VENV.lock"
flock -n 9 || { say "Waiting for another installation into $VENV"; flock 9; }
if [[ -f $STAMP && $(<"$STAMP") == "$wanted" ]]; then
    say "$VENV is up to date"
    exit 0
fi

started=$SECONDS
clear=()
if [[ -e $UNFINISHED ]]; then
    # pip takes a package whose files are half there for an installed one, so only a new start is sure.
    say "An earlier installation was interrupted: starting anew"
    clear=(--clear)
elif [[ -e $VENV ]] && ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    [[ -f $VENV/pyvenv.cfg || -z $(ls -A "$VENV") ]] || fail "$VENV exists and is no virtual environment: set VENV."
    say "$VENV is broken: starting anew"
    clear=(--clear)
fi
# pip ends normally on an interrupt; without this the script would take that for an ordinary failure.
trap 'exit 130' INT TERM
if [[ ! -e $VENV || ${#clear[@]} -gt 0 ]]; then
    say "[1/5] virtual environment in $VENV ($("$python" --version))"
    # Marked before any file is there, and again after --clear has removed the mark.
    mkdir -p "$VENV"
    : >"$UNFINISHED"
    "$python" -m venv "${clear[@]}" "$VENV"
fi
rm -f "$STAMP"
: >"$UNFINISHED"

step() {
    local title=$1
    shift
    say "$title"
    "$VENV/bin/python" -m pip --disable-pip-version-check install "$@" && return
    # pip undoes its own failures (no network, no such version): what was installed before is whole.
    rm -f "$UNFINISHED"
    fail "pip failed (its message is above). Nothing is half installed: correct it and run this again."
}
step "[2/5] $TORCH" "$TORCH"
step "[3/5] SGLang $SGLANG without its CUDA dependencies" --no-deps -r "$NODEPS"
say "pip is about to report conflicts with the CUDA packages that SGLang declares: they are left out on purpose."
step "[4/5] what it imports on a CPU" -r requirements/cpu.txt
step "[5/5] sglang_mosaic, editable" --no-deps --no-build-isolation -e .
# SGLang's spawned processes import torchvision before they load any plugin (see torchvision_compat.py). The name sorts
# behind the editable install's own path file, which makes the package importable.
site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo 'import sglang_mosaic.torchvision_compat; sglang_mosaic.torchvision_compat.declare_on_import()' \
    >"$site/zz_sglang_mosaic_cpu.pth"

printf '%s\n' "$wanted" >"$STAMP"
rm -f "$UNFINISHED"
say "Installed in $((SECONDS - started)) s: $VENV/bin/python"
