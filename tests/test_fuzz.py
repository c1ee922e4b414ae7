"""Situations drawn at random: what comes is equal to the plain model and exact, or refused by name.

``tests/situations.py`` holds the choices, says which of them are wrong, and has the plain model.
``pytest tests/test_fuzz.py`` plays a hundred situations, ``pytest -m fuzz`` a thousand others. Both
print how many were equal, and how many were refused for which words.
"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, seed, settings
from situations import FAMILIES, Situation, play, situations

ROUNDS = 10


def play_many(number, families, examples, record_property):
    """Play situations, print the counts, and give the distinct ones."""
    seen: dict[Situation, str] = {}

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(situations(families))
    def each(situation):
        if situation not in seen:
            seen[situation] = play(situation)

    each()
    counts = Counter(seen.values())
    equal = counts.pop("equal")
    refused = ", ".join(f"{n} {words.split('|')[0]}" for words, n in counts.most_common())
    record_property("counts", f"{len(seen)} situations: {equal} equal; refused {refused}")
    assert equal >= 0.3 * len(seen) and counts.total() >= 0.1 * len(seen)
    return set(seen)


def test_a_hundred_situations(record_property):
    assert len(play_many(0, ("llama", "gpt2", "gemma2"), 140, record_property)) >= 100


PLAYED: set[Situation] = set()


@pytest.mark.fuzz
@pytest.mark.parametrize("number", range(1, ROUNDS + 1))
def test_a_thousand_situations(number, record_property):
    PLAYED.update(play_many(number, FAMILIES, 140, record_property))
    assert len(PLAYED) >= 100 * number or number < ROUNDS
