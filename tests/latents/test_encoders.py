"""Encoders: what a cache row holds is what a rollout encodes, at every step, for every encoder."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_arm import processor
from test_data import toy_demos, write_task
from test_train import TWO_RANKS

import train
from arm import Arm, ArmConfig, Summary, load_arm, save_arm
from eval import EvalConfig
from eval import main as evaluate
from latents import blocks, encoders, world
from latents.blocks import MARKS, part_of
from latents.encoders import WorldConfig, WorldStats, open_backbone, resolved
from latents.world import ENCODER, ROWS, SIDECAR, prepare
from readers.libero_hdf5 import CAMERAS
from readers.load import load
from rollouts.plan import make_plans
from rollouts.rollout import Episode, Rollout, frame_plan, histories
from simulator.pool import Observation
from train import TrainConfig
from training.start import make_caches, own_policy

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FRONT, WRIST = CAMERAS
LENGTHS = (9, 1, 12)  # one episode of one frame


def save_dinov2(folder: Path, registers: int = 0) -> Path:
    """Write a tiny random model in the layout of facebook/dinov2-base."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    sizes |= {"image_size": 24, "patch_size": 6}
    torch.manual_seed(5)
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    described = {"crop_size": {"height": 12, "width": 12}, "resample": 3, "size": {"shortest_edge": 14}}
    described |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    return folder


def save_vjepa2(folder: Path, seed: int = 6) -> Path:
    """Write a tiny random model in the layout of facebook/vjepa2-vitg-fpc64-256."""
    from transformers import VJEPA2Config, VJEPA2Model

    config = VJEPA2Config(
        patch_size=4, crop_size=8, frames_per_clip=4, tubelet_size=2, hidden_size=24, num_attention_heads=2,
        num_hidden_layers=2, mlp_ratio=2.0, pred_hidden_size=24, pred_num_attention_heads=2,
        pred_num_hidden_layers=1, pred_num_mask_tokens=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = VJEPA2Model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"crop_size": 8, "resample": 2}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"dinov2": save_dinov2(folder / "dino"), "vjepa2": save_vjepa2(folder / "jepa")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(folder: Path) -> Path:
    write_task(folder / "a_demo.hdf5", lengths=LENGTHS, size=16)
    return folder


CASES = {
    "pca": {"world_encoder": "pca", "world_dim": 6, "world_resolution": 4},
    "siglip": {"world_encoder": "siglip"},
    "dinov2": {"world_encoder": "dinov2"},
    "vjepa2": {"world_encoder": "vjepa2", "world_clip": 4},
    "vjepa2 of one frame": {"world_encoder": "vjepa2"},
    "vjepa2 of both cameras": {
        "world_encoder": "vjepa2",
        "world_clip": 2,
        "world_camera": ("image", "image2"),
    },
}


def flags_of(case: dict, models: dict[str, Path]) -> dict:
    """The same case with its model's folder."""
    model = models.get(case["world_encoder"])
    return case if model is None else case | {"world_model": str(model)}


def command_of(data: Path, case: dict, models: dict[str, Path]) -> TrainConfig:
    """A training that needs this case's latents."""
    camera = {"world_camera": (FRONT,)}
    return TrainConfig(data=data, fusion=("late",), freeze="vision", **camera | flags_of(case, models))


def write(config: TrainConfig) -> str:
    [line] = make_caches(config, 0, 1, CPU)
    return line


def cached(data: Path, case: dict, models: dict[str, Path]) -> tuple[Path, world.Latents]:
    """Write or check a cache by the command, then open it as training does."""
    command = command_of(data, case, models)
    line = write(command)
    demos = load(data)
    backbone = open_backbone(command, own_policy(command, demos))
    return Path(line.split()[1][:-1]), prepare(data, demos, resolved(command, backbone), backbone)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# ---- cache and rollout --------------------------------------------------------------------------------


def roll(latents: world.Latents, demos, episode: int, history: int, stride: int, n: int):
    """Walk through an episode of the data as a rollout does: (step, history (T, D)) at every decision.

    Only pictures that `frame_plan` asks for are handed over.
    """
    config = ArmConfig(
        **{f.name: getattr(latents.config, f.name) for f in dataclasses.fields(WorldConfig)},
        history=history, world_stride=stride,
    )  # fmt: skip
    arm = SimpleNamespace(config=config, encoder=latents.encoder)
    first, last = demos.first[episode], demos.last[episode]
    one, step, offsets = Episode(0, 0, "pred"), 0, [0]
    while True:
        pictures = {
            (k, c): demos.images[c][first + step - (offsets[-1] - k)] for k in offsets for c in CAMERAS
        }
        one.see(Observation(np.zeros(8), pictures, False, False, step, "go", 0, 0), arm, True)
        yield step, histories(arm, [one, one])
        if first + step + n > last:
            return
        step, offsets = step + n, frame_plan(n, history, stride, config.world_clip)


@pytest.mark.parametrize("case", CASES)
def test_a_cache_row_equals_the_online_encoding_of_the_same_frames(case, data, models):
    _, latents = cached(data, CASES[case], models)
    demos = load(data)
    width = {"pca": 6, "siglip": 96, "dinov2": 16, "vjepa2": 24}[latents.config.world_encoder]
    width *= len(latents.config.world_camera)
    assert latents.z.shape == (sum(LENGTHS), width) and latents.raw.dtype == np.float32
    assert isinstance(latents.raw, np.memmap)
    # the same batch: the same bits; this block is the whole data set
    whole = latents.encoder.encode(world.clips(demos, latents.config, np.arange(len(demos))))
    assert torch.equal(whole, torch.from_numpy(np.array(latents.raw)))
    assert torch.equal(latents.encoder.standardise(whole), latents.z)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a policy in low precision changes nothing
        again = latents.encoder.embed(world.clips(demos, latents.config, np.array([3, 9])))
    torch.testing.assert_close(again, latents.z[[3, 9]], atol=1e-5, rtol=1e-5)
    seen = 0
    for episode, n, history, stride in ((0, 2, 3, 1), (1, 3, 3, 2), (2, 3, 3, 2), (2, 1, 2, 4)):
        for step, z in roll(latents, demos, episode, history, stride, n):
            row = demos.first[episode] + step
            wanted = latents.z[demos.history(np.array([row]), history, stride)]
            torch.testing.assert_close(z, wanted.expand(2, -1, -1), atol=1e-5, rtol=1e-5)
            seen += 1
    assert seen == 5 + 1 + 4 + 12


def test_a_clip_repeats_its_episodes_first_frame_and_never_reaches_another(models):
    demos = toy_demos([3, 1, 5], size=8)
    for index, camera in enumerate(CAMERAS):
        demos.images[camera][:] = (np.arange(9) + 100 * index)[:, None, None, None]
    config = WorldConfig("vjepa2", world_camera=("image2", "image"), world_clip=4)
    frames = world.clips(demos, config, np.arange(9))
    assert list(frames) == [WRIST, FRONT]
    steps = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2], [3, 3, 3, 3], [4, 4, 4, 4], [4, 4, 4, 5], [4, 4, 5, 6]]
    steps += [[4, 5, 6, 7], [5, 6, 7, 8]]
    assert frames[FRONT][:, :, 0, 0, 0].tolist() == steps
    assert frames[WRIST][:, :, 2, 7, 7].tolist() == [[100 + s for s in clip] for clip in steps]
    assert frames[FRONT].shape == (9, 4, 3, 8, 8) and frames[FRONT].is_contiguous()


@pytest.mark.parametrize("camera", [FRONT, WRIST])
def test_a_latent_depends_on_its_own_clip_alone(camera, data, models):
    _, latents = cached(data, CASES["vjepa2 of both cameras"], models)
    demos = load(data)
    frames = world.clips(demos, latents.config, np.arange(22))
    before = latents.encoder.encode(frames)
    demos.images[camera][4] ^= 255  # a frame of the first episode
    after = latents.encoder.encode(world.clips(demos, latents.config, np.arange(22)))
    changed = (before != after).any(1).nonzero()[:, 0].tolist()
    assert changed == [4, 5]  # its own clip and the next one's
    part = (before != after).any(0)
    mine = slice(0, 24) if camera == FRONT else slice(24, 48)  # the cameras lie end to end
    assert part[mine].all() and part.sum() == 24


def test_clips_need_their_frames_in_order(data, models):
    _, latents = cached(data, CASES["vjepa2"], models)
    frames = world.clips(load(data), latents.config, np.array([5]))[FRONT]
    z, other = (latents.encoder.encode(clip) for clip in (frames, frames.flip(1)))
    assert (z - other).abs().max() > 1e-3
    with pytest.raises(AssertionError, match="--world-clip 4 does not fit"):
        latents.encoder.encode(frames[:, 0])
    with pytest.raises(ValueError, match=r"16-pixel pictures, got .* render with --size 16"):
        latents.encoder.encode(torch.zeros(1, 4, 3, 8, 8, dtype=torch.uint8))


def test_a_single_frame_may_come_as_a_clip_of_one(data, models):
    for name in ("pca", "dinov2", "vjepa2 of one frame"):
        _, latents = cached(data, CASES[name], models)
        frames = load(data).frames(np.arange(4), FRONT)
        assert torch.equal(latents.encoder.encode(frames), latents.encoder.encode(frames[:, None]))


# ---- what an encoder computes -------------------------------------------------------------------------


def reference_pixels(folder: Path, pictures: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    """Scale and normalise pictures (n, 3, S, S) uint8 as the folder's processor is described, uncropped."""
    file = next(folder.glob("*preprocessor_config.json"))
    described = json.loads(file.read_text())
    mean = torch.tensor(described.get("image_mean", [0.485, 0.456, 0.406]))[:, None, None]
    std = torch.tensor(described.get("image_std", [0.229, 0.224, 0.225]))[:, None, None]
    x = torch.nn.functional.interpolate(pictures / 255, size=(side, side), mode=mode, antialias=True)
    return (x - mean) / std


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_is_the_mean_of_the_patches_without_special_tokens(registers, tmp_path):
    from transformers import AutoModel

    folder = save_dinov2(tmp_path / "m", registers)
    config = WorldConfig("dinov2", world_model=str(folder))
    backbone = open_backbone(config)
    pictures = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    model = AutoModel.from_pretrained(folder)
    tokens = model(pixel_values=reference_pixels(folder, pictures, 12, "bicubic")).last_hidden_state
    assert tokens.shape[1] == 1 + registers + 4  # 12 pixels by patches of 6
    torch.testing.assert_close(backbone(pictures), tokens[:, -4:].mean(1), atol=1e-5, rtol=1e-5)
    fields = resolved(config, backbone)
    assert (fields.world_dim, fields.world_resolution, fields.world_model) == (16, 12, str(folder))


def test_vjepa2_is_the_mean_of_the_encoders_tokens(models):
    from transformers import AutoModel

    clips = torch.randint(256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    model = AutoModel.from_pretrained(models["vjepa2"])
    pixels = reference_pixels(models["vjepa2"], clips.flatten(0, 1), 8, "bilinear").unflatten(0, (2, 4))
    wanted = model.encoder(pixel_values_videos=pixels).last_hidden_state.mean(1)
    found = open_backbone(WorldConfig("vjepa2", world_clip=4, world_model=str(models["vjepa2"])))(clips)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_siglip_is_the_policys_own_tower_whatever_type_it_is_held_in():
    policy = tiny.policy()
    pictures = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    before = open_backbone(WorldConfig("siglip"), policy)
    with torch.no_grad():
        patches = policy.vision(policy.prepare_image(pictures / 255))
    torch.testing.assert_close(before(pictures), patches.mean(1), atol=0.05, rtol=0.05)  # rounded weights
    policy.set_dtype(torch.bfloat16)
    after = open_backbone(WorldConfig("siglip"), policy)
    assert after.facts == before.facts and torch.equal(after(pictures), before(pictures))
    with torch.no_grad():
        policy.vision.patch_embedding.weight[0, 0, 0, 0] += 1
    assert open_backbone(WorldConfig("siglip"), policy).facts["weights"] != before.facts["weights"]


def test_learned_latents_are_standardised_one_by_one_but_not_below_a_floor():
    z = np.random.default_rng(0).normal(3, [1.0, 10.0, 1e-7], (10_000, 3)).astype(np.float32)
    stats = WorldStats.of_each(z, rows=999)
    scaled = (torch.from_numpy(z) - stats.mean) / stats.std
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(0, unbiased=False), stats.dim_std, atol=1e-4, rtol=1e-3)
    assert stats.std.shape == (3,) and stats.dim_std[:2].allclose(torch.ones(2)) and stats.dim_std[2] < 1e-4
    with pytest.raises(ValueError, match="the world latents never change"):
        WorldStats.of_each(np.ones((5, 3), np.float32))


# ---- refusals of a config or a model ------------------------------------------------------------------

BAD = {
    "--world-clip 2 with --world-encoder pca: only vjepa2": {"world_clip": 2},
    "--world-clip 0 must be at least 1": {"world_encoder": "vjepa2", "world_clip": 0},
    "--world-model x with --world-encoder pca, which is fitted on the data": {"world_model": "x"},
    "--world-model x with --world-encoder siglip, which is the policy's": {
        "world_encoder": "siglip", "world_model": "x",
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_choice_that_means_nothing_is_refused(message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**BAD[message])


def test_a_tower_that_trains_makes_no_latents():
    with pytest.raises(ValueError, match=r"siglip with --freeze none: .* use --freeze vision"):
        TrainConfig(world_encoder="siglip", freeze="none", fusion=("late",))
    TrainConfig(world_encoder="siglip", freeze="none")  # without memory there are no latents


def test_a_folder_that_does_not_fit_is_refused_in_one_line(models, tmp_path):
    def message(encoder: str, folder: Path, **fields) -> str:
        with pytest.raises(ValueError) as error:
            config = WorldConfig(encoder, world_model=str(folder), **fields)
            backbone = open_backbone(config)
            resolved(config, backbone)
            backbone.network  # noqa: B018
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is a 'vjepa2' model, not dinov2: name one that is" in message("dinov2", models["vjepa2"])
    assert "--world-clip 3 is no multiple of 2 frames" in message("vjepa2", models["vjepa2"], world_clip=3)
    assert "--world-dim 7 with --world-encoder dinov2, whose own is 16: leave it out" in message(
        "dinov2", models["dinov2"], world_dim=7
    )
    assert "no folder './nowhere'" in message("dinov2", Path("./nowhere").relative_to(".") and "./nowhere")
    for name, damage, wanted in (
        ("torn", lambda f: f.write_bytes(f.read_bytes()[:-50]), "cannot be read"),
        ("gone", Path.unlink, "has no *.safetensors"),
        (
            "poor",
            lambda f: save_file({k: v for k, v in load_file(f).items() if "norm1" not in k}, f),
            "lacks 4",
        ),
    ):
        shutil.copytree(models["dinov2"], tmp_path / name)
        damage(tmp_path / name / "model.safetensors")
        assert wanted in message("dinov2", tmp_path / name)
    shutil.copytree(models["dinov2"], tmp_path / "odd")
    (tmp_path / "odd" / "preprocessor_config.json").write_text(json.dumps({"crop_size": 13}))
    assert "pictures of 13 by patches of 6" in message("dinov2", tmp_path / "odd")


def test_a_missing_package_names_the_command_that_installs_it(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    backbone = open_backbone(WorldConfig("dinov2", world_model=str(models["dinov2"])))  # needs no package
    with pytest.raises(
        ValueError, match=rf"needs the package transformers .*: pip install {encoders.TRANSFORMERS}"
    ):
        backbone(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["world"] == [encoders.TRANSFORMERS]
    assert encoders.TRANSFORMERS in project["dependency-groups"]["dev"]


def test_a_hub_id_is_pinned_to_the_commit_that_it_was_found_at(models, tmp_path, monkeypatch):
    snapshot = shutil.copytree(models["dinov2"], tmp_path / "snapshots" / "0123abc")
    asked = []
    monkeypatch.setattr(encoders, "find_folder", lambda *given: asked.append(given) or snapshot)
    config = WorldConfig("dinov2", world_revision="main")
    backbone = open_backbone(config)
    assert asked == [("facebook/dinov2-base", "main")]
    assert (backbone.facts["model"], backbone.facts["model_revision"]) == ("facebook/dinov2-base", "0123abc")
    found = resolved(config, backbone)
    assert (found.world_model, found.world_revision) == ("facebook/dinov2-base", "0123abc")
    local = open_backbone(WorldConfig("dinov2", world_model=str(models["dinov2"])))
    assert local.facts["weights"] == backbone.facts["weights"] and local.facts["model_revision"] is None


def test_reading_a_model_leaves_the_random_numbers_alone(models):
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    open_backbone(WorldConfig("vjepa2", world_model=str(models["vjepa2"]))).network  # noqa: B018
    assert torch.equal(torch.rand(3), wanted)


# ---- checkpoints --------------------------------------------------------------------------------------


def learned_arm(case: str, models: dict[str, Path]) -> Arm:
    """An arm on a learned encoder, untrained."""
    policy = tiny.policy()
    config = WorldConfig(**flags_of(CASES[case], models))
    backbone = open_backbone(config, policy)
    fields = dataclasses.asdict(resolved(config, backbone))
    config = ArmConfig(fusion=("late",), history=3, future=4, world_stride=2, **fields)
    D = config.world_dim
    stats = WorldStats(torch.randn(D), torch.rand(D) + 0.5, torch.ones(D))
    encoder = encoders.Learned(config, 16, backbone, stats)
    summary = Summary.of(torch.ones(4), torch.zeros(4, D), torch.randn(5, 3, D))
    return Arm(config, policy, encoder, summary, {})


@pytest.mark.parametrize("case", ["siglip", "dinov2", "vjepa2"])
def test_a_checkpoint_holds_no_weights_of_its_encoder_and_refuses_others(case, models, tmp_path):
    own = {name: shutil.copytree(folder, tmp_path / name) for name, folder in models.items()}
    arm = learned_arm(case, own)
    save_arm(tmp_path / "c", arm, processor())
    ours = load_file(tmp_path / "c" / "world.safetensors")
    kept = {
        f"encoder.{name}"
        for name in ("learned.size", "learned.facts", "stats.mean", "stats.std", "stats.dim_std")
    }
    assert {name for name in ours if name.startswith("encoder.")} == kept
    again, _ = load_arm(tmp_path / "c")
    m = arm.config.world_clip
    frames = torch.randint(256, (2, *(m,) * (m > 1), 3, 16, 16), dtype=torch.uint8)
    assert again.config == arm.config
    assert torch.equal(again.encoder.embed(frames), arm.encoder.embed(frames))
    if case == "siglip":
        weights = load_file(tmp_path / "c" / "model.safetensors")
        name = next(k for k in weights if k.endswith("vision_model.post_layernorm.weight"))
        save_file(weights | {name: weights[name] + 0.1}, tmp_path / "c" / "model.safetensors")
    else:
        moved = shutil.move(own[case], tmp_path / "moved")
        with pytest.raises(ValueError, match=r"no folder|cannot be fetched"):
            load_arm(tmp_path / "c")
        found, _ = load_arm(tmp_path / "c", world_model=str(moved))
        assert torch.equal(found.encoder.embed(frames), arm.encoder.embed(frames))
        file = Path(moved) / "model.safetensors"
        weights = load_file(file)
        name = sorted(weights)[0]
        save_file(weights | {name: weights[name] + 0.1}, file, {"format": "pt"})
        shutil.move(moved, own[case])
    with pytest.raises(
        ValueError, match=r"weights differ: checkpoint has \w{16}, .* has \w{16}: .*--world-model"
    ) as e:
        load_arm(tmp_path / "c")
    assert "\n" not in str(e.value)


def test_histories_are_encoded_at_decisions_in_one_batch(models, monkeypatch):
    arm = learned_arm("vjepa2", models)
    record = {"suite": "libero_object", "task_id": 1, "size": 16, "init_state_ids": [0]}
    [plan] = make_plans(EvalConfig(episodes_per_task=2, policy_batch=2), {"data_provenance": [record]}, arm)
    sent, batches = {}, []
    pool = SimpleNamespace(num_envs=1, run=lambda i, actions, frames: sent.update({i: (actions, frames)}))
    rollout = Rollout(arm.eval(), processor(), plan, "pred", pool, CPU)
    encode = encoders.Learned.encode

    def noted(self, frames):
        batches.append({camera: tuple(clip.shape) for camera, clip in frames.items()})
        return encode(self, frames)

    monkeypatch.setattr(encoders.Learned, "encode", noted)
    rng = np.random.default_rng(0)
    rollout.running[0], offsets = Episode(1, 3, "pred"), [0]
    for step in (0, 3, 6, 9):
        pictures = {(k, c): rng.integers(0, 256, (16, 16, 3), np.uint8) for k in offsets for c in CAMERAS}
        seen = Observation(np.zeros(8, np.float32), pictures, False, False, step, "go", 0, 0)
        rollout.running[0].see(seen, arm, rollout.keep_history)
        assert len(batches) == step // 3  # seeing encodes nothing
        rollout.decide([(0, seen)])
        offsets = sorted({k for k, _ in sent[0][1]})
    assert batches == [{FRONT: (2 * 3, 4, 3, 16, 16)}] * 4
    # decisions 3 steps apart read 0, 2 and 4 steps back, clips of 4: every step of the last 7
    assert offsets == [1, 2, 3] and sorted(rollout.running[0].frames) == list(range(2, 10))


# ---- training and evaluating --------------------------------------------------------------------------

SHORT = {"total_samples": 24, "batch_size": 8, "log_every": 1, "freeze": "vision", "fusion": ("late",)}
SHORT |= {"future": 3, "history": 2, "world_stride": 2}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["siglip", "vjepa2"])
def test_an_arm_trains_on_a_learned_cache_resumes_and_is_measured_offline(case, models, tmp_path, capsys):
    own = {name: shutil.copytree(folder, tmp_path / name) for name, folder in models.items()}
    folder = make_data(tmp_path / "data")
    config = TrainConfig(data=folder, out=tmp_path / "run", **SHORT, **flags_of(CASES[case], own))
    with pytest.raises(ValueError, match=r"there are no world latents at .*: run .* --prepare first"):
        train.main(config)
    _, latents = cached(folder, CASES[case], own)
    train.main(dataclasses.replace(config, save_every=8))
    assert "memory pred: looks 0.3 s ahead, " in capsys.readouterr().out
    straight = load_file(config.out / "last" / "world.safetensors")
    shutil.rmtree(config.out / "step_000003")  # as after a kill
    (config.out / "last").unlink()
    (config.out / "last").symlink_to("step_000002")
    if case == "vjepa2":  # the model may lie elsewhere
        (tmp_path / "elsewhere").mkdir()
        own["vjepa2"] = Path(shutil.move(own["vjepa2"], tmp_path / "elsewhere"))
        with pytest.raises(ValueError, match="no folder"):
            train.main(config)
        config = dataclasses.replace(config, world_model=str(own["vjepa2"]))
    train.main(config)
    again = load_file(config.out / "last" / "world.safetensors")
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    arm, _ = load_arm(config.out / "last")
    assert arm.config.world_model == config.world_model
    assert arm.config.world_dim == latents.z.shape[1]
    assert torch.equal(arm.encoder.stats.std, latents.encoder.stats.std)
    with pytest.raises(ValueError, match="cannot be turned into pictures; leave it out, or train with"):
        evaluate(EvalConfig(str(config.out), imagine=1))
    write_task(tmp_path / "other" / "a_demo.hdf5", lengths=(6, 5), size=16, seed=3)
    evaluate(EvalConfig(str(config.out), offline=tmp_path / "other", memory=("pred", "oracle")))
    fresh = world.latents_of(arm.encoder, load(tmp_path / "other")).z
    cached(tmp_path / "other", CASES[case], own)
    assert torch.equal(world.latents_for(tmp_path / "other", arm.encoder, load(tmp_path / "other")).z, fresh)
    evaluate(EvalConfig(str(config.out), offline=tmp_path / "other", memory=("pred", "oracle")))
    elsewhere = {"data": tmp_path / "other", "cache": tmp_path / "mine"}
    train.main(dataclasses.replace(config, **elsewhere, prepare=True))
    shutil.rmtree(world.cache_path(tmp_path / "other", arm.encoder.config, arm.encoder.backbone))
    asked = EvalConfig(
        str(config.out), offline=tmp_path / "other", memory=("pred", "oracle"), cache=tmp_path / "mine"
    )
    evaluate(asked)
    one, two, three = (json.loads(line) for line in (config.out / "offline.jsonl").read_text().splitlines())
    assert one == two == three
    [rows] = (tmp_path / "mine").glob(f"*/*/{ROWS}")
    damaged(rows.parent, ROWS, lambda b: b[:-9] + bytes([b[-9] ^ 64]) + b[-8:])
    with pytest.raises(ValueError, match=r"world cache .*mine.* is damaged"):
        evaluate(asked)


def test_a_run_from_before_a_field_came_resumes_if_the_field_has_its_default(tmp_path):
    config = TrainConfig(out=tmp_path / "run")
    tiny.open_run(config, {})
    path = config.out / "config.json"
    record = json.loads(path.read_text())
    del record["world_clip"], record["world_model"]
    path.write_text(json.dumps(record))
    tiny.open_run(config, {})
    with pytest.raises(ValueError, match="holds another run: world_clip is 1, not 2"):
        tiny.open_run(
            dataclasses.replace(config, world_encoder="vjepa2", world_clip=2), {"world_encoder": "pca"}
        )


# ---- the cache ----------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(world, "CLIPS", 4)  # six blocks, the last of two frames
    monkeypatch.setattr(world, "ENCODE_FRAMES", 4)


FIELDS = {
    "encoder": "dinov2", "revision": "0", "model": "other", "model_revision": "abc", "weights": "0" * 16,
    "pooling": "class token", "cameras": [WRIST], "dim": 5, "resolution": 9, "clip": 2, "size": 8,
    "fingerprint": "0" * 16, "rows": 21, "mean": [0.0], "std": [1.0],
    "crc": {"z.npy": 1},
}  # fmt: skip


def test_a_sidecar_that_disagrees_in_any_field_is_refused(data, models):
    path, latents = cached(data, CASES["vjepa2"], models)
    whole, demos, args = (path / SIDECAR).read_text(), load(data), (latents.config, latents.encoder.backbone)
    assert set(json.loads(whole)) == set(FIELDS)
    for field, value in FIELDS.items():
        (path / SIDECAR).write_text(json.dumps(json.loads(whole) | {field: value}))
        with pytest.raises(ValueError) as error:
            prepare(data, demos, *args)
        (path / SIDECAR).write_text(whole)
        wanted = f"{field}: cache has {value}"[:60] if field != "crc" else "other bytes than written"
        assert wanted in str(error.value) and "\n" not in str(error.value), field
        assert "delete" in str(error.value) and "run again" in str(error.value)
    prepare(data, demos, *args)


def damaged(path: Path, name: str, change) -> None:
    content = (path / name).read_bytes()
    (path / name).write_bytes(change(content))


@pytest.mark.parametrize("name", [ROWS, SIDECAR, ENCODER])
def test_a_truncated_missing_or_corrupted_file_is_refused(name, models, tmp_path):
    path, latents = cached(make_data(tmp_path), CASES["dinov2"], models)
    args = tmp_path, load(tmp_path), latents.config, latents.encoder.backbone
    whole = (path / name).read_bytes()
    changes = {"torn": lambda b: b[:-20], "flipped": lambda b: b[:-9] + bytes([b[-9] ^ 64]) + b[-8:]}
    for change in changes.values():
        damaged(path, name, change)
        with pytest.raises(ValueError, match=r"world cache.*: delete .* and run again"):
            prepare(*args)
        (path / name).write_bytes(whole)
    (path / name).unlink()
    with pytest.raises(ValueError, match=r"missing or damaged .*: delete .* and run again"):
        prepare(*args)


def test_a_missing_or_unfinished_cache_of_a_learned_encoder_names_the_command(
    models, tmp_path, small_blocks, monkeypatch
):
    make_data(tmp_path)
    case = CASES["vjepa2"] | {"world_camera": ("image2",)}
    config = WorldConfig(**flags_of(case, models))
    backbone = open_backbone(config)
    args = tmp_path, load(tmp_path), resolved(config, backbone), backbone
    with pytest.raises(ValueError, match=r"there are no world latents at .*: run .* --prepare first"):
        prepare(*args)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "finish", lambda *_: None)
        with pytest.raises(ValueError, match="is not finished"):
            write(command_of(tmp_path, case, models))
    with pytest.raises(ValueError, match="is not finished: run the same command with --prepare"):
        prepare(*args)
    path = Path(write(command_of(tmp_path, case, models)).split()[1][:-1])
    assert len(prepare(*args).z) == 22
    other = WorldConfig(**flags_of(case | {"world_clip": 2}, models))
    with pytest.raises(ValueError, match=r"clip: cache has 4, run wants 2: write another, the same command"):
        prepare(*args[:2], resolved(other, backbone), backbone)
    (path / MARKS).write_bytes(b"\1\1\1\0\1\1")  # renamed by hand
    with pytest.raises(ValueError, match="is not finished"):
        prepare(*args)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from latents import world
from train import TrainConfig
from training.start import make_caches
world.CLIPS = world.ENCODE_FRAMES = 4
real, calls = os.fsync, []
def fsync(number):
    calls.append(number)
    if len(calls) == 4:  # the first brings the sidecar
        os.kill(os.getpid(), signal.SIGKILL)  # rows of the third block are written, its mark is not
    real(number)
os.fsync = fsync
make_caches(TrainConfig(data=Path({data!r}), {fields}), 0, 1, torch.device("cpu"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pca", "siglip"])
def test_a_killed_run_goes_on_to_the_same_bytes(case, models, tmp_path, small_blocks, monkeypatch):
    whole, _ = cached(make_data(tmp_path / "whole"), CASES[case], models)
    torn = make_data(tmp_path / "torn")
    command = command_of(torn, CASES[case], models)
    fields = ", ".join(f"{name}={value!r}" for name, value in flags_of(CASES[case], models).items())
    fields += ", fusion=('late',), freeze='vision'"
    script = KILLED.format(root=str(ROOT), data=str(torn), fields=fields)
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run([sys.executable, "-c", script], env=env).returncode == -signal.SIGKILL
    part = part_of(torn / whole.name)
    assert (part / MARKS).read_bytes() == b"\1\1\0\0\0\0" and not (torn / whole.name).exists()
    with (part / ROWS).open("r+b") as rows:  # what was not marked may be torn
        rows.seek(-12 * 6 * 4, os.SEEK_END)
        rows.write(b"\x55" * 90)
    made = []
    clips = world.clips
    monkeypatch.setattr(
        world, "clips", lambda demos, config, index: made.append(len(index)) or clips(demos, config, index)
    )
    write(command)
    assert made == [4, 4, 4, 2] and not part.exists()  # pca is not fitted again either
    assert content(torn / whole.name) == content(whole) and set(content(whole)) == {ROWS, SIDECAR, ENCODER}


def test_an_unfinished_cache_of_other_data_is_refused(models, tmp_path, monkeypatch):
    make_data(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "finish", lambda *_: None)
        with pytest.raises(ValueError):
            write(command_of(tmp_path, CASES["pca"], models))
    write_task(tmp_path / "a_demo.hdf5", lengths=LENGTHS, size=16, seed=1)
    with pytest.raises(
        ValueError, match=r"unfinished world cache .*, fingerprint: cache has .*: delete .*part and run"
    ):
        write(command_of(tmp_path, CASES["pca"], models))


@pytest.mark.parametrize(("case", "moment"), [("pca", 1), ("pca", 8), ("dinov2", 1), ("dinov2", 4)])
def test_two_runs_may_write_one_cache_at_once(case, moment, models, tmp_path, small_blocks, monkeypatch):
    whole, _ = cached(make_data(tmp_path / "whole"), CASES[case], models)
    data, clips, calls = make_data(tmp_path / "data"), world.clips, []

    def clips_beside_another_run(demos, config, index):
        calls.append(1)
        if len(calls) == moment:  # the six calls of pca's fit come first
            write(command_of(data, CASES[case], models))  # starts and ends meanwhile
        return clips(demos, config, index)

    monkeypatch.setattr(world, "clips", clips_beside_another_run)
    write(command_of(data, CASES[case], models))
    assert len(calls) > moment and content(data / whole.name) == content(whole)
    assert [file.name for file in data.iterdir() if file.suffix != ".hdf5"] == [whole.name]


def test_latents_that_are_not_finite_are_never_written(models, tmp_path):
    folder = shutil.copytree(models["dinov2"], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match="--world-encoder dinov2 gave latents that are not finite: mend its model"
    ):
        write(command_of(make_data(tmp_path / "d"), CASES["dinov2"], {"dinov2": folder}))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pca", "siglip", "vjepa2 of both cameras"])
def test_two_ranks_write_the_same_bytes_as_one(case, models, tmp_path, monkeypatch):
    lengths = (60, 1, 50)  # four blocks of clips
    for name in ("one", "two"):
        write_task(tmp_path / name / "a_demo.hdf5", lengths=lengths, size=16)
    flags = ["--prepare", "--fusion", "late", "--freeze", "vision"]
    for name, value in flags_of(CASES[case], models).items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for start, name in (([sys.executable], "one"), (TWO_RANKS, "two"), (TWO_RANKS, "two")):
        command = [*map(str, start), str(ROOT / "train.py"), "--data", str(tmp_path / name), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("checked") == 1
    one, two = (next((tmp_path / name).glob("world_*")) for name in ("one", "two"))
    assert one.name == two.name and content(one) == content(two)


@pytest.mark.parametrize("shape", [(24, 36), (12, 40), (30, 8)])
@pytest.mark.parametrize("kind", ["dinov2", "vjepa2"])
def test_pictures_that_are_not_square_are_scaled_whole(kind, shape, tmp_path):
    """Those of which one side is the model's already, too."""
    folder = save_dinov2(tmp_path / "model") if kind == "dinov2" else save_vjepa2(tmp_path / "model")
    clip = () if kind == "dinov2" else (2,)
    backbone = open_backbone(WorldConfig(kind, world_model=str(folder), world_clip=max(1, *clip, 1)))
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (3, *clip, 3, *shape), generator=g, dtype=torch.uint8)
    mode = "bicubic" if kind == "dinov2" else "bilinear"
    flat = torch.nn.functional.interpolate(
        pictures.flatten(0, -4).float(), size=backbone.side, mode=mode, antialias=True, align_corners=False
    )
    square = flat.unflatten(0, pictures.shape[:-3])  # of the model's own side: taken as it is
    torch.testing.assert_close(backbone(pictures), backbone(square), atol=1e-4, rtol=1e-4)
