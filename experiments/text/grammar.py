"""Sentences about films, praise or blame, in which no single word decides: negations and conjunctions do."""

import numpy as np

PRAISE = ("good", "great", "clever", "moving", "funny", "charming")
BLAME = ("bad", "dull", "clumsy", "boring", "silly", "weak")
SUBJECTS = ("film", "plot", "cast", "ending", "music", "script")
DEGREES = ("very", "really", "quite")
NEGATIONS = ("not", "never", "hardly")
PADDING = "·"
WORDS = (PADDING, *PRAISE, *BLAME, *SUBJECTS, *DEGREES, *NEGATIONS, "the", "was", "but", "though")
LENGTH = 13
"""Words of the longest sentence; shorter ones are filled up."""


def sentences(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Different sentences as indices of `WORDS`, `(count, LENGTH)`, and labels `(count, 1)`: 1 for praise.

    Of two clauses the one after "but", or before "though", decides.
    """
    random, found = np.random.default_rng(seed), dict[tuple[str, ...], bool]()
    while len(found) < count:
        words, praise = _clause(random)
        if random.random() < 0.6:
            more, other = _clause(random)
            join = str(random.choice(("but", "though")))
            words, praise = (*words, join, *more), other if join == "but" else praise
        found[words] = praise
    place = {word: i for i, word in enumerate(WORDS)}
    tokens = [[place[word] for word in (*words, *[PADDING] * (LENGTH - len(words)))] for words in found]
    return np.array(tokens, "int32"), np.array(list(found.values()), "float32")[:, None]


def spelled(tokens: np.ndarray) -> list[str]:
    """The words of a sentence `(LENGTH,)`, without the filling."""
    return [WORDS[token] for token in tokens if token]


def _clause(random: np.random.Generator) -> tuple[tuple[str, ...], bool]:
    praise, negated, degreed = (random.random(3) < 0.5).tolist()
    adjective = str(random.choice(PRAISE if praise else BLAME))
    degree = [str(random.choice(DEGREES))] * degreed
    negation = [str(random.choice(NEGATIONS))] * negated
    return ("the", str(random.choice(SUBJECTS)), "was", *negation, *degree, adjective), praise != negated
