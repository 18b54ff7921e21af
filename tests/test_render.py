"""Drawing without a display: which GL library is chosen, and what decimation leaves of a mesh."""

import sys

import numpy as np
import pytest

import render


def test_decimation_keeps_the_outline_and_drops_collapsed_faces():
    vertices = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    faces = np.random.default_rng(1).integers(0, 500, (900, 3))
    merged, kept = render.decimated_mesh(vertices, faces, 4)
    assert len(merged) == kept.sum() <= 900 and set(merged.ravel()) <= set(range(500))
    assert all(len(set(face)) == 3 for face in merged.tolist())
    assert np.abs(vertices[merged] - vertices[faces[kept]]).max() <= 2 / 4 + 1e-9  # no vertex leaves its cell


def test_a_missing_gl_library_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(render, "_egl_devices", lambda: 0)
    monkeypatch.setattr(render.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no library")))
    with pytest.raises(RuntimeError, match="apt-get install libegl1"):
        render.setup_gl()


def test_a_users_gl_backend_stays(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    assert render.setup_gl() == "osmesa"


def test_only_a_drawing_process_forgets_gpus_that_egl_does_not_know(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.setattr(render, "_egl_devices", lambda: 1)
    render.setup_gl()
    assert render.os.environ["CUDA_VISIBLE_DEVICES"] == "5"  # a policy may be about to compute there
    render.free_egl_device()
    assert "CUDA_VISIBLE_DEVICES" not in render.os.environ
