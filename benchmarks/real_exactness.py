"""How exact the operator of SmolLM2 is, from 16 to 2,048 tokens, in float32 and bfloat16.

``python benchmarks/real_exactness.py [--longest 2048] [--model FOLDER]``

1. Run a plain forward pass and a capture of the same tokens.
2. Compare the model's own logits with those of a copy in more digits.
3. Ask for the completeness error, and for an attribution by token.
4. Keep what was found in ``results/real_models.json``; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial

import real_page
import torch

import tensorlens_tl

TEXT = (
    "Once upon a time a fisherman lived with his wife in a little house by the sea. Every morning "
    "he went out to fish, and one day, as he sat and looked into the clear water, his line went "
    "down to the bottom. When he drew it up he had a great fish, and the fish said to him: let me "
    "live, for I am not a real fish, I am a prince under a spell. What good will it do you to kill "
    "me? I would not taste well. Put me back into the water and let me swim away. "
)
LENGTHS = (16, 64, 256, 1024, 2048)
RECOMPUTED = 1024
IN_FLOAT64 = 256


def measured(model, ids, finer):
    pattern = "recomputed" if ids.shape[1] >= RECOMPUTED else "stored"
    with torch.no_grad():
        # 1. A plain pass and a capture.
        plain = model(ids, return_type="logits")
        _, lens = tensorlens_tl.capture(model, ids, pattern=pattern)
        # 2. A copy in more digits.
        floor = None
        if finer is not None:
            exact = finer(ids, return_type="logits").double()
            floor = float((plain.double() - exact).abs().max() / exact.abs().max())
    # 3. Errors.
    found = lens.attribute()
    return {
        "check": lens.capture_check,
        "completeness": lens.completeness_error,
        "attribution": found.completeness_error,
        "floor": floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", help="a folder of the same model, which loads faster")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    def load(dtype):
        if args.model:
            return tensorlens_tl.load_model(args.model, dtype=dtype)
        return tensorlens_tl.models.smollm2(dtype=dtype)

    model = load(torch.float32)
    story = model.to_tokens(TEXT, prepend_bos=False)[0]
    for dtype in (getattr(torch, name) for name in args.dtypes):
        name = str(dtype).split(".")[1]
        here = model if dtype == torch.float32 else load(dtype)
        finest = (
            load(torch.float64) if dtype == torch.float32 and args.shortest <= IN_FLOAT64 else None
        )
        for length in (n for n in LENGTHS if args.shortest <= n <= args.longest):
            first = model.to_tokens("a")[:, :1]
            ids = torch.cat([first, story.repeat(length // len(story) + 1)[None]], 1)[:, :length]
            finer = finest if dtype == torch.float32 else model
            finer = None if dtype == torch.float32 and length > IN_FLOAT64 else finer
            # 4. Kept.
            real_page.kept(f"exactness {name} {length}", partial(measured, here, ids, finer))


if __name__ == "__main__":
    main()
