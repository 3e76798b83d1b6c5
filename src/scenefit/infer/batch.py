"""Fits of many small scenes of the same structure, such as single galaxies on stamps, in one compiled loop."""

from __future__ import annotations

import time
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from tqdm.auto import tqdm

from scenefit.arrays.compilation import compiled
from scenefit.data.observation import Observation
from scenefit.infer import posterior, solvers
from scenefit.infer.dense import MAX_COORDINATES, dense_footprints
from scenefit.infer.fit import FitResult, Status, linear_coordinates, matched
from scenefit.infer.footprints import Footprints
from scenefit.infer.information import information
from scenefit.infer.problem import Problem, State
from scenefit.infer.slopes import slopes_of_stamps, untied
from scenefit.infer.solvers import SolverState
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene

STEPS_PER_ROUND = 4
"""On accelerators, steps of all scenes of a batch together before those that have converged make room for others."""


class _Lane(eqx.Module):
    """One scene of a batch on its way."""

    carry: SolverState
    num_steps: Int[Array | np.ndarray, ""]
    remaining: Float[Array | np.ndarray, ""]
    is_done: Bool[Array | np.ndarray, ""]


def fit_many(
    scenes: Sequence[Scene],
    observations: Sequence[Observation | Sequence[Observation]],
    parameters: Sequence[Parameters] | None = None,
    *,
    rtol: float = 0.02,
    max_steps: int = 60,
    batch_size: int = 64,
    progress: bool = True,
) -> list[FitResult]:
    """Fit many scenes, each to its own observations, as `fit` does with few parameters.

    Scenes of the same structure (sources, image shapes, what is free) share one compiled loop. On CPUs it takes them one after
    the other, each until it has converged; on accelerators they move together, a few steps at a time, and those that have
    converged make room for others.

    Parameters
    ----------
    scenes : sequence of Scene
        Starts; their profiles are evaluated on the whole frame.
    observations : sequence of Observation, or of sequences of them
        For each scene. Those that have the same frame, PSF object, WCS object and shape are prepared once.
    parameters : sequence of Parameters, optional
        For each scene; the default ones if not given.
    rtol : float
        As in `fit`.
    max_steps : int
        Steps at most.
    batch_size : int
        Scenes in a compiled loop.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    list of FitResult
        In the order of the scenes. One that fails has a status that says so, and its start; it doesn't stop the others. If
        interrupted (Ctrl-C), those not finished have the status INTERRUPTED.

    Raises
    ------
    ValueError
        If the numbers of scenes, observations and parameters differ, or a scene has free images or too many parameters.
    """
    counts = {len(scenes), len(observations), *([] if parameters is None else [len(parameters)])}
    if len(counts) > 1:
        raise ValueError(f"fit_many wants as many observations (and parameters) as scenes; got {sorted(counts)}.")
    known: dict = {}
    members = [
        _Member(scene, obs, None if parameters is None else parameters[n], known, n)
        for n, (scene, obs) in enumerate(zip(scenes, observations, strict=True))
    ]
    groups: dict = {}
    for member in members:
        groups.setdefault(member.structure, []).append(member)
    with tqdm(total=len(members), desc="fit_many", disable=not progress, unit="scene") as bar:
        try:
            for group in groups.values():
                _run_group(group, rtol, max_steps, batch_size, bar)
        except KeyboardInterrupt:
            pass
    return [member.result(max_steps) for member in members]


class _Member:
    """A scene of the list: its packed problem, and where its fit has come to."""

    def __init__(self, scene: Scene, observations, parameters, known: dict, number: int):
        observations = [observations] if isinstance(observations, Observation) else list(observations)
        self.scene, self.begin = scene, time.perf_counter()
        self.observations = [matched(obs, scene.frame, known) for obs in observations]
        self.parameters = Parameters.default(scene, self.observations) if parameters is None else parameters
        self.parameters.check_anchored(scene, self.observations)
        self.problem, self.state, self.layout = posterior.build(
            scene, self.observations, self.parameters, whole_frame=True
        )
        where = dense_footprints(self.problem, self.layout, scene, self.observations)
        if where is None:
            raise ValueError(
                f"Scene {number}: fit_many wants 1 to {MAX_COORDINATES} free numbers and no free image; use fit()."
            )
        self.footprints: Footprints = where
        leaves, tree = jax.tree.flatten((self.problem, self.state, self.footprints))
        self.structure = tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        self.lane: _Lane | None = None

    def result(self, max_steps: int) -> FitResult:
        """Return what has come of it."""
        lane = self.lane
        if lane is None or not np.isfinite(lane.carry.loss):
            status = Status.INTERRUPTED if lane is None else Status.FAILED
            scene, observations, loss, steps = self.scene, tuple(self.observations), float("nan"), 0
        else:
            scene, observations = posterior.unpack(
                self.problem, lane.carry.best, self.layout, self.scene, self.observations
            )
            loss, steps = float(lane.carry.loss), int(lane.num_steps)
            status = Status.CONVERGED if lane.is_done else Status.INTERRUPTED
            if not lane.is_done and steps >= max_steps:
                status = Status.MAX_STEPS
            if not lane.is_done and float(lane.carry.damping) >= solvers.MAX_DAMPING:
                status = Status.STALLED
        history = {"remaining": np.array([float("nan") if lane is None else float(lane.remaining)])}
        return FitResult(scene, observations, self.parameters, status, loss, history, steps, {})


def _run_group(members: list[_Member], rtol: float, max_steps: int, batch_size: int, bar):
    """Run the fits of members of one structure."""
    on_cpu = jax.default_backend() == "cpu"
    steps = max_steps if on_cpu else STEPS_PER_ROUND
    waiting, size = list(members), min(batch_size, len(members))
    linear = linear_coordinates(members[0].problem)
    while waiting:
        chosen, waiting = waiting[:size], waiting[size:]
        # A short batch is filled up with copies that are done already.
        rows = [*chosen, *[chosen[0]] * (size - len(chosen))]
        lanes = [_start(member) if member.lane is None else member.lane for member in rows]
        for n in range(len(chosen), size):
            lanes[n] = eqx.tree_at(lambda lane: lane.is_done, lanes[n], np.asarray(True))
        problems, batch = _stacked([member.problem for member in rows]), _stacked(lanes)
        limits = np.asarray(rtol, np.float32), np.asarray(steps, np.int32), np.asarray(max_steps, np.int32)
        batch = jax.device_get(_advance(problems, batch, members[0].footprints, linear, limits, on_cpu))
        for n, member in enumerate(chosen):
            member.lane = lane = jax.tree.map(lambda leaf, n=n: leaf[n], batch)
            if _goes_on(lane, max_steps):
                waiting.append(member)
            else:
                bar.update()


def _start(member: _Member) -> _Lane:
    """Return the lane of a member before its first step."""
    carry = jax.tree.map(np.asarray, solvers.start(member.problem, member.state, dense=True))
    return _Lane(carry, np.asarray(0, np.int32), np.asarray(np.inf, carry.loss.dtype), np.asarray(False))


def _goes_on(lane: _Lane, max_steps):
    """Return whether a lane has steps left to take."""
    failed = (lane.num_steps > 0) & ~np.isfinite(lane.carry.loss)
    stalled = lane.carry.damping >= solvers.MAX_DAMPING
    return not (lane.is_done or failed or stalled or lane.num_steps >= max_steps)


def _stacked(trees):
    """Return trees of arrays as one, stacked along a first axis, on the host."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


@compiled
def _advance(problems: Problem, lanes: _Lane, where: Footprints, linear, limits, on_cpu: bool) -> _Lane:
    """Take steps in all lanes until they have converged, or as many as the limits allow."""
    rtol, steps, max_steps = limits

    def one(row):
        problem, lane = row
        last = jnp.minimum(lane.num_steps + steps, max_steps)

        def advance(lane: _Lane) -> _Lane:
            first = lane.num_steps == 0
            free = State(problem.free.vector & (linear | ~first), problem.free.images)
            part = eqx.tree_at(lambda p: p.free, problem, free)
            slopes = slopes_of_stamps(*untied(part, lane.carry.trial))
            matrix = information(part, lane.carry.trial, where, slopes=slopes)
            carry, report = solvers.dense_step(part, lane.carry, where, slopes, matrix)
            remaining = report.remaining
            done = ~first & report.accepted & (remaining < rtol)
            return _Lane(carry, lane.num_steps + 1, remaining, done)

        def goes_on(lane: _Lane):
            failed = (lane.num_steps > 0) & ~jnp.isfinite(lane.carry.loss)
            stalled = lane.carry.damping >= solvers.MAX_DAMPING
            return ~lane.is_done & ~failed & ~stalled & (lane.num_steps < last)

        return lax.while_loop(goes_on, advance, lane)

    return lax.map(one, (problems, lanes), batch_size=None if on_cpu else len(lanes.is_done))
