"""One control step of robosuite, 25 of physics, with each thing computed once: the same states to the bit.

robosuite runs MuJoCo's whole forward pass three times a physics step: for itself, for its controller, and in
`mj_step`. What positions and velocities decide (kinematics, collisions, the mass matrix) is the same in all
three and is computed once. What differs is kept: the constraint solver goes on from its own last answer, so
it runs three times here too. Success is asked for once a step, not twice, and what robosuite notes of the
arm's past, which nobody reads, is left out. Torques are its own controller's and gripper's.

    pytest -m '' tests/simulator/test_control_step.py     # against robosuite's own step
    python -m bench sim --only control               # how much faster

Shapes: V degrees of freedom of the scene; 7 joints of the arm.
"""

from typing import Any

import numpy as np

NO_STAGE, SENSORS = 0, 1  # what mj_forwardSkip skips; nobody reads sensors so early


class ControlStep:
    """Steps robosuite's environment `raw`; to be made anew after each reset, which replaces its parts.

    observable: the one of its observables that is kept up to date.
    """

    def __init__(self, raw: Any, observable: str) -> None:
        robot, self.seen = raw.robots[0], raw._observables[observable]
        self.raw, self.controller, self.gripper = raw, robot.controller, robot.gripper
        self.model, self.data = raw.sim.model._model, raw.sim.data._data
        self.substeps = int(raw.control_timestep / raw.model_timestep)
        self.site = raw.sim.model.site_name2id(self.controller.eef_name)
        self.joints, self.dofs = np.array(self.controller.qpos_index), np.array(self.controller.qvel_index)
        self.jacobian = np.zeros((6, self.model.nv))
        self.mass = np.zeros((self.model.nv, self.model.nv))
        self.arm = np.array(robot._ref_joint_actuator_indexes)
        self.fingers = np.array(robot._ref_joint_gripper_actuator_indexes)
        self.low, self.high = robot.torque_limits
        limits = self.model.actuator_ctrlrange[self.fingers]  # (2, 2)
        self.middle, self.half = 0.5 * (limits[:, 1] + limits[:, 0]), 0.5 * (limits[:, 1] - limits[:, 0])

    def __call__(self, action: np.ndarray) -> bool:
        """Execute an action (7,); return whether the task is solved, as LIBERO's own `step` does."""
        import mujoco

        raw, model, data, controller = self.raw, self.model, self.data, self.controller
        assert not raw.done, "this episode is over: reset the environment"
        raw.timestep += 1
        for substep in range(self.substeps):
            mujoco.mj_forwardSkip(model, data, NO_STAGE, SENSORS)
            if controller.new_update:  # not in the first, which goes by the reset's state
                mujoco.mj_fwdConstraint(model, data)
                self.tell_controller()
            if substep == 0:
                controller.set_goal(action[:6])
            data.ctrl[self.arm] = np.minimum(np.maximum(controller.run_controller(), self.low), self.high)
            data.ctrl[self.fingers] = self.middle + self.half * self.gripper.format_action(action[6:])
            mujoco.mj_step2(model, data)
            self.seen.update(raw.model_timestep, raw._obs_cache)
        raw.cur_time += raw.control_timestep
        raw.done = raw.timestep >= raw.horizon
        solved = raw._check_success()
        raw._post_process()
        return bool(solved)

    def tell_controller(self) -> None:
        """Give the controller the arm's state, as its own `update` does after one more forward pass."""
        import mujoco

        model, data, controller = self.model, self.data, self.controller
        position, rotation = self.jacobian[:3], self.jacobian[3:]  # (3, V) each
        mujoco.mj_jacSite(model, data, position, rotation, self.site)
        mujoco.mj_fullM(model, self.mass, data.qM)  # (V, V)
        controller.ee_pos = data.site_xpos[self.site].copy()
        controller.ee_ori_mat = data.site_xmat[self.site].reshape(3, 3).copy()
        controller.ee_pos_vel, controller.ee_ori_vel = position @ data.qvel, rotation @ data.qvel
        controller.joint_pos, controller.joint_vel = data.qpos[self.joints], data.qvel[self.dofs]
        # Columns are picked as robosuite does: their order in memory decides how sums are rounded.
        controller.J_full = self.jacobian[:, self.dofs]  # (6, 7)
        controller.J_pos, controller.J_ori = position[:, self.dofs], rotation[:, self.dofs]
        controller.mass_matrix = self.mass[self.dofs, :][:, self.dofs]  # (7, 7)
        controller.new_update = False
