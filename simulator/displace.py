"""Where a displaced object may lie: free of others, in reach, and on as flat and high a surface as shipped.

LIBERO's init states barely vary, so a policy may solve a task without seeing. `env.py` shifts the objects
that a task's goal says to pick (`--displace`); here a place is drawn and checked, by ray casts into the
scene.

    pytest tests/simulator/test_displace.py

Shapes: O other objects; S the init-state vector (time, qpos, qvel).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

CLEARANCE = 0.085  # metres between the centres of a displaced object and any other
REACH = (0.35, 0.80)  # metres from the robot's base in which a displaced object may lie


def free_position(
    shipped: np.ndarray,
    others: np.ndarray,
    displace: float,
    generator: np.random.Generator,
    allowed: Callable[[np.ndarray], bool] = lambda _: True,
    tries: int = 200,
) -> np.ndarray:
    """Shift an object uniformly in [-displace, displace]^2 metres to a place that is free.

    shipped (2,), others (O, 2) are the objects' centres. A draw is rejected within `CLEARANCE` of another
    object or where `allowed` says no; when all draws are, the object keeps its shipped place (a bowl on a
    ramekin does).
    """
    for _ in range(tries):
        place = shipped + generator.uniform(-displace, displace, 2)
        far = len(others) == 0 or np.linalg.norm(others - place, axis=1).min() > CLEARANCE
        if far and allowed(place):
            return place
    return shipped.copy()


class Surface:
    """Heights of a scene's solid surfaces, by ray casts in a copy of its data."""

    def __init__(self, model: Any, start: np.ndarray) -> None:
        import mujoco

        self.mujoco, self.model, self.data = mujoco, model, mujoco.MjData(model)
        base = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, "robot0_base")
        self.place(start)
        self.base = self.data.xpos[base][:2].copy()

    def place(self, start: np.ndarray) -> None:
        """Put the scene in an init-state vector's positions."""
        self.data.qpos[:] = start[1 : 1 + self.model.nq]
        self.mujoco.mj_kinematics(self.model, self.data)

    def height(self, xy: np.ndarray, skip: int) -> float:
        """Return the highest surface under a point in metres, without robot and body `skip`; -1: none."""
        return surface_height(self.model, self.data, xy, skip)

    def radius(self, body: int) -> float:
        """Return how far a movable object reaches from its centre, horizontally, in metres."""
        model, corners = self.model, np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
        farthest = 0.0
        for geom in np.flatnonzero((model.body_rootid[model.geom_bodyid] == body) & (model.geom_group == 0)):
            box = model.geom_aabb[geom]  # centre and half sides in the shape's own frame
            points = (box[:3] + corners * box[3:]) @ self.data.geom_xmat[geom].reshape(3, 3).T
            offset = (points + self.data.geom_xpos[geom] - self.data.xpos[body])[:, :2]
            farthest = max(farthest, float(np.linalg.norm(offset, axis=1).max()))
        return farthest

    def keeps(self, body: int, shipped: np.ndarray) -> Callable[[np.ndarray], bool]:
        """Return a test: does the object stand as flat and high elsewhere, in reach, 2 cm around it free?"""
        radius = self.radius(body)
        support = self.height(shipped, body)
        angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        ring = np.concatenate([np.zeros((1, 2)), circle * radius / 2, circle * (radius + 0.02)])

        def test(place: np.ndarray) -> bool:
            reach = np.linalg.norm(place - self.base)
            heights = (self.height(place + offset, body) for offset in ring)
            return REACH[0] <= reach <= REACH[1] and all(abs(h - support) < 0.005 for h in heights)

        return test


def surface_height(model: Any, data: Any, xy: np.ndarray, skip: int) -> float:
    """Return the top of what is solid under (x, y) in metres, without robot and body `skip`; -1: none."""
    import mujoco

    solid = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)  # geom group 0 holds LIBERO's collision shapes
    down, hit, z = np.array([0.0, 0.0, -1.0]), np.array([-1], dtype=np.int32), 1.6
    for _ in range(30):
        distance = mujoco.mj_ray(model, data, np.array([xy[0], xy[1], z]), down, solid, 1, skip, hit)
        if distance < 0:
            return -1.0
        z -= distance
        if not model.body(model.geom_bodyid[hit[0]]).name.startswith(("robot0", "gripper0")):
            return float(z)
        z -= 0.002  # go on below the robot's part
    return -1.0
