"""How fast world encoders are, and what their caches save: `python -m bench world`.

Each encoder makes its cache of a small set of smooth random pictures, in gzip as recordings are. Then
its own speed is measured, and how many samples a second the world latents of a batch (T past, K future) come
at: from pictures, read from the files and encoded as they are asked for, and from the cache.

    python -m bench world --size tiny                                   # random weights, no download
    python -m bench world --world-model facebook/vjepa2-vitl-fpc64-256  # a model of a known name or folder

Shapes: B batch, T history, K future, m frames of a clip.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch

from files import read_json
from latents import world
from latents.encoders import WorldConfig, open_backbone, resolved
from readers.demos import Demos
from readers.libero_hdf5 import CAMERAS
from readers.load import load
from smolvla.folders import find_folder
from training.start import StartConfig, own_policy

SIDE, EPISODES, FRAMES = 128, 2, 48
BATCH, HISTORY, FUTURE, CLIP = 16, 4, 8, 4


def write_data(folder: Path) -> Path:
    """Write one task file in LIBERO's layout, of smooth pictures that move."""
    rng = np.random.default_rng(0)
    with h5py.File(folder / "bench_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "measure"})
        data.attrs.update({"pairing": "observation_before_action", "num_demos": EPISODES})
        for number in range(EPISODES):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = FRAMES
            demo["actions"] = rng.normal(size=(FRAMES, 7))
            for name, width in {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}.items():
                demo[f"obs/{name}"] = rng.normal(size=(FRAMES, width))
            for name in CAMERAS.values():
                small = torch.from_numpy(rng.random((FRAMES // 8, 3, 8, 8), np.float32)).permute(1, 0, 2, 3)
                large = torch.nn.functional.interpolate(small[None], (FRAMES, SIDE, SIDE), mode="trilinear")
                pictures = (large[0] * 255).byte().permute(1, 2, 3, 0).numpy()  # (F, S, S, 3)
                packed = {"compression": "gzip", "compression_opts": 1, "chunks": (1, SIDE, SIDE, 3)}
                demo.create_dataset(f"obs/{name}", data=pictures, **packed)
    return folder


def write_model(folder: Path, encoder: str) -> Path:
    """Write a small random model of transformers' own."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_ratio": 4}
    if encoder == "dinov2":
        described = transformers.Dinov2Config(**sizes, image_size=224, patch_size=14)
        transformers.Dinov2Model(described).save_pretrained(folder)
    else:
        predictor = {"pred_hidden_size": 96, "pred_num_attention_heads": 3, "pred_num_hidden_layers": 1}
        described = transformers.VJEPA2Config(**sizes, **predictor, crop_size=128, frames_per_clip=CLIP)
        transformers.VJEPA2Model(described).save_pretrained(folder)
    return folder


def cases(size: str, model: str | None, folder: Path) -> Iterator[tuple[str, WorldConfig]]:
    """What is measured, by name: without a model, all that need no download."""
    if model is not None:
        kind = read_json(find_folder(model) / "config.json").get("model_type", "").split("_")[0]
        clip = CLIP if kind == "vjepa2" else 1
        yield f"{kind} {model}", WorldConfig(kind, world_clip=clip, world_model=model)
        return
    yield "pca", WorldConfig()
    yield f"siglip, preset {size}", WorldConfig("siglip")
    if importlib.util.find_spec("transformers") is not None:
        for kind, clip in (("dinov2", 1), ("vjepa2", CLIP)):
            path = str(write_model(folder / kind, kind))
            yield f"{kind}, small and random", WorldConfig(kind, world_clip=clip, world_model=path)


def rate(count: int, work: Callable[[], object], least: float = 1.0) -> float:
    """How many of `count` things a second a call brings: the fastest of three calls, or of a second's."""
    work()
    begun, found = time.perf_counter(), []
    while len(found) < 3 or time.perf_counter() - begun < least:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return count / min(found)


def measure(name: str, config: WorldConfig, size: str, data: Path, device: torch.device) -> dict:
    """Write the encoder's cache and measure both ways to a batch's latents."""
    stored, demos = load(data, in_memory=False), load(data)
    start = StartConfig(world_encoder=config.world_encoder, init=size)
    backbone = open_backbone(config, own_policy(start, demos))
    config = resolved(config, backbone)
    if backbone is not None:
        backbone.device = device
    world.write_cache(world.cache_path(data, config, backbone), demos, config, backbone)
    latents = world.prepare(data, demos, config, backbone)
    block = world.clips(demos, config, np.arange(world.CLIPS))
    index = np.random.default_rng(1).integers(0, len(demos), BATCH)

    def steps(of: Demos) -> np.ndarray:
        return np.concatenate([of.history(index, HISTORY, 4), of.future(index, FUTURE, 4)[0]], 1)  # (B, T+K)

    def encoded() -> None:
        for frames in world.picture_batches(stored, config, steps(stored).ravel()):
            latents.encoder.embed(frames)

    from_pictures = rate(BATCH, encoded)
    from_cache = rate(BATCH, lambda: latents.z[steps(demos)])
    return {
        "case": name,
        "frames_per_second": rate(
            len(block[config.latent_cameras[0]]), lambda: latents.encoder.encode(block)
        ),
        "clip": config.world_clip,
        "width": config.world_dim,
        "samples_per_second_pictures": from_pictures,
        "samples_per_second_cache": from_cache,
        "ratio": from_cache / from_pictures,
    }


def lines(size: str, model: str | None) -> Iterator[dict]:
    """Measure encoder after encoder; gives each one's JSON line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        data = write_data(Path(temporary))
        for name, config in cases(size, model, Path(temporary)):
            yield measure(name, config, size, data, device) | {"device": str(device)}


def table(rows: list[dict]) -> str:
    """Lay encoders out."""
    out = [f"{'encoder':40s} {'width':>6s} {'frames/s':>9s} {'samples/s':>10s} {'cached':>11s} {'ratio':>8s}"]
    for row in rows:
        out.append(
            f"{row['case']:40s} {row['width']:6d} {row['frames_per_second']:9,.1f} "
            f"{row['samples_per_second_pictures']:10,.1f} {row['samples_per_second_cache']:11,.0f} "
            f"{row['ratio']:7,.0f}x"
        )
    return "\n".join(out)
