"""The lines of metrics.jsonl, given to Weights & Biases and to TensorBoard too, where these are asked for.

metrics.jsonl stays what everything here reads. Both packages are optional; a run that goes on where it was
stopped goes on in the same W&B run, and TensorBoard drops what was logged after its checkpoint.

    pip install wandb tensorboard
    python train.py --fusion late --wandb PROJECT --tensorboard; tensorboard --logdir runs
    WANDB_MODE=offline python train.py --wandb PROJECT              # W&B without a network: OUT/wandb
    pytest tests/training/test_trackers.py
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from files import Refused

Tell = Callable[[Mapping[str, float]], None]


def check_package(name: str) -> None:
    """Refuse a tracker that is not installed, before anything is computed; flag and package share a name."""
    if find_spec(name) is None:
        raise Refused(f"--{name} needs the package {name}: pip install {name}, or leave it out")


def open_trackers(config: Mapping, out: Path, samples: int) -> list[Tell]:
    """Open what a run's config asks for, from `samples` on; each takes a line's numbers, and `samples` in it.

    They close when the program ends.
    """
    tells = []
    if config["wandb"]:
        import wandb

        name = out / "wandb.id"  # of this run folder's run
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        run = wandb.init(
            project=config["wandb"], name=out.name, id=name.read_text(), resume="allow", dir=out,
            config={key: str(value) if isinstance(value, Path) else value for key, value in config.items()},
        )  # fmt: skip
        run.define_metric("*", step_metric="samples")
        tells.append(lambda line: run.log(dict(line)))
    if config["tensorboard"]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=samples + 1, flush_secs=10)

        def tell(line: Mapping[str, float]) -> None:
            for name, value in line.items():
                writer.add_scalar(name, value, line["samples"])

        tells.append(tell)
    return tells
