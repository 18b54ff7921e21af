"""A scripted expert for LIBERO's pick-and-place tasks: it reads the simulator's state and returns actions.

Proportional control of the hand (with a small integral term: a steady error of 5 mm hits 66 mm cans) through
the phases above, descend, close, lift, carry, lower, open. Bowls are grasped at the rim where both fingers
have room, boxes and cans across their narrowest width. Measured on init states that it was not tuned on:
libero_spatial 40 of 40, libero_object 40 of 40. Drawers, the stove's knob and pushing are beyond it.

    python -m simulator record --score-only --suite libero_object --task-ids 0-9 --init-states 20-23

Hand frame: x is the axis along which the fingers close, z points down. Lengths in metres, angles in radians.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from files import Refused
from simulator.displace import surface_height
from simulator.env import LiberoEnv
from simulator.goal import Goal

SOLVABLE = {
    "libero_spatial": tuple(range(10)),
    "libero_object": tuple(range(10)),
    "libero_goal": (1, 2, 4, 6, 8, 9),
}
OPEN, CLOSE = -1, 1
KP, KR, KI = 12.0, 4.0, 0.6  # position, rotation, integral gain
DEPTH = 0.05  # fingertips below a box's top: 3 cm leave cartons hanging on one pad
RIM_DEPTH, RIM_INSET = 0.022, 0.006  # fingertips below a bowl's rim, hand centre inside the rim's radius
WIDEST = 0.075  # what the open hand takes; anything wider is a bowl
HIGH = 1.05  # above this height (on the cabinet) the arm is near its reach limit


class EpisodeOver(Exception):
    """The task is solved or the steps are used up."""


@dataclass(frozen=True)
class Grasp:
    """Where the closing hand goes: point (3,) and rotation about the vertical."""

    point: np.ndarray
    yaw: float


def check_solvable(suite: str, task_id: int) -> None:
    """Raise Refused for a task that the expert was not written for."""
    if task_id not in SOLVABLE.get(suite, ()):
        known = "; ".join(f"{name} {', '.join(map(str, ids))}" for name, ids in SOLVABLE.items())
        raise Refused(
            f"the expert does not know {suite} task {task_id}: choose --suite and --task-ids from {known}"
        )


def rotation_z(angle: float) -> np.ndarray:
    """Return the rotation matrix (3, 3) about the vertical."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Return axis times angle (3,) of a rotation (3, 3); zero at 0 and, where the axis is unstable, at pi."""
    angle = np.arccos(np.clip((np.trace(matrix) - 1) / 2, -1, 1))
    if angle < 1e-6 or np.pi - angle <= 1e-3:
        return np.zeros(3)
    skew = matrix - matrix.T
    return angle * np.array([skew[2, 1], skew[0, 2], skew[1, 0]]) / (2 * np.sin(angle))


def body_points(model: Any, data: Any, body: int, solid_only: bool = False) -> np.ndarray:
    """Return points (P, 3) in world coordinates that span a body and its parts.

    Visual meshes count unless `solid_only`: they can be bigger than what collides.
    """
    points = []
    for geom in range(model.ngeom):
        if not _belongs(model, model.geom_bodyid[geom], body):
            continue
        local, is_mesh = _geom_points(model, geom)
        solid = model.geom_contype[geom] or model.geom_conaffinity[geom]
        if local is not None and (solid or (is_mesh and not solid_only)):
            points.append(local @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(points)


def _belongs(model: Any, body: int, ancestor: int) -> bool:
    while body and body != ancestor:
        body = model.body_parentid[body]
    return body == ancestor


def _geom_points(model: Any, geom: int) -> tuple[np.ndarray | None, bool]:
    import mujoco

    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        k = model.geom_dataid[geom]
        start = model.mesh_vertadr[k]
        return model.mesh_vert[start : start + model.mesh_vertnum[k]], True
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        return np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]) * size, False
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        turn = np.linspace(0, 2 * np.pi, 24)
        circle = np.stack([size[0] * np.cos(turn), size[0] * np.sin(turn), np.zeros(24)], axis=1)
        return np.concatenate([circle - [0, 0, size[1]], circle + [0, 0, size[1]]]), False
    return None, False


class Expert:
    """Solves one episode of an environment that was just reset.

    `execute` receives each action (7,), performs it and returns whether the task is solved.
    """

    def __init__(self, env: LiberoEnv, execute: Callable[[np.ndarray], bool]) -> None:
        import mujoco

        self.env, self.execute = env, execute
        self.model, self.data, self.raw = env.model, env.data, env.raw
        self.site = self.raw.robots[0].eef_site_id
        base = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, "robot0_base")
        self.base = self.data.xpos[base][:2].copy()
        self.down = self._pointing_down()
        self.integral, self.last_grip = np.zeros(3), 0
        self.steps, self.solved = 0, False

    def solve(self, goals: Sequence[Goal]) -> bool:
        """Pick and place what the goals ask for, up to three grasps each; return whether it is solved."""
        with contextlib.suppress(EpisodeOver):
            for _, thing, place in goals:
                for _ in range(3):
                    if self._pick_and_place(thing, place):
                        break
        return self.solved

    # ---- control

    def _pointing_down(self) -> np.ndarray:
        """Return the hand's start orientation (3, 3) with its tilt removed."""
        y = self.data.site_xmat[self.site].reshape(3, 3)[:, 1].copy()
        y[2] = 0
        y /= np.linalg.norm(y)
        z = np.array([0, 0, -1.0])
        return np.stack([np.cross(y, z), y, z], axis=1)

    def hand(self) -> np.ndarray:
        """Return the grip site's position (3,)."""
        return self.data.site_xpos[self.site].copy()

    def act(self, target: np.ndarray, yaw: float, grip: int, speed: float = 1.0) -> tuple[float, float]:
        """Execute one action towards a pose; return the distance left and the angle that was left before.

        Raises EpisodeOver when the task is solved or no steps are left.
        """
        error = target - self.hand()
        near = np.abs(error) < 0.04  # integrate only there, or the long way winds the term up
        grown = np.clip(self.integral + KI * error * near, -0.35, 0.35)
        self.integral = grown if grip == self.last_grip else np.zeros(3)
        self.last_grip = grip
        turned = self.data.site_xmat[self.site].reshape(3, 3)
        turn = rotation_vector((rotation_z(yaw) @ self.down) @ turned.T)
        position = np.clip(KP * error + self.integral, -speed, speed)
        self.solved = self.execute(np.concatenate([position, np.clip(KR * turn, -0.5, 0.5), [grip]]))
        self.steps += 1
        if self.solved or self.steps >= self.env.max_steps:
            raise EpisodeOver
        return float(np.linalg.norm(target - self.hand())), float(np.linalg.norm(turn))

    def go(
        self, target: np.ndarray, yaw: float, grip: int, near: float, most: int = 80, speed: float = 1.0
    ) -> None:
        """Act until the hand is within `near` metres and 0.1 rad of a pose, at most `most` steps."""
        self.integral = np.zeros(3)
        for _ in range(most):
            distance, turn = self.act(target, yaw, grip, speed)
            if distance < near and turn < 0.1:
                return

    # ---- one object

    def _pick_and_place(self, thing: str, place: str) -> bool:
        """Carry an object to its place. False: nothing was in the hand, try again."""
        body = self.raw.obj_body_id[thing]
        points = body_points(self.model, self.data, body)
        bottom, top = points[:, 2].min(), points[:, 2].max()
        grasp = self._grasp(body, points)
        goal_xy, goal_top = self._destination(place)
        self._close_on(grasp, above=top + (0.10 if top < HIGH else 0.045))
        lift = max(grasp.point[2] + 0.12, goal_top + (grasp.point[2] - bottom) + 0.06)
        height = self.data.xpos[body][2]
        if not self._lift(body, grasp, lift, height):
            return False
        hanging = self.hand()[2] - body_points(self.model, self.data, body)[:, 2].min()
        self._carry(body, grasp.yaw, goal_xy, lift)
        low = goal_top + hanging + (-0.04 if "basket" in place else 0.004)
        self._release(body, grasp.yaw, goal_xy, low)
        return True

    def _close_on(self, grasp: Grasp, above: float) -> None:
        point = grasp.point
        if self.hand()[2] < above - 0.03:
            self.go(np.r_[self.hand()[:2], above], 0, OPEN, near=0.03)
        self.go(np.r_[point[:2], above], grasp.yaw, OPEN, near=0.02)
        self.go(point + [0, 0, 0.04], grasp.yaw, OPEN, near=0.008, most=40)
        self.go(point, grasp.yaw, OPEN, near=0.006, most=40, speed=0.5)
        for _ in range(10):
            self.act(point, grasp.yaw, CLOSE)

    def _lift(self, body: int, grasp: Grasp, lift: float, height: float) -> bool:
        """Lift; open and return False if the object stayed behind."""
        self.go(np.r_[self.hand()[:2], lift], grasp.yaw, CLOSE, near=0.03)
        position = self.data.xpos[body]
        if position[2] >= height + 0.025 and np.linalg.norm(position - self.hand()) <= 0.15:
            return True
        for _ in range(6):
            self.act(self.hand() + [0, 0, 0.02], grasp.yaw, OPEN)
        return False

    def _carry(self, body: int, yaw: float, goal_xy: np.ndarray, lift: float) -> None:
        offset = self.data.xpos[body][:2] - self.hand()[:2]  # the object hangs off the hand's centre
        self.go(np.r_[goal_xy - offset, lift], yaw, CLOSE, near=0.012)

    def _release(self, body: int, yaw: float, goal_xy: np.ndarray, low: float) -> None:
        """Lower, open and back off; a wiggle along the finger axis frees what sticks to a pad."""
        spot = goal_xy - (self.data.xpos[body][:2] - self.hand()[:2])
        self.go(np.r_[spot, low], yaw, CLOSE, near=0.01, most=40, speed=0.6)
        fingers = (rotation_z(yaw) @ self.down[:, 0])[:2]
        for i in range(24):
            wiggle = 0.012 * np.sin(i * 0.9) * (i > 8)
            self.act(np.r_[spot + wiggle * fingers, low], yaw, OPEN)
        self.go(np.r_[self.hand()[:2], low + 0.12], yaw, OPEN, near=0.02, most=20)
        for _ in range(10):
            self.act(self.hand(), yaw, OPEN)

    def _destination(self, place: str) -> tuple[np.ndarray, float]:
        """Return the place's centre (2,) and its height."""
        bodies = self.raw.obj_body_id
        if place in bodies:
            top = body_points(self.model, self.data, bodies[place])[:, 2].max()
            return self.data.xpos[bodies[place]][:2].copy(), top
        centre = self.data.site(place).xpos.copy()
        if "basket" in place:
            centre[2] = body_points(self.model, self.data, bodies["basket_1"])[:, 2].max()
        return centre[:2], centre[2]

    # ---- where to grasp

    def _grasp(self, body: int, points: np.ndarray) -> Grasp:
        solid = body_points(self.model, self.data, body, solid_only=True)
        yaws = np.deg2rad(np.arange(-90, 91, 5))
        widths = np.array([np.ptp(solid @ (rotation_z(yaw) @ self.down[:, 0])) for yaw in yaws])
        if widths.min() > WIDEST:
            return self._rim_grasp(body, points)
        yaw = float(yaws[np.argmin(widths + 0.012 * np.abs(yaws) / (np.pi / 2))])
        return self._box_grasp(body, points, solid, yaw)

    def _highest(self, centre: np.ndarray, along: np.ndarray, xs: tuple, ys: tuple, body: int) -> float:
        """Return the highest surface on a grid of offsets along and across a direction (2,)."""
        across = np.array([-along[1], along[0]])
        places = (centre + along * x + across * y for x in xs for y in ys)
        return max(surface_height(self.model, self.data, place, body) for place in places)

    def _box_grasp(self, body: int, points: np.ndarray, solid: np.ndarray, yaw: float) -> Grasp:
        """Close across the narrowest width; slide along the other axis if the hand would hit a neighbour."""
        bottom, top = points[:, 2].min(), points[:, 2].max()
        flat = top - bottom < 0.05
        z = max((top + bottom) / 2, bottom + 0.013) if flat else max(top - DEPTH, bottom + 0.012)
        along = rotation_z(yaw) @ self.down[:, 0]
        middle = (np.max(solid @ along) + np.min(solid @ along)) / 2
        along = along[:2]
        across = np.array([-along[1], along[0]])
        side = solid[:, :2] @ across
        best, best_cost = None, np.inf
        for slide in (0, 0.01, -0.01, 0.02, -0.02, 0.03, -0.03):
            if abs(slide) > np.ptp(side) / 2 - 0.008:
                continue
            centre = along * middle + across * ((side.max() + side.min()) / 2 + slide)
            palm = self._highest(centre, along, (-0.105, -0.075, 0.075, 0.105), (-0.035, 0, 0.035), body)
            finger = self._highest(centre, along, (-0.058, -0.045, 0.045, 0.058), (-0.012, 0, 0.012), body)
            cost = max(0, palm - (z + 0.055)) + max(0, finger - (z - 0.012)) + 0.1 * abs(slide)
            if cost < best_cost - 1e-9:
                best, best_cost = np.r_[centre, z], cost
        if best is None:  # narrower than the smallest slide allows: its middle
            best = np.r_[along * middle + across * (side.max() + side.min()) / 2, z]
        return Grasp(best, yaw)

    def _rim_grasp(self, body: int, points: np.ndarray) -> Grasp:
        """Straddle a bowl's wall at the rim angle where the outer finger and the palm have most room."""
        frame, origin = self.data.xmat[body].reshape(3, 3), self.data.xpos[body].copy()
        local = (points - origin) @ frame
        top = local[:, 2].max()
        rim = local[local[:, 2] > top - 0.008]
        centre = (rim.min(0) + rim.max(0)) / 2
        radius = (rim.max(0) - rim.min(0))[:2].mean() / 2 - RIM_INSET
        middle = origin + frame @ np.r_[centre[:2], top]
        best, best_cost = None, np.inf
        for angle in np.deg2rad(np.arange(0, 360, 15)):
            edge = np.r_[centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle), top]
            for inward in (0.0, 0.012, 0.022):  # inside a drawer the outer finger needs it
                grasp, cost = self._rim_cost(body, origin + frame @ edge, middle, inward)
                if cost < best_cost:
                    best, best_cost = grasp, cost
        return best

    def _rim_cost(
        self, body: int, edge: np.ndarray, middle: np.ndarray, inward: float
    ) -> tuple[Grasp, float]:
        outward = (edge - middle)[:2] / np.linalg.norm((edge - middle)[:2])
        start = np.arctan2(self.down[1, 0], self.down[0, 0])
        yaw = float((np.arctan2(outward[1], outward[0]) - start + np.pi / 2) % np.pi - np.pi / 2)
        xy, z = edge[:2] - outward * inward, edge[2] - RIM_DEPTH
        finger = self._highest(xy, outward, (0.036, 0.048, 0.06), (-0.012, 0, 0.012), body)
        palm = self._highest(xy, outward, (-0.10, -0.06, 0.06, 0.10), (-0.03, 0, 0.03), body)
        cost = 100 * max(0, finger - (z - 0.014)) + 100 * max(0, palm - (z + 0.05))
        cost += abs(yaw) * 0.3 + 0.5 * np.linalg.norm(xy - self.hand()[:2]) + 20 * inward
        cost += 40 * (middle[2] - edge[2])  # the rim's higher side of a tilted bowl
        if edge[2] > HIGH:
            cost += 8 * np.linalg.norm(xy - self.base)  # the near side: the far one is out of reach
        return Grasp(np.r_[xy, z], yaw), float(cost)
