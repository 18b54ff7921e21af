"""One torch thread a process: tiny tensors gain nothing from more, and spinning threads starve others."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])  # `python -m report` from any folder
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; what tests start inherits it

# A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that; tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("shared", deadline=None)  # a busy machine is slow now and then
settings.load_profile("shared")


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint beside its language model."""
    import tiny  # imports torch

    for name in ("checkpoint", "vlm"):
        shutil.copytree(tiny.golden() / name, tmp_path / name)
    return tmp_path / "checkpoint"
