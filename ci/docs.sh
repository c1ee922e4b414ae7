#!/usr/bin/env bash
# Builds the documentation into docs/_build/html, executes its examples, and checks its links.
# Needs the extra "docs": pip install -c constraints.txt -e ".[docs]"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
sphinx-build -n -W --keep-going -q -j "${JOBS:-2}" -b html docs docs/_build/html
python docs/check.py docs/_build/html
