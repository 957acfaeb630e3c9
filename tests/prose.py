"""English enough for a byte-level tokenizer: the same paragraphs on every machine."""

import random

_SUBJECTS = ("The harbour", "A young clerk", "Every river", "My neighbour", "The old engine")
_VERBS = ("carried", "forgot", "measured", "painted", "followed")
_OBJECTS = ("a letter from the coast", "the price of bread", "seven grey stones", "his own map")
_ENDS = ("before the rain", "without a word", "until the lamps were lit", "in the year of the fair")


def paragraphs(count: int, seed: int = 0) -> str:
    """`count` paragraphs of five numbered sentences, about 320 characters each."""
    draw = random.Random(seed).choice
    return "\n\n".join(
        " ".join(
            f"{draw(_SUBJECTS)} {draw(_VERBS)} {draw(_OBJECTS)} {draw(_ENDS)}, as page "
            f"{5 * paragraph + sentence} tells."
            for sentence in range(5)
        )
        for paragraph in range(count)
    )
