"""The prompts of the suite: token ids only, seeded, 1 to 2,000 tokens."""

import random

# Most prompts are short; the rest sit on and around the engine's block (128 tokens by default, 32
# and 64 where a test says so), on the conv width, and far beyond a prefill chunk.
LENGTHS = [
    *range(1, 33),
    *[33, 40, 48, 63, 64, 65, 80, 95, 96, 97, 100, 111, 112],
    *[127, 128, 129] * 4,
    *[159, 160, 161, 191, 192, 193],
    *[255, 256, 257] * 3,
    *[383, 384, 385, 511, 512, 513],
    *[700, 1000, 1023, 1024, 1025, 1500, 1999, 2000],
]
FILLER = [2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17, 19, 23, 29, 31, 37, 41, 47, 53, 59, 71]
COUNT = 200
FIRST_ORDINARY = 16  # ids below are special tokens in the demo tokenizer; random prompts avoid them


def lengths() -> list[int]:
    """Exactly COUNT lengths, the rare long ones once, the short ones several times."""
    missing = COUNT - len(LENGTHS)
    return LENGTHS + (FILLER * (missing // len(FILLER) + 1))[:missing]


def random_prompts(vocab: int, seed: int = 0) -> list[list[int]]:
    """COUNT prompts of ``lengths()`` tokens; some repeat a phrase, so that n-gram drafts hit."""
    rng = random.Random(seed)
    made = []
    for index, length in enumerate(lengths()):
        if index % 4 == 0 and length >= 12:
            phrase = [rng.randrange(FIRST_ORDINARY, vocab) for _ in range(rng.randrange(3, 9))]
            made.append((phrase * (length // len(phrase) + 1))[:length])
        else:
            made.append([rng.randrange(FIRST_ORDINARY, vocab) for _ in range(length)])
    return made


def fresh_tokens(rng: random.Random, vocab: int, count: int) -> list[int]:
    return [rng.randrange(FIRST_ORDINARY, vocab) for _ in range(count)]
