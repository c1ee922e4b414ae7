#!/usr/bin/env bash
# The documentation, in docs/_build/html. Needs pip install -c constraints.txt -e ".[docs]".
#
#   1. Build it: every tutorial and example is executed, and every warning is an error.
#   2. Check what was built: links, foreign addresses, names without an entry.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
# 1. Build.
sphinx-build -n -W --keep-going -q -j "${JOBS:-2}" -b html docs docs/_build/html
# 2. Check.
python docs/check.py docs/_build/html
