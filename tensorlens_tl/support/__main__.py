"""``python -m tensorlens_tl.support``: see :mod:`tensorlens_tl.support.table`."""

import sys

import torch

from .table import main

torch.set_num_threads(1)  # in a tiny model, threads wait for each other longer than they compute
sys.exit(main())
