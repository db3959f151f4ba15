"""An SGLang program: a conversation that forks into branches, all of them on one cached beginning.

python -m sglang_mosaic.launch_server --model-path MODEL
python examples/frontend_program.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse

import sglang as sgl

SEASONS = ("summer", "winter")


@sgl.function
def plan_a_trip(s, city):
    s += sgl.system("You are a travel guide. Keep every answer to one sentence.")
    s += sgl.user(f"What is {city} known for?")
    s += sgl.assistant(sgl.gen("known_for", max_tokens=32))

    branches = s.fork(len(SEASONS))
    for season, branch in zip(SEASONS, branches, strict=True):
        branch += sgl.user(f"What should I pack for {city} in {season}?")
        branch += sgl.assistant(sgl.gen("packing", max_tokens=32))
    for season, branch in zip(SEASONS, branches, strict=True):
        s[season] = branch["packing"]

    s += sgl.user("Which language do people speak there?")
    s += sgl.assistant(sgl.gen("language", max_tokens=16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server (default: %(default)s)")
    parser.add_argument("--city", default="Lisbon", help="where to go (default: %(default)s)")
    args = parser.parse_args()

    backend = sgl.RuntimeEndpoint(args.url, chat_template_name="chatml")
    trip = plan_a_trip.run(city=args.city, backend=backend, temperature=0)
    for name in ("known_for", *SEASONS, "language"):
        print(f"{name}: {trip[name].strip()}")


if __name__ == "__main__":
    main()
