"""Tests of fewstep; on one thread, for which equal bits are promised whatever the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
