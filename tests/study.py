"""Writes run folders as train.py and eval.py leave them: real formats, made-up numbers.

    python tests/study.py /tmp/study     # 30 arms, 3 seeds, 2 budgets, 2 suites of 10 tasks, pictures, videos

Nothing is trained and no number means anything.
"""

import json
import math
import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image

FUTURE = 4
SITES = ("late", "suffix_in", "prefix_tokens", "prefix_cross")
GATES = {"late": "world_gate", "suffix_in": "world_gate_suffix_in", "prefix_tokens": "world_gate_prefix"}
VERSIONS = {"mujoco": "3.3.2", "robosuite": "1.4.0"}


def config_of(arm: str, seed: int, site: str | None, budget: int | None, hypotheses: int = 1) -> dict:
    config = {"arm": arm, "seed": seed, "fusion": [site or "none"], "memory": "pred", "blind": False}
    config |= {"total_samples": budget, "data_fingerprint": None if budget is None else "8abb7b81b9b16429"}
    config |= {"num_hypotheses": hypotheses, "lr": 1e-3, "params_total": 1955105, "params_trainable": 1692577}
    return config | {"flops_per_sample": 3.25e9}


def log_lines(config: dict, count: int = 25) -> list[dict]:
    """Return lines of metrics.jsonl with every key that train.py may log."""
    rng, site = np.random.default_rng(config["seed"]), config["fusion"][0]
    lines = []
    for i in range(1, count + 1):
        samples, action = config["total_samples"] * i // count, float(math.exp(-i / 9) + 0.1 * rng.random())
        line = {"samples": samples, "step": i, "action_loss": action, "loss": action, "lr": 1e-3}
        if site != "none":
            line |= {
                "loss": action + 0.2,
                "world_cos": 0.8 * i / count,
                GATES.get(site, f"world_gate_{site}"): i / 99,
            }
            line |= {f"world_cos_k{k}": 0.9 - 0.1 * k for k in range(1, FUTURE + 1)}
            line |= {"world_cos_mean_change": 0.1, "world_cos_linear": -0.2}
            found = {
                "attn_entropy": 0.9,
                "attn_entropy_step": 0.8,
                "attn_pmax": 0.2,
                "ctx_norm": 0.3 * i,
                "act_norm": 40.0,
            }
            if config["num_hypotheses"] > 1:
                found |= {"attn_entropy_hyp": 0.7, "spike": 0.3, "choose_best": 0.4}
                line |= {"usage_ppl": 2.8, "dead": 0, "div_cos": 0.7, "oracle_gap": 0.1}
                line |= {"oracle_gap_excess": 0.05, "world_cos_best": 0.9 * i / count}
            line |= {f"{site}/{key}": value for key, value in found.items()}
        lines.append(line)
        if i % 5 == 0:
            modes = ("off", "pred", "zero", "oracle") if site != "none" else ("off",)
            lines.append(
                {"samples": samples, "step": i} | {f"val_loss_{m}": action + 0.01 * len(m) for m in modes}
            )
    return lines


def offline_line(fingerprint: str = "8abb7b81b9b16429") -> dict:
    """Return a line of offline.jsonl."""
    modes = {
        "off": {"loss": 0.37, "interval": [0.34, 0.40], "from_off": 0.0, "from_off_interval": [0.0, 0.0]}
    }
    for mode, change in {"pred": -0.04, "zero": 0.01, "oracle": -0.03}.items():
        modes[mode] = {"loss": 0.37 + change, "interval": [0.33 + change, 0.41 + change], "from_off": change}
        modes[mode] |= {"from_off_interval": [change - 0.02, change + 0.02], "episodes": [0.3, 0.4]}
    return {
        "checkpoint": "step_000100",
        "data": "data/demo",
        "fingerprint": fingerprint,
        "episodes": [7, 8],
        "modes": modes,
    }


def episode_lines(
    modes: dict[str, float], suites: tuple[str, ...], tasks: int, states: int, seed: int, checkpoint: str
) -> list[dict]:
    """Return lines of episodes.jsonl; modes: memory mode -> rate of success."""
    rng, lines = np.random.default_rng([seed, len(checkpoint)]), []
    for mode, rate in modes.items():
        for suite in suites:
            protocol = {
                "suite": suite,
                "max_steps": 280,
                "control_hz": 20,
                "draw": "fast",
                "versions": VERSIONS,
            }
            for task, state in np.ndindex(tasks, states):
                line = {
                    "suite": suite,
                    "task_id": task,
                    "task": f"put bowl {task} on the plate",
                    "init_state": state,
                }
                line |= {"success": bool(rng.random() < rate), "crash": None, "steps": 100 + state, "seed": 7}
                lines.append(line | {"memory": mode, "checkpoint": checkpoint, "protocol": protocol})
    return lines


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, config: dict, episodes: list[dict], offline: tuple[dict, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "episodes.jsonl", episodes)
    if config["total_samples"] is not None:
        write_lines(folder / "metrics.jsonl", log_lines(config))
    if offline:
        write_lines(folder / "offline.jsonl", list(offline))
    return folder


def write_picture(path: Path, width: int = 320, height: int = 200, seed: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 40 * seed % 255)], -1)
    Image.fromarray(picture.astype(np.uint8)).save(path)


def write_video(path: Path, frames: int = 10) -> None:
    path.parent.mkdir(exist_ok=True)
    with av.open(path, "w") as file:
        stream = file.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for i in range(frames):
            picture = np.full((128, 128, 3), 20 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def write_study(
    root: Path,
    arms: int = 30,
    seeds: int = 3,
    budgets: tuple[int, ...] = (64_000, 256_000),
    suites: tuple[str, ...] = ("libero_goal", "libero_object"),
    tasks: int = 10,
    states: int = 3,
) -> Path:
    """Write a study: E0, E1, E2 and banks with long names, two checkpoints a run, one from elsewhere."""
    for budget in budgets:
        for i in range(arms):
            site = SITES[i % 4] if i else None
            name = f"E{i}" if i < 3 else f"bank-{site}-ensemble-softmin-{i}"
            modes = {"pred": 0.3 + 0.02 * i, "off": 0.3, "shuffle": 0.3, "zero": 0.25, "gate:0.5": 0.3}
            modes = modes if site else {"off": 0.35}
            for seed in range(seeds):
                config = config_of(name, seed, site, budget, 1 if i < 3 else 4)
                early, late = (
                    episode_lines(modes, suites, tasks, states, 100 * seed + i, checkpoint)
                    for checkpoint in ("step_000050", "step_000100")
                )
                early = [
                    line | {"samples": budget // 2} for line in early if line["memory"] in ("pred", "off")
                ]
                folder = root / f"{name}-n{budget}-s{seed}"
                write_run(folder, config, early + late, (offline_line(),) if site and seed == 0 else ())
                if site and seed == 0:
                    stem = f"step_000100-pred-{suites[0]}-task1-init"
                    for state in range(3):
                        write_picture(folder / "imagined" / f"{stem}{state}.png", 657, 900, state)
                        write_picture(folder / "imagined" / f"{stem}{state}_d000.png")
                        verdict = ("success", "failure")[state % 2]
                        write_picture(folder / "videos" / f"{stem}{state}-{verdict}.png", 640, 96, state)
                        write_video(folder / "videos" / f"{stem}{state}-{verdict}.mp4")
    other = config_of("smolvla_libero", 0, None, None)
    write_run(
        root / "smolvla_libero",
        other,
        episode_lines({"off": 0.8}, suites, tasks, states, 5, "smolvla_libero"),
    )
    return root


if __name__ == "__main__":
    print(write_study(Path(sys.argv[1])))
