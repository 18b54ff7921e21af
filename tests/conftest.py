"""One torch thread a process: tiny tensors gain nothing from more, and spinning threads starve others."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; what tests start inherits it
