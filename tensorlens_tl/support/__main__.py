"""``python -m tensorlens_tl.support``: see :mod:`tensorlens_tl.support.table`."""

import sys

from .table import main

sys.exit(main())
