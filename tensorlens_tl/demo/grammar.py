"""The grammar that all of the demo model's text comes from, and its held-out combinations.

A document is a list of words; it names the positions that answer a task and the combinations it
holds. A combination is held out by a stable hash of its parts, so it never depends on a seed.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from itertools import combinations

from .facts import COUNTRIES, LEADS, PHRASINGS

TASKS = ("ioi", "induction", "facts", "agreement", "greater_than")
PUNCTUATION = (".", ",", "?", "!", ";", ":")
TWO_DIGITS = tuple(f"{i:02d}" for i in range(100))
EARLIEST = "02"


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _split("""
Mary John Anna Paul Tom Lucy Peter Sarah David Emma James Laura Mark Julia Adam Alice Simon Nina
Henry Clara Martin Rosa Oscar Helen George Maria Victor Elena Hugo Diana Felix Irene Leo Sofia Max
Vera Ben Ruth Sam Jane Jack Kate Luke Amy Daniel Grace Robert Emily Thomas Susan William Linda
Edward Carol Frank Nora Arthur Olga Walter Ida
""")
PLACES = _split("""
store park school market garden library station beach office church museum restaurant hospital
farm river hotel kitchen theater village harbor
""")
OBJECTS = _split("""
drink ball key letter ring cake flower map apple hat coin pen toy lamp gift ticket basket cup
shirt phone
""")
ADJECTIVES = _split("""
small red old new big blue heavy green little round golden strange beautiful cheap young tall
quiet happy kind clever
""")
GIVING = ("gave", "handed", "passed", "offered", "showed", "brought")
NOUNS = _split("""
key cabinet dog boy girl cat teacher farmer doctor horse bird house tree car boat table chair door
window picture letter book student king queen soldier painter lawyer singer baker driver stone
flower lamp
""")
SEEING = ("saw", "met", "liked", "found", "painted", "followed", "heard", "watched")
NEAR = ("near", "behind", "beside", "under", "above", "by", "with")
EVENTS = _split("""
war siege trial voyage project strike festival drought debate plague journey expedition alliance
campaign reign famine rebellion tour peace storm
""")
VERBS = _split("""
run walk sing sleep jump play laugh work wait talk eat dance swim read write smile cry fall grow
fly
""")
STATES = _split("""
happy old new quiet clever red big here there lost ready strange beautiful cheap broken green
tired late alone
""")

# {0} is the place, {1} the list of two or three names: "Mary and John", "Mary, John and Anna".
OPENINGS = (
    "When {1} went to the {0} ,",
    "After {1} came to the {0} ,",
    "While {1} were at the {0} ,",
    "As {1} walked around the {0} ,",
    "Then {1} went to the {0} and",
    "{1} had a good day at the {0} .",
    "{1} sat down near the {0} and then",
    "The {0} was open when {1} came in , so",
    "At the {0} there were {1} , and",
    "Yesterday {1} worked at the {0} until",
)
# {0} is a noun, {1} a name that has no part in the giving.
ASIDES = (
    "",
    "",
    "quickly",
    "then",
    "smiled and",
    "took a step and",
    "looked at the {0} and",
    "walked past the {0} and",
    "went to find a friend and",
    "said hello to everyone there and",
    "stood for a long time under the {0} and",
)
NAMED_ASIDES = (
    "saw {1} and",
    "said hello to {1} and",
    "looked at {1} and",
    ", a friend of {1} ,",
    "opened the {0} of {1} and",
    "walked past the {0} of {1} and",
    "read a letter from {1} and",
    "talked for an hour about {1} and",
    "stood for a long time behind {1} and",
)
BEFORE = (
    "{1} was tired .",
    "It was the birthday of {1} .",
    "The {0} of {1} was old .",
    "{1} slept at home .",
    "{1} and {2} stayed at home .",
    "The day before , {1} saw {2} .",
)
SPANS = (
    "The {0} lasted from {1} {2} to {1}",
    "The {0} began in {1} {2} and ended in {1}",
    "The {0} went on from the year {1} {2} to the year {1}",
    "The {0} started in {1} {2} and was over in {1}",
    "It is known that the {0} lasted from {1} {2} to {1}",
)
FILLERS = (
    "The {adjective} {noun} was {near} the {other} .",
    "The {nouns} {verb} in the {place} .",
    "The {noun} {verbs} {near} the {other} .",
    "{name} likes the {adjective} {object} .",
    "{name} wants to buy a {adjective} {object} .",
    "Every morning {name} walked to the {place} and bought a {object} .",
    "We saw a {adjective} {noun} in the {place} today .",
    "I think that {name} is at the {place} .",
    "Is the {noun} {near} the {place} ? Yes , it is .",
    "Where is the {object} ? It is under the {noun} .",
    "Do you like this {object} ? No , I do not .",
    "She put the {object} on the {noun} and went home .",
    "He does not know where the {place} is .",
    "My {noun} is {state} and your {noun} is {adjective} .",
    "Some {nouns} are {state} ; most {nouns} are not .",
    "The {nouns} were {state} , but {name} was not .",
    "They have two {nouns} and one {object} .",
    "What a {adjective} {noun} !",
    "There is no {object} in the {place} .",
    "One day a {noun} lived in a {adjective} house with three {nouns} .",
    "You can see the {nouns} from here .",
    "In the evening the {noun} sat down and ate an apple .",
    "All of the {nouns} {verb} at night .",
    "This {noun} has a {object} , and that {noun} has no {object} .",
    "Her {object} was under his {noun} for many years .",
)


@dataclass(frozen=True)
class Document:
    """One document of the grammar.

    Attributes:
        task: One of :data:`TASKS`, or "filler".
        words: Words of the document, one token each; a year is two words.
        answers: Positions in ``words`` that answer the task.
        keys: Combinations in the document, for :func:`held_out`.
        core: Number of leading ``keys`` that are held out in a held-out prompt.
        corrupted: Words of the corrupted prompt: all up to the first answer, one word changed.
        foil: Wrong answer to compare with.
    """

    task: str
    words: tuple[str, ...]
    answers: tuple[int, ...] = ()
    keys: tuple[tuple[str, ...], ...] = ()
    core: int = 0
    corrupted: tuple[str, ...] = ()
    foil: str = ""


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("|".join(parts).encode(), digest_size=4).digest(), "big")


def held_out(kind: str, *parts: str) -> bool:
    """Tell whether a combination never occurs in the training stream.

    Args:
        kind: Kind of combination: "names" (two names, in any order), "place" (opening, place),
            "words" (two neighbouring words of an induction row), "facts" (relation, country,
            index of the phrasing), "nouns" (subject, attractor) or "years" (event, first year's
            ending).
        parts: Words that are combined.

    Returns:
        True for two of the eight phrasings of every fact, and for a tenth of all else. Never true
        for the earliest year, with which corrupted prompts start.
    """
    if kind == "facts":
        phrasings = len(PHRASINGS[parts[0]])
        return (int(parts[2]) - _hash(kind, *parts[:2])) % phrasings < 2
    if kind == "years" and parts[1] == EARLIEST:
        return False
    return _hash(kind, *(sorted(parts) if kind == "names" else parts)) % 10 == 0


def text(words: list[str] | tuple[str, ...]) -> str:
    """Join words as the tokenizer's decoder does.

    Args:
        words: Words of a document.

    Returns:
        The text, no space before punctuation or inside a year.
    """
    return re.sub(r" (?=[.,?!;:])|(?<=\b\d\d) (?=\d\d\b)", "", " ".join(words))


def plural(noun: str) -> str:
    """Return the plural of one of ``NOUNS``."""
    return noun + "s"


def _listed(names: list[str]) -> str:
    return " , ".join(names[:-1]) + " and " + names[-1]


def _ioi(rng: random.Random) -> Document:
    count = 3 if rng.random() < 0.3 else 2
    names = rng.sample(NAMES, count + 3)
    group, (other, third, fourth) = names[:count], names[count:]
    place, opening = rng.choice(PLACES), rng.randrange(len(OPENINGS))
    noun = rng.choice(NOUNS)
    before = ""
    if rng.random() < 0.3:
        before = rng.choice(BEFORE).format(noun, third, fourth)
    listed = rng.sample(group, count)
    indirect, *subjects = group
    start = f"{before} {OPENINGS[opening].format(place, _listed(listed))}".split()
    who = _listed(subjects) if count > 2 else subjects[0]
    aside = rng.choice(NAMED_ASIDES if rng.random() < 0.2 else ASIDES).format(noun, other)
    middle = f"{aside} {rng.choice(GIVING)} {_thing(rng)} to".split()
    words = [*start, *who.split(), *middle]
    answers, end = [len(words)], len(words)
    corrupted = list(words)
    corrupted[len(start)] = indirect
    words += [indirect, "."]
    if count == 2 and rng.random() < 0.3:
        again = rng.choice(ASIDES).format(noun)
        words += f"Then {indirect} {again} {rng.choice(GIVING)} {_thing(rng)} to".split()
        answers.append(len(words))
        words += [subjects[0], "."]
    used = [name for name in NAMES if name in words]
    pairs = [("names", indirect, s) for s in subjects]
    keys = [*pairs[:1], ("place", str(opening), place), *pairs[1:]]
    keys += [("names", *pair) for pair in combinations(used, 2)]
    return Document(
        "ioi", tuple(words), tuple(answers), tuple(keys), 2, tuple(corrupted[:end]), subjects[0]
    )


def _thing(rng: random.Random) -> str:
    adjective = rng.choice(ADJECTIVES) if rng.random() < 0.3 else ""
    return f"{rng.choice(('a', 'the'))} {adjective} {rng.choice(OBJECTS)}"


def _facts(rng: random.Random) -> Document:
    relation = rng.choice(tuple(PHRASINGS))
    index = rng.randrange(len(PHRASINGS[relation]))
    country, other = rng.sample(tuple(COUNTRIES), 2)
    lead = rng.choice(LEADS) if rng.random() < 0.5 else ""
    phrase = f"{lead} {PHRASINGS[relation][index]}"
    answer, foil = COUNTRIES[country][relation], COUNTRIES[other][relation]
    if answer == foil:
        return _facts(rng)
    words = phrase.format(country).split()
    corrupted = tuple(phrase.format(other).split())
    keys = (("facts", relation, country, str(index)),)
    return Document("facts", (*words, answer, "."), (len(words),), keys, 1, corrupted, foil)


def _agreement(rng: random.Random) -> Document:
    subject, attractor = rng.sample(NOUNS, 2)
    many, other = rng.random() < 0.5, rng.random() < 0.5
    lead, one, more = rng.choice(
        (("The", "is", "are"), ("Today the", "is", "are"), ("Yesterday the", "was", "were"))
    )
    adjective = rng.choice(ADJECTIVES) if rng.random() < 0.3 else ""
    link = (
        f"that the {{}} {rng.choice(SEEING)}"
        if rng.random() < 0.3
        else f"{rng.choice(NEAR)} the {{}}"
    )
    link = link.format(plural(attractor) if other else attractor)
    forms = (plural(subject), subject) if many else (subject, plural(subject))
    words, corrupted = (tuple(f"{lead} {adjective} {form} {link}".split()) for form in forms)
    answer, foil = (more, one) if many else (one, more)
    keys = (("nouns", subject, attractor),)
    end = (answer, rng.choice(STATES), ".")
    return Document("agreement", (*words, *end), (len(words),), keys, 1, corrupted, foil)


def _greater_than(rng: random.Random) -> Document:
    event, year, century = rng.choice(EVENTS), rng.randrange(2, 99), str(rng.randrange(11, 20))
    span = rng.choice(SPANS)
    words, corrupted = (
        tuple(span.format(event, century, start).split()) for start in (TWO_DIGITS[year], EARLIEST)
    )
    answer = TWO_DIGITS[rng.randrange(year + 1, 100)]
    foil = TWO_DIGITS[rng.randrange(min(3, year), year + 1)]
    keys = (("years", event, TWO_DIGITS[year]),)
    return Document("greater_than", (*words, answer, "."), (len(words),), keys, 1, corrupted, foil)


def _filler(rng: random.Random) -> Document:
    noun, other = rng.sample(NOUNS, 2)
    verb = rng.choice(VERBS)
    sentence = rng.choice(FILLERS).format(
        adjective=rng.choice(ADJECTIVES),
        noun=noun,
        other=other,
        nouns=plural(other),
        near=rng.choice(NEAR),
        place=rng.choice(PLACES),
        name=rng.choice(NAMES),
        object=rng.choice(OBJECTS),
        verb=verb,
        verbs={"cry": "cries", "fly": "flies"}.get(verb, verb + "s"),
        state=rng.choice(STATES),
    )
    return Document("filler", tuple(sentence.split()))


def segment(rng: random.Random, length: int, unseen: bool = False) -> list[str]:
    """Draw random words, no word twice.

    Args:
        rng: The source of randomness.
        length: Number of words.
        unseen: Whether all neighbours are held-out combinations, instead of none.

    Returns:
        The drawn words.
    """
    words = [rng.choice(WORDS)]
    while len(words) < length:
        word = rng.choice(WORDS)
        if word not in words and held_out("words", words[-1], word) == unseen:
            words.append(word)
    return words


def induction(rng: random.Random, length: int) -> Document:
    """Draw a held-out induction document: a segment of random words and its repetition.

    Args:
        rng: The source of randomness.
        length: Number of words in the segment.

    Returns:
        A document whose answers are the words of the repetition, from the second on. In the
        corrupted prompt, the word of the first segment that answers the last position is another.
    """
    while True:
        words = segment(rng, length, unseen=True)
        foil = rng.choice(WORDS)
        if foil not in words:
            break
    corrupted = [*words[:-1], foil, *words[:-1]]
    return Document(
        "induction",
        (*words, *words),
        tuple(range(length + 1, 2 * length)),
        (("words", words[-2], words[-1]),),
        1,
        tuple(corrupted),
        foil,
    )


_GENERATORS = {
    "ioi": _ioi,
    "facts": _facts,
    "agreement": _agreement,
    "greater_than": _greater_than,
    "filler": _filler,
}


def document(task: str, rng: random.Random, unseen: bool = False) -> Document:
    """Draw a document.

    Args:
        task: Name of the task: "ioi", "facts", "agreement", "greater_than" or "filler".
        rng: The source of randomness.
        unseen: Whether all leading combinations of the document are held out, instead of none of
            its combinations.

    Returns:
        The drawn document.
    """
    while True:
        drawn = _GENERATORS[task](rng)
        held = [held_out(*key) for key in drawn.keys]
        if all(held[: drawn.core]) if unseen else not any(held):
            return drawn


def _vocabulary() -> list[str]:
    sources = [*OPENINGS, *ASIDES, *NAMED_ASIDES, *BEFORE, *SPANS, *FILLERS, *LEADS]
    sources += [phrasing for phrasings in PHRASINGS.values() for phrasing in phrasings]
    sources += ["that The the a is are was were Today Yesterday Then and to hello please thank"]
    sources += [*NAMES, *PLACES, *OBJECTS, *ADJECTIVES, *GIVING, *NOUNS, *map(plural, NOUNS)]
    sources += [*SEEING, *NEAR, *EVENTS, *VERBS, "cries flies", *(v + "s" for v in VERBS), *STATES]
    sources += [" ".join((country, *row.values())) for country, row in COUNTRIES.items()]
    found = {word for source in sources for word in source.split() if word.isalpha()}
    return sorted(found - {"crys", "flys"})


WORDS = _vocabulary()
