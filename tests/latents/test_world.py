"""World latents: one encoding for cache and rollout, a cache that opens only for what it was made from."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import toy_demos, write_task

import train
from files import Refused
from latents import world
from latents.encoders import WorldConfig, encoder_from_state, shrink, views
from latents.world import change_statistics, fit, latents_of, prepare, scaled
from readers.demos import Demos
from readers.load import load
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
CAMERA = "observation.images.image"
SMALL = WorldConfig(world_dim=6, world_resolution=4)
BOTH = WorldConfig(world_camera=("image", "image2"), world_dim=6, world_resolution=4)


def flat_demos(rank: int, frames: int = 40, size: int = 4) -> Demos:
    """Return demonstrations whose pictures are mixtures of `rank` pictures around a grey one."""
    rng = np.random.default_rng(rank)
    demos = toy_demos([frames // 2, frames - frames // 2], size=size)
    basis = rng.normal(size=(rank, size * size * 3))
    pixels = 128 + 12 * rng.normal(size=(frames, rank)) @ basis / np.sqrt(rank)
    demos.images[CAMERA] = pixels.round().clip(0, 255).astype(np.uint8).reshape(frames, size, size, 3)
    return demos


def test_full_rank_pca_gives_every_pixel_back():
    demos = toy_demos([30, 40], size=4)
    encoder = fit(demos, WorldConfig(world_dim=48, world_resolution=4))
    frames = demos.frames(np.arange(70), CAMERA)
    assert torch.equal(encoder.decode(encoder.encode(frames)), frames)


def test_several_cameras_lie_side_by_side_in_the_order_of_the_config():
    demos = toy_demos([60, 60], size=4)
    for cameras in (BOTH.latent_cameras, BOTH.latent_cameras[::-1]):
        encoder = fit(demos, WorldConfig(world_camera=cameras, world_dim=96, world_resolution=4))
        frames = {camera: demos.frames(np.arange(120), camera) for camera in demos.images}
        pictures = encoder.decode(encoder.encode(frames))  # (n, 3, 4, 8)
        assert torch.equal(pictures, torch.cat([frames[camera] for camera in cameras], dim=-1))


@settings(max_examples=15)
@given(st.integers(1, 6))
def test_low_rank_pictures_survive_a_latent_of_their_rank(rank):
    demos = flat_demos(rank)
    encoder = fit(demos, WorldConfig(world_dim=rank, world_resolution=4))
    frames = demos.frames(np.arange(40), CAMERA)
    error = (encoder.decode(encoder.encode(frames)).float() - frames.float()).abs()
    assert error.max() <= 3 and error.mean() < 0.5  # pixels of 255: what rounding to uint8 put in


def test_components_are_orthonormal_ordered_signed_and_deterministic():
    demos = toy_demos([30, 40], size=8)
    encoder, again = fit(demos, SMALL), fit(demos, SMALL)
    assert all(torch.equal(value, again.state()[name]) for name, value in encoder.state().items())
    components = encoder.components
    torch.testing.assert_close(components @ components.T, torch.eye(6), atol=1e-5, rtol=0)
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()
    spread = encoder.encode(demos.frames(np.arange(70), CAMERA)).std(0)
    assert (spread.diff() <= 1e-6).all()
    pixels = shrink([demos.frames(np.arange(70), CAMERA)], 4).double()
    _, singular, _ = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    torch.testing.assert_close(spread.double(), singular[:6] / 69**0.5, atol=1e-5, rtol=1e-5)


def test_shrinking_is_the_mean_over_areas():
    frames = torch.arange(2 * 3 * 8 * 8).remainder(256).byte().reshape(2, 3, 8, 8)
    mean = frames.float().reshape(2, 3, 4, 2, 4, 2).mean((3, 5)) / 255
    torch.testing.assert_close(shrink([frames], 4), mean.flatten(1))
    assert shrink([frames, frames], 4).reshape(2, 3, 4, 8)[..., 4:].allclose(mean)


def test_standardising_takes_the_mean_and_one_scalar():
    demos = toy_demos([30, 40], size=4)
    encoder = fit(demos, SMALL)
    raw = encoder.encode(demos.frames(np.arange(70), CAMERA))
    z = encoder.standardise(raw)
    assert encoder.stats.std.shape == (1,)
    torch.testing.assert_close(z.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(z.std(0, unbiased=False), encoder.stats.dim_std, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.unstandardise(z), raw)
    moved = replace(encoder, stats=replace(encoder.stats, mean=torch.full((6,), 2.0)))
    torch.testing.assert_close(moved.standardise(raw), (raw - 2) / encoder.stats.std)
    torch.testing.assert_close(moved.unstandardise(moved.standardise(raw)), raw)


@pytest.mark.parametrize("config", [SMALL, BOTH])
def test_a_cache_row_equals_the_online_encoding_of_the_same_frames(config, tmp_path):
    path = write_task(tmp_path / "a_demo.hdf5", lengths=(300, 9))  # more than one batch
    demos = load(path)
    latents = prepare(tmp_path, demos, config)
    assert latents.z.shape == (309, 6) and latents.z.dtype == torch.float32
    restored = encoder_from_state(latents.encoder.state(), config)
    for index in ([0], [255, 256, 308], [7] * 5):
        frames = {camera: demos.frames(index, camera) for camera in demos.images}
        torch.testing.assert_close(restored.embed(frames), latents.z[index], atol=1e-5, rtol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a policy in low precision changes nothing
            torch.testing.assert_close(restored.embed(frames), latents.z[index], atol=1e-5, rtol=0)
    torch.testing.assert_close(latents_of(restored, demos).z, latents.z)


def test_a_second_prepare_opens_the_same_cache_and_writes_nothing(tmp_path, monkeypatch):
    demos = load(write_task(tmp_path / "a_demo.hdf5", lengths=(9, 8)))
    first = prepare(tmp_path, demos, SMALL)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert len(written) == 1 + 4 and not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(world, "write_cache", lambda *_: pytest.fail("wrote the cache again"))
    assert torch.equal(prepare(tmp_path, demos, SMALL).z, first.z)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written


def test_two_processes_may_write_the_same_cache(tmp_path):
    demos = toy_demos([9, 8], size=4)
    path = world.cache_path(tmp_path, SMALL)
    for _ in range(2):
        world.write_cache(path, demos, SMALL)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    world.open_cache(path, demos, SMALL)


FIELDS = {
    "encoder": "dinov2",
    "revision": "0",
    "cameras": ["observation.images.image2"],
    "dim": 5,
    "resolution": 3,
    "clip": 2,
    "size": 16,
    "fingerprint": "0123456789abcdef",
    "rows": 16,
    "mean": [0.5] * 6,
    "std": [2.0],
    "crc": {"z.npy": 1},
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_sidecar_that_disagrees_in_any_field_is_refused(field, tmp_path):
    demos = toy_demos([9, 8], size=4)
    path = world.cache_path(tmp_path, SMALL)
    prepare(tmp_path, demos, SMALL)
    stored = json.loads((path / "cache.json").read_text())
    assert set(stored) == set(FIELDS)
    (path / "cache.json").write_text(json.dumps(stored | {field: FIELDS[field]}))
    wanted = f"world cache, {field}: cache has .*, run wants .*: delete .* run again"
    if field == "crc":
        wanted = "damaged .z.npy has other bytes than written.: delete .* and run again"
    with pytest.raises(ValueError, match=wanted) as e:
        prepare(tmp_path, demos, SMALL)
    assert "\n" not in str(e.value)
    assert field == "crc" or str(FIELDS[field])[:20] in str(e.value)


def test_data_that_changed_or_pictures_of_another_size_do_not_open_an_old_cache(tmp_path):
    demos = toy_demos([9, 8], size=4)
    prepare(tmp_path, demos, SMALL)
    with pytest.raises(ValueError, match="size: cache has 4, run wants 8"):
        prepare(tmp_path, toy_demos([9, 8], size=8), SMALL)
    with pytest.raises(ValueError, match="dim: cache has 6, run wants 5"):
        world.open_cache(world.cache_path(tmp_path, SMALL), demos, replace(SMALL, world_dim=5))
    demos.images[CAMERA][16, 3, 3, 2] ^= 1
    with pytest.raises(ValueError, match="fingerprint: cache has"):
        prepare(tmp_path, demos, SMALL)


@pytest.mark.parametrize("name", ["z.npy", "encoder.safetensors", "cache.json"])
def test_a_cache_with_a_damaged_or_missing_file_is_refused(name, tmp_path):
    demos = toy_demos([9, 8], size=4)
    prepare(tmp_path, demos, SMALL)
    file = world.cache_path(tmp_path, SMALL) / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"missing or damaged .*: delete .* and run again"):
        prepare(tmp_path, demos, SMALL)
    file.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        prepare(tmp_path, demos, SMALL)


def test_a_cache_that_lost_rows_is_refused(tmp_path):
    demos = toy_demos([9, 8], size=4)
    prepare(tmp_path, demos, SMALL)
    np.save(world.cache_path(tmp_path, SMALL) / "z.npy", np.zeros((16, 6), np.float32))
    with pytest.raises(ValueError, match=r"z.npy is \(16, 6\) float32, not one row a frame"):
        prepare(tmp_path, demos, SMALL)


def test_the_encoder_refuses_pictures_and_configs_that_it_was_not_made_for():
    demos = toy_demos([9, 8], size=4)
    encoder = fit(demos, SMALL)
    with pytest.raises(ValueError, match=r"fitted on 4-pixel pictures, got .* render with --size 4"):
        encoder.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"components \(6, 48\), but .* ask for \(5, 48\)"):
        encoder_from_state(encoder.state(), WorldConfig(world_dim=5, world_resolution=4))


BAD_CONFIGS = {
    "--world-camera needs different cameras": {"world_camera": ("image", CAMERA)},
    "--world-resolution 0 must be at least 1": {"world_resolution": 0},
    "--world-dim is 13 with 12 pixels": {"world_dim": 13, "world_resolution": 2},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_a_config_that_cannot_work_is_refused(message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**BAD_CONFIGS[message])


def test_data_that_cannot_carry_the_latents_are_refused():
    demos = toy_demos([3, 3], size=4)
    with pytest.raises(ValueError, match="--world-dim 6 needs more than 6 frames, got 6"):
        fit(demos, SMALL)
    with pytest.raises(ValueError, match="--world-resolution 5 is more than the pictures' 4 pixels"):
        fit(demos, WorldConfig(world_dim=2, world_resolution=5))
    with pytest.raises(ValueError, match=r"--world-camera observation.images.image is not among the loaded"):
        del demos.images[CAMERA]
        fit(demos, SMALL)
    still = flat_demos(1)
    still.images[CAMERA][:] = 7
    with pytest.raises(ValueError, match="the world latents never change"):
        fit(still, SMALL)


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3), st.booleans()
)
def test_change_statistics_match_a_loop_over_episodes(lengths, K, stride, delta):
    demos = toy_demos(lengths, size=1)
    z = torch.randn(len(demos), 3, generator=torch.Generator().manual_seed(0))
    if K * stride >= max(lengths):
        with pytest.raises(ValueError, match=f"lies {K * stride} steps ahead.* {max(lengths)} frames"):
            change_statistics(demos, z, K, stride)
        return
    r, mean = change_statistics(demos, z, K, stride, delta)
    for k in range(K):
        ahead = (k + 1) * stride
        pairs = [
            (t, t + ahead) for a, b in zip(demos.first, demos.last) for t in range(a, b + 1) if t + ahead <= b
        ]
        y = torch.stack([z[then] - z[now] * delta for now, then in pairs])
        torch.testing.assert_close(r[k], y.square().sum(1).mean().sqrt())
        torch.testing.assert_close(mean[k], y.mean(0), atol=1e-6, rtol=1e-5)


def test_the_command_line_writes_once_and_then_only_checks(tmp_path, capsys):
    write_task(tmp_path / "a_demo.hdf5", lengths=(9, 8))
    small = {f.name: getattr(BOTH, f.name) for f in dataclasses.fields(WorldConfig)}
    config = TrainConfig(data=tmp_path, fusion=("late",), prepare=True, **small)
    for word in ("wrote", "checked"):
        train.main(config)
        expected = f"{word} {world.cache_path(tmp_path, BOTH)}: 17 latents of width 6"
        assert expected in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^--world-resolution 9 is more than the pictures' 8 pixels"):
        train.main(dataclasses.replace(config, world_resolution=9))


def test_a_cache_lies_inside_a_data_folder_and_beside_a_data_file(tmp_path):
    name = world.cache_path(tmp_path, SMALL).name
    assert world.cache_path(tmp_path, SMALL) == tmp_path / name
    (tmp_path / "a_demo.hdf5").touch()
    assert world.cache_path(Path(tmp_path / "a_demo.hdf5"), SMALL) == tmp_path / f"a_demo_{name}"
    short = WorldConfig(world_camera=("image",), world_dim=6, world_resolution=4)
    assert world.cache_path(tmp_path, short).name == name


def uneven() -> Demos:
    """Demonstrations of 4:3 pictures from one camera and tall ones from the other."""
    demos, rng = toy_demos([30, 25]), np.random.default_rng(3)
    shapes = dict(zip(demos.images, ((48, 64), (40, 24))))
    images = {c: rng.integers(0, 256, (55, *hw, 3), dtype=np.uint8) for c, hw in shapes.items()}
    return dataclasses.replace(demos, images=images)


def test_pictures_that_are_not_square_or_differ_in_size_are_scaled_whole():
    demos = uneven()
    config = WorldConfig(world_camera=("image", "image2"), world_dim=6, world_resolution=8)
    encoder = fit(demos, config)
    assert encoder.size == ((48, 64), (40, 24))
    frames = {camera: demos.frames(np.arange(4), camera) for camera in demos.images}
    pixels = shrink(views(frames, config), 8).reshape(4, 3, 8, 16)
    for number, (camera, (h, w)) in enumerate(zip(config.latent_cameras, encoder.size)):
        blocks = demos.images[camera][:4].reshape(4, 8, h // 8, 8, w // 8, 3).mean((2, 4)) / 255
        here = pixels[..., 8 * number : 8 * (number + 1)].permute(0, 2, 3, 1)
        np.testing.assert_allclose(here, blocks, atol=1e-6)  # no margin is cut off, none is added
    again = encoder_from_state({n: t.clone() for n, t in encoder.state().items()}, config)
    assert again.size == encoder.size and torch.equal(again.encode(frames), encoder.encode(frames))
    assert scaled(demos, config) == (
        "world latents: pictures of 48 x 64 and 40 x 24 are scaled whole to 8 x 8"
    )
    assert scaled(toy_demos([3]), config) == ""
    with pytest.raises(Refused, match=r"fitted on 48 x 64 and 40 x 24 pictures, got 4-pixel ones"):
        encoder.encode({camera: torch.zeros(1, 3, 4, 4, dtype=torch.uint8) for camera in demos.images})
    with pytest.raises(Refused, match="--world-resolution 25 is more than the pictures' 24 pixels"):
        shrink(views(frames, config), 25)


def test_uneven_pictures_have_a_cache_that_opens(tmp_path):
    demos, config = uneven(), WorldConfig(world_camera=("image2",), world_dim=6, world_resolution=8)
    made, again = (prepare(tmp_path, demos, config) for _ in range(2))
    assert torch.equal(made.z, again.z) and made.encoder.size == again.encoder.size == ((40, 24),)


@pytest.mark.slow
def test_a_camera_that_the_data_have_not_is_one_line():
    data = ROOT / "tests/lerobot_v3/L_image/dataset"
    command = [
        sys.executable,
        "train.py",
        "--prepare",
        "--data",
        data,
        "--fusion",
        "late",
        "--world-camera",
        "wrist",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: --world-camera observation.images.wrist")
    assert len(done.stderr.splitlines()) == 1 and "rename one with --cameras" in done.stderr
