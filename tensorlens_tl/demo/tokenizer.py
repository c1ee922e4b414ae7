"""Build the demo model's tokenizer: one token a word, a punctuation mark or two digits."""

import json
from pathlib import Path

from .grammar import PUNCTUATION, TWO_DIGITS, WORDS

UNK, BOS, PAD = "<unk>", "<bos>", "<pad>"
TOKENS = (*PUNCTUATION, *TWO_DIGITS, *WORDS)
IDS = {token: index for index, token in enumerate((UNK, BOS, PAD, *TOKENS))}


def save_tokenizer(folder: Path, n_ctx: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        folder: Existing folder to write into.
        n_ctx: Length of the longest prompt, in tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special = (UNK, BOS, PAD)
    vocabulary = {t if t in special else "Ġ" + t: index for t, index in IDS.items()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[.,?!;:]|\d\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteLevel(),
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[.,?!;:])|(?<=\b\d\d) (?=\d\d\b)"), ""),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "model_max_length": n_ctx,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
