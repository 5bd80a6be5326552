"""Set before any test module imports torch: idle OpenMP threads sleep, one thread per operation."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
