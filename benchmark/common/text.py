"""Seeded, varied, English-like text of an approximate token count; needs no download."""

from __future__ import annotations

import random

# Measured on SmolLM2 (49k byte-pair entries), the full stops included; larger vocabularies differ by a few percent.
TOKENS_PER_WORD = 1.1


def _options(text: str) -> list[str]:
    return text.split("|")


_WHO = _options(
    "the careful engineer|an old sailor|the night nurse|a travelling musician|the young botanist|our neighbour"
    "|the museum guide|a retired judge|the bridge keeper|two students|the village baker|a patient teacher"
    "|the ship's cook|an honest broker|the chess champion|a tired reporter|the lighthouse keeper|her cousin"
)
_DID = _options(
    "measured|repaired|described|counted|painted|forgot|borrowed|examined|carried|photographed|sketched|sold"
    "|hid|compared|cleaned|catalogued|praised|questioned"
)
_HOW_MANY = _options("one|two|three|seven|eleven|several|nearly forty|a dozen|too many|hardly any|exactly nineteen")
_WHAT = _options(
    "copper kettles|letters|broken clocks|maps of the coast|glass jars|wooden boats|seed packets|bicycles|violins"
    "|coins from abroad|stone steps|radio parts|winter coats|silver spoons|paper lanterns|survey notes|fishing nets"
)
_WHERE = _options(
    "near the harbour|behind the old mill|under the station roof|in the upper garden|along the canal|at the market"
    "|beside the frozen lake|inside the archive|on the northern road|between the two towers|across the valley"
)
_WHEN = _options(
    "before noon|during the storm|late in the autumn|after the concert|on a quiet Tuesday|while the rain lasted"
    "|long before the war|at the end of the shift|every second week|just after sunrise|without any warning"
)
_QUESTION = _options(
    "What happened next|Why did nobody notice|How would you explain it|Who should be told|What would you change"
    "|Which part is hardest to believe|How long did it take"
)


def make_text(tokens: int, seed: str) -> str:
    """About `tokens` tokens of sentences; the same seed gives the same text in every process.

    Python seeds its generator from a string's bytes, so the result does not depend on hash randomisation.
    """
    generator = random.Random(seed)
    words_left = tokens / TOKENS_PER_WORD
    sentences: list[str] = []
    while words_left > 0 or not sentences:
        parts = [generator.choice(options) for options in (_WHO, _DID, _HOW_MANY, _WHAT, _WHERE, _WHEN)]
        sentence = " ".join(parts) + "."
        if generator.random() < 0.15:
            sentence += f" {generator.choice(_QUESTION)}?"
        sentences.append(sentence[0].upper() + sentence[1:])
        words_left -= len(sentence.split())
    words = " ".join(sentences).split()
    return " ".join(words[: max(1, round(tokens / TOKENS_PER_WORD))])
