"""SGLang's engine inside a Python program, with the compressed KV cache; no server.

python examples/offline_engine.py --model-path MODEL
"""

from __future__ import annotations

import argparse

import sglang as sgl

from sglang_mosaic.config import MosaicConfig

PROMPTS = ("The capital of France is", "A prime number is", "Water boils at")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a checkpoint directory or a Hugging Face name")
    args = parser.parse_args()

    # What the --mosaic-* flags are to a server; the engine's processes inherit it.
    MosaicConfig(encode="seal", kv_mib=256).store()
    with sgl.Engine(
        model_path=args.model_path, attention_backend="mosaic", max_running_requests=8, chunked_prefill_size=512
    ) as engine:
        answers = engine.generate(list(PROMPTS), {"temperature": 0, "max_new_tokens": 16})
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            print(prompt + answer["text"])
        pool = engine.get_server_info()["internal_states"][0]["mosaic"]
        print(f"{pool['logical_pages'] * 64} tokens fit into {pool['kv_bytes'] / 2**20:.0f} MiB of KV cache")


# The engine starts its processes by running this file again; only the guard keeps them from starting engines too.
if __name__ == "__main__":
    main()
