"""``python -m tensorlens_tl``, the command line ``tensorlens-tl``: see ``tensorlens_tl.cli``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
