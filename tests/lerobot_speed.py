"""lerobot's own speed on a checkpoint, for the ratios in the README; needs lerobot 0.6.1, and is no test.

    python -m bench load --checkpoint /tmp/random        # leaves a random checkpoint of full size there
    python tests/lerobot_speed.py /tmp/random            # in an environment that has lerobot

One JSON line a case: a chunk at batch 1, and a training step as lerobot-train takes it (autocast over float32
weights, AdamW, clipped gradients), in float32 and bfloat16; import and load before. Data are random, two
pictures of 512 x 512 and an instruction of 16 tokens, as in bench/speed.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

start = time.perf_counter()
import torch  # noqa: E402
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy  # noqa: E402

imported = time.perf_counter() - start
PROMPT, BATCH = 16, 4


def random_batch(policy: SmolVLAPolicy, batch: int) -> dict:
    config = policy.config
    width = config.resize_imgs_with_padding[0]
    pictures = {name: torch.rand(batch, 3, width, width) for name in config.image_features}
    return pictures | {
        "observation.state": torch.randn(batch, *config.robot_state_feature.shape),
        "observation.language.tokens": torch.randint(49_000, (batch, PROMPT)),
        "observation.language.attention_mask": torch.ones(batch, PROMPT, dtype=torch.bool),
        "action": torch.randn(batch, config.chunk_size, *config.action_feature.shape),
    }


def report(case: str, dtype: str, batch: int, seconds: float) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row = {"case": case, "dtype": dtype, "batch": batch, "seconds": seconds, "per_second": batch / seconds}
    print(json.dumps(row | {"memory_gb": memory, "threads": torch.get_num_threads()}), flush=True)


def fastest(run: Callable[[dict], None], batch: dict, repeats: int) -> float:
    found = []
    for _ in range(repeats + 1):  # the first warms up
        begun = time.perf_counter()
        run(batch)
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def chunk(policy: SmolVLAPolicy, dtype: str, batch: dict) -> None:
    with torch.no_grad(), cast(dtype):
        policy.predict_action_chunk(dict(batch))


def step(policy: SmolVLAPolicy, optimizer: torch.optim.Optimizer, dtype: str, batch: dict) -> None:
    with cast(dtype):
        loss, _ = policy.forward(dict(batch))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 10)
    optimizer.step()
    optimizer.zero_grad()


def cast(dtype: str) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def main(folder: str, repeats: int) -> None:
    os.chdir(folder)  # the checkpoint names its language model by a relative path
    begun = time.perf_counter()
    policy = SmolVLAPolicy.from_pretrained(".")
    print(json.dumps({"case": "import and load", "import": imported, "load": time.perf_counter() - begun}))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-4)
    for dtype in ("float32", "bfloat16"):
        policy.eval()
        seconds = fastest(partial(chunk, policy, dtype), random_batch(policy, 1), repeats)
        report("chunk", dtype, 1, seconds)
        policy.train()
        for size in (BATCH, 4 * BATCH):
            seconds = fastest(partial(step, policy, optimizer, dtype), random_batch(policy, size), repeats)
            report("training step", dtype, size, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    main(options.folder, options.repeats)
