"""Visitors of a museum ask one assistant: they share its long instructions, and the server computes those once.

python -m sglang_mosaic.launch_server --model-path MODEL --enable-cache-report
python examples/openai_chat.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse

from openai import OpenAI

ROOMS = ("Roman glass", "clocks", "maps of the coast", "ship models", "musical instruments", "early cameras", "kites")
INSTRUCTIONS = "You are the guide of a small museum. Answer in one sentence.\n" + "\n".join(
    f"Room {number} shows {what}. It opens at {8 + number} o'clock, and {10 * number} visitors find a seat there."
    for number, what in enumerate(ROOMS, start=1)
)
QUESTIONS = ("Which room shows the ship models?", "When does room 2 open?", "Where can I see old cameras?")


def ask(client: OpenAI, question: str) -> None:
    """Print the answer as it arrives, then how much of the prompt was in the cache."""
    print(f"\n> {question}")
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": question}],
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.choices:
            print(event.choices[0].delta.content or "", end="", flush=True)
        if event.usage:
            details = event.usage.prompt_tokens_details
            cached = details.cached_tokens if details else 0
            print(f"\n  [{cached} of {event.usage.prompt_tokens} prompt tokens were cached]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server (default: %(default)s)")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="not-needed")
    for question in QUESTIONS:
        ask(client, question)


if __name__ == "__main__":
    main()
