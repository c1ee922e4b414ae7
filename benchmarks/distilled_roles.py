"""Whether a student's heads play the teacher's parts: roles that know neither depth nor width.

Patterns say what a head looks at, on rows of random words that come twice:

    previous    the token before
    duplicate   earlier copies of the token
    induction   the tokens after earlier copies

A model's score is that of its best head. The fourth role is read of the operator:

    copying     what heads read at the answer itself, as a share of all that they add to it, Σ|·|
"""

import torch

ROLES = ("previous", "duplicate", "induction", "copying")


def looks(pattern, ids):
    """The scores of every head as previous, duplicate and induction head, [head, 3].

    ``pattern`` is [head, query_pos, key_pos] of the tokens ``ids``.
    """
    n = len(ids)
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    same = ids[:, None] == ids[None]
    duplicate = same & (key < query)
    induction = torch.zeros_like(same)
    induction[:, 1:] = duplicate[:, :-1]  # one after an earlier copy
    found = []
    for looked, counted in (
        (key == query - 1, query[:, 0] > 0),
        (duplicate, duplicate.any(1)),
        (induction, duplicate.any(1)),
    ):
        shares = (pattern * looked).sum(-1)[:, counted]
        found.append(shares.mean(-1) if bool(counted.any()) else torch.zeros(len(pattern)))
    return torch.stack(found, 1)


def copied(lens, answer):
    """What heads add to an answer by reading its own places, as a signed share of Σ|·|."""
    found = lens.attribute(answer, by="head")
    at_answer = total = 0.0
    tokens = lens.capture.prompts.tokens[0].tolist()
    for source, value in zip(found.sources, found.values[0].tolist(), strict=True):
        if source.node.kind == "head" and source.pos is not None:
            total += abs(value)
            at_answer += value if tokens[source.pos] == answer else 0.0
    return at_answer / total if total else 0.0


def roles(lenses, cases):
    """The four roles of a model, by name.

    ``lenses`` are runs of repeated words; ``cases`` are pairs of a run and the id of its answer,
    which stands in the prompt.
    """
    scores = []
    for lens in lenses:
        for prompt, ids in enumerate(lens.capture.prompts.tokens):
            pattern = torch.cat([block.attn.pattern[prompt] for block in lens.capture.blocks])
            scores.append(looks(pattern, ids))
    best = torch.stack(scores).mean(0).amax(0).tolist()
    shares = [copied(lens, answer) for lens, answer in cases]
    return dict(zip(ROLES, [*best, sum(shares) / len(shares)], strict=True))
