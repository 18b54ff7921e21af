"""Load checkpoints of this project's in lerobot, and compare the chunks of actions: run by hand.

One of each kind is trained for two steps: from a preset, with a memory (lerobot knows none, so it is off
here), with an average of the weights, and on that preset's weights with what is frozen held in bfloat16.
Each is then loaded by lerobot's own classes, from inside its folder: `vlm_model_name` is relative.

    .venv/bin/python tests/in_lerobot.py make /tmp/kinds          # in this project's environment
    LEROBOT/bin/python tests/in_lerobot.py check /tmp/kinds       # where lerobot 0.6.1 is, `smolvla` extra

Exit code 1 where a chunk differs by more than 1e-5, of actions whose scale is 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "lerobot_v3" / "L_image" / "dataset"
TASK = "put the bowl on the plate"
KINDS = {
    "preset": ["--fusion", "none"],
    "memory": ["--fusion", "late", "prefix_cross", "--future", "2", "--world-dim", "16"],
    "average": ["--fusion", "none", "--ema", "0.9"],
    "bfloat16": ["--init", "{preset}", "--freeze", "expert", "--dtype", "bfloat16"],
}
CLOSE = 1e-5


def make(home: Path) -> None:
    """Train one of each kind, and save beside it what it is shown and what it answers."""
    from arm import load_arm

    g = torch.Generator().manual_seed(0)
    for kind, flags in KINDS.items():
        given = [flag.format(preset=home / "preset") for flag in flags]
        command = [sys.executable, "train.py", "--data", DATA, "--out", home / kind, "--total-samples", "16"]
        command += ["--batch-size", "8", *given]
        command += [] if "--freeze" in flags else ["--freeze", "none"]
        subprocess.run(command, cwd=ROOT, check=True)
        arm, processor = load_arm(home / kind / "last")
        c = arm.policy.eval().config
        pictures = torch.randint(256, (len(c.cameras), 2, 3, 64, 64), generator=g, dtype=torch.uint8)
        batch = dict(zip(c.cameras, pictures.unbind()))
        batch |= {"observation.state": torch.randn(2, c.state_dim, generator=g)}
        noise = torch.randn(2, c.chunk_size, c.max_action_dim, generator=g)
        chunk = arm.act(processor(batch | {"task": [TASK, TASK]}), noise, "off")
        answer = {"noise": noise, "chunk": chunk, "actions": processor.unnormalise(chunk)}
        save_file({n: x.contiguous() for n, x in (batch | answer).items()}, home / f"{kind}.safetensors")


def check(home: Path) -> bool:
    """Load each in lerobot, print how far its chunks are off, and say whether all agree."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    worst = 0.0
    for kind in KINDS:
        folder, known = home / kind / "last", load_file(home / f"{kind}.safetensors")
        os.chdir(folder)
        policy = SmolVLAPolicy.from_pretrained(folder).eval()
        device = {"device_processor": {"device": "cpu"}}
        pre, post = make_pre_post_processors(
            policy.config, str(folder), preprocessor_overrides=device, postprocessor_overrides=device
        )
        batch = {name: x for name, x in known.items() if name.startswith("observation.")}
        batch = {name: x.float() / 255 if x.dtype == torch.uint8 else x for name, x in batch.items()}
        chunk = policy.predict_action_chunk(pre(batch | {"task": [TASK, TASK]}), noise=known["noise"])
        off = {"chunk": chunk, "actions": post(chunk.clone())}
        off = {name: float((x - known[name]).abs().max()) for name, x in off.items()}
        dtypes = sorted({str(p.dtype) for p in policy.parameters()})
        print(f"{kind:10s} chunk off by {off['chunk']:.1e}, actions by {off['actions']:.1e}, in {dtypes}")
        worst = max(worst, off["chunk"])
    return worst <= CLOSE


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    what, home = sys.argv[1], Path(sys.argv[2]).resolve()
    sys.exit(make(home) if what == "make" else not check(home))
