#!/usr/bin/env bash
# Serves a model with sglang_mosaic. Further arguments go to the server and override what is set here.
#
#   HOST, PORT  address to listen on (default: 127.0.0.1 and 30000)
#   MODEL       a checkpoint directory or a hub name (default: the embedded SmolLM2-135M-Instruct)
#   VENV        the virtual environment of scripts/install_cpu.sh (default: .venv); without one, $PYTHON or python3
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
python=$VENV/bin/python
[[ -x $python ]] || python=${PYTHON:-python3}

# It would have every process compile the whole server anew, which triples the start.
unset PYTHONDONTWRITEBYTECODE

model=${MODEL:-}
[[ -n $model ]] || model=$("$python" -m sglang_mosaic.embedded_model)
# A local model needs no hub, and a server that asks for one waits where there is none.
[[ ! -d $model ]] || export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

args=(--model-path "$model" --host "${HOST:-127.0.0.1}" --port "${PORT:-30000}")
if ! { nvidia-smi -L >/dev/null 2>&1 && "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; }; then
    echo "No GPU: serving on the CPU" >&2
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" TOKENIZERS_PARALLELISM=false
    args+=(--device cpu --mem-fraction-static 0.1 --max-running-requests 8)
    if "$python" -c 'import sys; from sglang_mosaic.doctor.installation import multiplies_bf16 as m; sys.exit(not m())'; then
        args+=(--dtype bfloat16)
    else
        args+=(--dtype float32 --kv-cache-dtype bfloat16)
    fi
    args+=(--chunked-prefill-size 512 --disable-cuda-graph)
fi
exec "$python" -m sglang_mosaic.launch_server "${args[@]}" "$@"
