"""Write the demo model's card from its measured figures."""

_LABELS = {
    "ioi": "indirect object, unseen names and opening × place",
    "ioi_difference": "indirect object, mean logit difference to the subject",
    "induction_10": "induction, 10 random words repeated",
    "induction_25": "induction, 25 random words repeated",
    "facts": "facts, held-out phrasing × country",
    "agreement": "agreement, held-out subject × attractor",
    "agreement_mismatched": "agreement, attractor of the other number",
    "greater_than": "greater-than: mass above minus mass not above",
}


def card(metrics: dict) -> str:
    """Write the card.

    Args:
        metrics: What ``evaluate`` measured.

    Returns:
        Markdown whose figures are all taken from ``metrics``.
    """
    figures, bars = metrics["tasks"], metrics["bars"]
    training = metrics["training"]
    steps = sum(training["steps"])
    rows = "\n".join(
        f"| {_LABELS[key]} | {figures[key]:.4f} | {bar} |" for key, bar in bars.items()
    )
    return f"""# The tensorlens_tl demo model

A GPT-2 of {metrics["shape"]} and {metrics["parameters"]:,} parameters, trained by this project on
text from a grammar of its own (`tensorlens_tl/demo/grammar.py`), for tutorials, tests and as a
ground truth for circuits. It contains no third-party text and no third-party weights.

**What it is not.** It is no language model of English: it knows {metrics["words"]} words of a
made-up grammar, {metrics["tokens"]} tokens in all, and at most {metrics["n_ctx"]} tokens at a time.
Any other word is `<unk>` to it, and off its grammar its predictions mean nothing. Its facts are a
small table ({metrics["countries"]} countries, one capital, language and currency each, the Americas
as one continent); do not look anything up in it.

## Tasks

Every figure: {metrics["prompts"]} prompts a task (seed {metrics["seed"]}), held-out combinations
only, the most likely token of the whole vocabulary.

| task | measured | bar |
|---|---|---|
{rows}

"When Mary and John went to the store, John gave a drink to" → Mary; "The keys near the cabinet" →
are; "The capital of France is" → Paris; "The war lasted from 1732 to 17" → above 32.

## Induction

{_induction(metrics["circuits"]["induction"])}

## Indirect object

{_indirect(metrics["circuits"]["indirect_object"])}

`metrics.json` holds all of these figures, for every head.

## Make it again

`python -m tensorlens_tl.demo.train --out FOLDER` trains it from nothing: {steps:,} steps,
{training["tokens"] / 1e6:.1f} million tokens, on one CPU thread ({training["seconds"] / 60:.0f}
minutes where this one was trained, seed {training["seed"]}, torch {training["torch"]}).
`python -m tensorlens_tl.demo.evaluate --model FOLDER` measures it and writes this card.
"""


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{head} {value:.2f}" for head, value in scores.items()) or "none"


def _induction(found: dict) -> str:
    lines = [
        "Attention in repeated segments of 25 random words; a head is named from 0.4 on. "
        "Ablated, a\n"
        "head gives its mean over all tokens instead of its output. Accuracy of the whole model:\n"
        f"{found['accuracy']:.3f}.",
        "",
        "| kind | heads, by attention | accuracy without each | without all of them |",
        "|---|---|---|---|",
    ]
    for kind, looks in (
        ("previous_token", "previous token"),
        ("induction", "induction: the token after the same word's first mention"),
        ("duplicate_token", "duplicate token: the same word's first mention"),
    ):
        part = found[kind]
        heads = {head: part["scores"][head] for head in part["heads"]}
        each = _scores(part["accuracy_without_each"])
        without = f"{part['accuracy_without_all']:.3f}" if heads else "–"
        lines.append(f"| {looks} | {_scores(heads)} | {each} | {without} |")
    lowest = found["lowest_accuracy_without_another_head"]
    lines += ["", f"Without any one of the other heads, accuracy is at least {lowest:.3f}."]
    return "\n".join(lines)


def _indirect(found: dict) -> str:
    movers, carriers = found["heads"]["name_movers"], found["heads"]["repeated_name"]
    rows = [
        "| head | end → indirect object | end → subject, first | end → repeated name |"
        " direct effect | patched | difference without |",
        "|---|---|---|---|---|---|---|",
    ]
    for head, to in found["attention"].items():
        direct, patch = found["direct_effect"][head], found["patch_head"][head]
        if max(abs(direct) / found["difference"], abs(patch)) > 0.1 or head in movers:
            rows.append(
                f"| {head} | {to['end_to_indirect_object']:.2f} | {to['end_to_subject']:.2f} |"
                f" {to['end_to_repeated_name']:.2f} | {direct:.2f} | {patch:.2f} |"
                f" {found['difference_without'][head]:.2f} |"
            )
    table = "\n".join(rows)
    whole = found["difference"]
    left = {
        kind: f"{value:.2f}, and accuracy from {found['accuracy']:.3f} to"
        f" {found['accuracy_without_all'][kind]:.3f}"
        for kind, value in found["difference_without_all"].items()
    }
    moving = (
        f"Name movers ({', '.join(movers)}): from the end of the prompt they attend to the indirect"
        " object more than to the subject, and write toward it. Without all of them the logit"
        f" difference goes from {whole:.2f} to {left['name_movers']}."
        if movers
        else "There are no name movers: no head attends from the end of the prompt to the indirect"
        " object much more than to the subject and writes toward it."
    )
    carrying = (
        f"Heads that carry the repeated name to the end ({', '.join(carriers)}): they attend to it"
        " from there, and which name it is decides what they do. Without all of them the"
        f" logit difference goes to {left['repeated_name']}."
        if carriers
        else "No head attends from the end to the repeated name and passes it on."
    )
    both = found["heads"]["both_names"]
    pooling = (
        f"Heads that attend from the end to both names ({', '.join(both)}):"
        " without all of them the logit difference goes to"
        f" {left['both_names']}."
        if both
        else "No head attends from the end to both names."
    )
    return f"""{moving}

{carrying}

{pooling}

The mean logit difference is {whole:.2f}, and {found["difference_corrupted"]:.2f} where the repeated
name is the indirect object's instead. "Patched" is the share of that change which one part makes
when it runs as in the corrupted prompt. The heads with a direct effect of a tenth of the
difference, or a patching effect of a tenth:

{table}

MLPs, patched: {_scores(found["patch_mlp"])}.

The residual stream before each block, patched at the repeated name:
{_scores(found["patch_repeated_name"])}; at the end of the prompt: {_scores(found["patch_end"])}.
What the heads' direct effects leave over of the difference is the MLPs'."""
