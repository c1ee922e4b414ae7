"""``python -m tensorlens_tl.support``: see ``table``."""

import sys

from .table import main

sys.exit(main())
