"""Fitting: find the most probable scene and observation parameters."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import numpy as np
from tqdm.auto import tqdm

from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_booleans, as_floats, as_integers, compile_together, compiled, make_room
from scenefit.data.observation import Observation
from scenefit.infer import posterior, solvers
from scenefit.infer.dense import MAX_COORDINATES, dense_footprints
from scenefit.infer.footprints import Footprints
from scenefit.infer.information import information
from scenefit.infer.problem import LINEAR_LEAVES, Problem, State
from scenefit.infer.quadratic import curvature_probes
from scenefit.infer.slopes import blank_slopes, stamp_slopes
from scenefit.model.morphology import AbstractImageMorphology
from scenefit.model.packing import component_box
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import pixel_map

FIRST_ITERATIONS, MAX_ITERATIONS = 3, 400
"""Conjugate-gradient iterations of a round in the first step, doubled with every step, and at most: the first quadratic
models aren't worth more."""
LINEAR_STEPS = 2
"""First steps in which only fluxes and backgrounds move: an exact linear solve but for the bounds."""
GROWTH_RATIO, GROWTH_SIGNIFICANCE, MAX_GROWTHS = 1.4, 5.0, 3
"""A stamp grows by this ratio where the residual light just outside it exceeds so many standard errors, so many times."""
ANALYTIC_GROWTH, NEARLY_FULL = 1.1, 0.7
"""The stamp of an analytic profile is made anew where it has become larger than it was by this ratio; then those get more room as
well that have come this near."""
GROWTH_TOLERANCE = CAREFUL_TOLERANCE = 4.0
"""Stamps of images are checked, and steps computed carefully, once the fit is within this multiple of its tolerance."""
EARLY_GROWTH = 0.7
"""Stamps of profiles are checked once the minimum is thought to be nearer than this, in standard deviations: on larger ones it is
elsewhere."""
SETTLED, UNSETTLED = (0.8, 0.2), 0.1
"""How far conjugate gradients go: quickly at first, then carefully, since their end says how far the minimum is. Where
they ended by their number instead, that is less certain: the tolerance is by this factor smaller."""
METHODS = ("auto", "dense", "iterative")


class Status(enum.Enum):
    """How a fit ended."""

    CONVERGED = "converged"
    MAX_STEPS = "reached max_steps before it converged"
    STALLED = "stalled: no step lowers the loss to the precision of the arithmetic"
    INTERRUPTED = "interrupted"
    FAILED = "the model isn't finite at the start"


class FitResult(eqx.Module):
    """The outcome of a fit.

    Attributes
    ----------
    scene : Scene
    observations : tuple of Observation
        Matched, with fitted offsets and backgrounds.
    parameters : Parameters
        What was free.
    status : Status
    loss : float
        Minus the log-density of data and parameters, up to a constant: half the chi-square minus the log-prior, if the noise
        is Gaussian and has no parameters.
    history : dict of array
        One entry a step: "step", "loss", "seconds", "products" (pairs of a forward and an adjoint rendering so far),
        "projected_gradient", "remaining" (distance to the minimum of the quadratic model in standard deviations: root mean
        square over the free parameters that the data determine).
    num_steps : int
    timing : dict of float
        Seconds by stage.
    """

    scene: Scene
    observations: tuple[Observation, ...]
    parameters: Parameters
    status: Status = eqx.field(static=True)
    loss: float
    history: dict[str, np.ndarray]
    num_steps: int
    timing: dict[str, float]

    @property
    def is_converged(self) -> bool:
        """Whether the fit met its tolerance."""
        return self.status is Status.CONVERGED

    def __repr__(self) -> str:
        shown = ", ".join(obs.name for obs in self.observations)
        seconds = f" and {self.timing['fit']:.1f} s" if "fit" in self.timing else ""
        return (
            f"FitResult: {self.status.value} after {self.num_steps} steps{seconds}; loss {self.loss:.6g}; "
            f"{len(self.scene.sources)} sources in {shown}"
        )


_step = compiled(solvers.gauss_newton_step)
_dense_step, _information = compiled(solvers.dense_step), compiled(information)


def fit(
    scene: Scene,
    observations: Sequence[Observation] | Observation,
    parameters: Parameters | None = None,
    *,
    method: str = "auto",
    rtol: float = 0.02,
    max_steps: int = 100,
    progress: bool = True,
    callback: Callable[[int, dict], None] | None = None,
    throw: bool = False,
) -> FitResult:
    """Fit a scene, and what is free in the observations, to all data together.

    Minimises half the chi-square minus the log-prior over the free parameters, each in its range.

    Parameters
    ----------
    scene : Scene
        Start; not changed.
    observations : sequence of Observation
        Matched to the scene's frame here.
    parameters : Parameters, optional
        What is free; `Parameters.default(scene, observations)` if not given.
    method : "auto", "dense" or "iterative"
        How Gauss-Newton steps are computed (see `scenefit.infer.solvers`): by the Hessian matrix; or by conjugate gradients, for
        free images and many parameters. By default the former where it is possible.
    rtol : float
        Converged when, by a quadratic model solved with care, the minimum is nearer than this fraction of the standard
        deviations of the free parameters (root mean square over those that the data determine).
    max_steps : int
        Steps at most.
    progress : bool
        Whether to show a progress bar on standard error.
    callback : callable, optional
        Called after every step with its number and a dict of the history's entries.
    throw : bool
        Whether to raise RuntimeError if the fit doesn't converge.

    Returns
    -------
    FitResult
        Also when interrupted (Ctrl-C): then with the best state so far.

    Raises
    ------
    ValueError
        If shifts, rotations or flux scales are free without an anchor (`Parameters.check_anchored`), names repeat, a start is out
        of its range or the model isn't finite.
    RuntimeError
        If `throw` and the fit didn't converge.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}; got {method!r}.")
    observations = [observations] if isinstance(observations, Observation) else list(observations)
    begin = time.perf_counter()
    make_room()
    observations = [obs.match(scene.frame) for obs in observations]
    matched = time.perf_counter()
    parameters = Parameters.default(scene, observations) if parameters is None else parameters
    parameters.check_anchored(scene, observations)
    run = _Run(scene, observations, parameters, method, rtol, max_steps, callback)
    with tqdm(total=max_steps, desc="fit", disable=not progress, leave=True, unit="step") as bar:
        status = run.finish(bar)
    result = run.result(status)
    end = time.perf_counter()
    result.timing.update(match=matched - begin, fit=end - matched)
    if throw and status is not Status.CONVERGED:
        raise RuntimeError(f"The fit didn't converge: {status.value}, after {result.num_steps} steps.")
    return result


class _Run:
    """A fit on its way: the present packing and solver state, and the history."""

    def __init__(self, scene, observations, parameters, method, rtol, max_steps, callback):
        self.method = method
        self.scene, self.observations, self.parameters = scene, observations, parameters
        self.rtol, self.max_steps, self.callback = rtol, max_steps, callback
        self.rows: list[dict] = []
        self.growths, self.roomy = 0, frozenset()
        self.footprints: Footprints | None = None
        self.has_profiles = any(not isinstance(c.morphology, AbstractImageMorphology) for _, c in scene.components())
        self.begin = time.perf_counter()
        self.pack()

    def pack(self):
        """Pack the present scene and start the solver on it."""
        built = posterior.build(self.scene, self.observations, self.parameters, roomy=self.roomy)
        self.problem, state, self.layout = built
        if self.method != "iterative":
            self.footprints = dense_footprints(self.problem, self.layout, self.scene, self.observations, quick=True)
        if self.method == "dense" and self.footprints is None:
            raise ValueError(
                f"method='dense' wants 1 to {MAX_COORDINATES} free numbers and no free image; use 'auto', or fix some."
            )
        self.carry = solvers.start(self.problem, state, dense=self.footprints is not None)
        self.linear_steps = LINEAR_STEPS if self.footprints is None else 1
        self.probes = curvature_probes(self.problem)
        self.is_compiled = False

    def compile(self, where: Footprints):
        """Compile the parts of a step by the Hessian matrix: the one that takes longest first."""
        at, slopes = (self.problem, self.carry.trial), blank_slopes(self.problem)
        matrix = as_floats(np.zeros((len(where), len(where))))
        compile_together(
            (_dense_step, (self.problem, self.carry, where, slopes, matrix)),
            (stamp_slopes, at),
            (_information, (*at, where, "score", slopes)),
        )
        self.is_compiled = True

    def finish(self, bar) -> Status:
        """Step until converged, stalled, out of steps or interrupted."""
        try:
            while len(self.rows) < self.max_steps:
                self.step(bar)
                row = self.rows[-1]
                linear = len(self.rows) <= self.linear_steps
                if row["accepted"] and not linear:
                    if row["remaining"] < max(EARLY_GROWTH, GROWTH_TOLERANCE * self.rtol) and self.grow(
                        row["remaining"]
                    ):
                        continue
                    if row["careful"] and row["remaining"] < self.rtol * (1.0 if row["settled"] else UNSETTLED):
                        return Status.CONVERGED
                if float(self.carry.damping) >= solvers.MAX_DAMPING:
                    return Status.STALLED
        except KeyboardInterrupt:
            return Status.INTERRUPTED
        return Status.MAX_STEPS

    def step(self, bar):
        """Take one step and write down what it did."""
        number = len(self.rows)
        problem = _linear_only(self.problem) if number < self.linear_steps else self.problem
        iterations = min(MAX_ITERATIONS, FIRST_ITERATIONS * 2**number)
        near = number > self.linear_steps and self.rows[-1]["remaining"] < CAREFUL_TOLERANCE * self.rtol
        careful = self.footprints is not None or near
        settled = as_floats(SETTLED[careful])
        if self.footprints is not None:
            carry, report = self.dense_step(problem, self.footprints)
        else:
            carry, report = _step(problem, self.carry, self.probes, as_integers(iterations), settled)
        report = jax.device_get(report)
        if number == 0 and not np.isfinite(report.loss):
            raise ValueError("The model isn't finite at the start: check the fluxes and shapes of the scene.")
        self.carry = carry
        total = self.rows[-1]["products"] if self.rows else 0
        row = {
            "step": number,
            "loss": float(report.loss),
            "seconds": time.perf_counter() - self.begin,
            "products": total + int(report.num_products),
            "projected_gradient": float(report.projected_gradient),
            "remaining": float(report.remaining),
            "accepted": bool(report.accepted),
            "careful": careful,
            "settled": bool(report.is_settled),
        }
        self.rows.append(row)
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.6g}", remaining=f"{row['remaining']:.2g}")
        if self.callback is not None:
            self.callback(number, row)

    def dense_step(self, problem: Problem, where: Footprints):
        """Take a step by the Hessian matrix."""
        if not self.is_compiled:
            self.compile(where)
        slopes = stamp_slopes(problem, self.carry.trial)
        matrix = _information(problem, self.carry.trial, where, "score", slopes)
        return _dense_step(problem, self.carry, where, slopes, matrix)

    def grow(self, remaining: float) -> bool:
        """Enlarge the stamps that light leaves, and start anew on these; return whether there were any."""
        near = remaining < GROWTH_TOLERANCE * self.rtol
        if self.growths >= MAX_GROWTHS or not (near or self.has_profiles):
            return False
        scene, observations = self.unpack()
        views = []
        if near:
            residuals = jax.device_get(self.carry.residuals)
            views = [_View(obs, residual) for obs, residual in zip(observations, residuals, strict=True)]
        grown, full = {}, set()
        for member, (path, component) in zip(self.layout.members, scene.components(), strict=True):
            if isinstance(component.morphology, AbstractImageMorphology):
                larger = _grown(component, component.morphology, scene.frame, views) if near else None
            else:
                # Analytic stamps follow from the shape, which has changed since they were packed.
                # On the frame: little depends on what lies beyond, and new stamps are compiled anew.
                now = max(component_box(component, scene.frame).intersection(scene.frame.box).shape)
                room = max(member.box.intersection(scene.frame.box).shape)
                larger = component if now > ANALYTIC_GROWTH * room else None
                if now > NEARLY_FULL * room:
                    full.add(path)
            if larger is not None:
                grown[path] = larger
        if not grown:
            self.growths = MAX_GROWTHS if near else self.growths
            return False
        self.growths += 1
        self.roomy |= full
        sources = {n: _with_components(s, f"sources.{n}", grown) for n, s in scene.sources.items()}
        self.scene, self.observations = Scene(scene.frame, sources), list(observations)
        self.parameters = _refreshed(self.parameters, self.scene, self.observations)
        self.pack()
        return True

    def unpack(self):
        """Return the best scene and observations so far."""
        return posterior.unpack(self.problem, self.carry.best, self.layout, self.scene, self.observations)

    def result(self, status: Status) -> FitResult:
        """Return the best state so far as a result."""
        scene, observations = self.unpack()
        names = [name for name in self.rows[0] if name not in ("accepted", "careful", "settled")] if self.rows else []
        history = {name: np.array([row[name] for row in self.rows]) for name in names}
        timing = {"first_step": self.rows[0]["seconds"]} if self.rows else {}
        loss = float(self.carry.loss)
        return FitResult(scene, observations, self.parameters, status, loss, history, len(self.rows), timing)


def _linear_only(problem: Problem) -> Problem:
    """Return the problem with only fluxes and backgrounds free."""
    linear = linear_coordinates(problem) & np.asarray(problem.free.vector)
    images = tuple(as_booleans(np.zeros(free.shape)) for free in problem.free.images)
    return eqx.tree_at(lambda p: p.free, problem, State(as_booleans(linear), images))


def linear_coordinates(problem: Problem) -> np.ndarray:
    """Return which coordinates the model is linear in, the others given."""
    linear = np.zeros(problem.free.vector.shape, bool)
    for leaf in problem.leaves:
        if leaf.name in LINEAR_LEAVES:
            linear[leaf.start : leaf.stop] = True
    return linear


def matched(obs: Observation, frame, known: dict) -> Observation:
    """Return the observation matched to a frame, with the renderer that is known for its PSF, WCS and shape if there is one."""
    key = id(frame), id(obs.psf), id(obs.wcs), obs.shape, obs.channels
    if key not in known:
        # The objects are kept, so that no other one gets their number.
        known[key] = obs.match(frame)
    return obs.match_like(known[key])


class _View:
    """An observation's residuals (data minus model, whitened) and which of them count, in its window."""

    def __init__(self, obs, residual):
        self.obs, self.residual = obs, -np.asarray(residual)
        self.valid = obs.noise.modes[(slice(None), *obs.matched_renderer.window.slices)] & obs.matched_renderer.inside

    def ring_sum(self, inner: Box, outer: Box, frame) -> tuple[float, int]:
        """Return the sum and number of the residuals between two boxes of the frame."""
        window = self.obs.matched_renderer.window
        (y0, x0), (y1, x1) = outer.origin, outer.stop
        corners = pixel_map(frame.wcs, self.obs.wcs, np.array([y0, y0, y1, y1]), np.array([x0, x1, x0, x1]))
        low, high = np.floor(corners.min(axis=0)).astype(int), np.ceil(corners.max(axis=0)).astype(int) + 1
        part = Box.from_bounds((int(low[0]), int(high[0])), (int(low[1]), int(high[1]))).intersection(window)
        if part.is_empty:
            return 0.0, 0
        y, x = np.mgrid[part.slices]
        position = pixel_map(self.obs.wcs, frame.wcs, y, x)
        ring = _inside(outer, position) & ~_inside(inner, position)
        local = (slice(None), *part.shift((-window.origin[0], -window.origin[1])).slices)
        used = self.valid[local] & ring
        return float(self.residual[local][used].sum()), int(used.sum())


def _inside(box: Box, position: np.ndarray) -> np.ndarray:
    """Return which positions (..., 2) lie on pixels of a box."""
    low, high = np.array(box.origin) - 0.5, np.array(box.stop) - 0.5
    return np.asarray(np.all((position >= low) & (position < high), axis=-1))


def _grown(component: Source, morphology: AbstractImageMorphology, frame, views: Sequence[_View]) -> Source | None:
    """Return the component with a larger stamp if the residuals just outside it are bright, else None.

    The statistic is the sum of the whitened residuals (data minus model) in a ring around the stamp, over its standard
    error: no bias from the positivity of the pixels.
    """
    box = component_box(component, frame)
    larger = box.grow(max(3, round((GROWTH_RATIO - 1) / 2 * max(box.shape)))).intersection(frame.box)
    if larger.shape == box.shape:
        return None
    sums = [view.ring_sum(box, larger, frame) for view in views]
    total, count = (sum(values) for values in zip(*sums, strict=True))
    if not total > GROWTH_SIGNIFICANCE * np.sqrt(max(count, 1)):
        return None
    offset = (box.origin[0] - larger.origin[0], box.origin[1] - larger.origin[1])
    return component.replace(morphology=morphology.grown(larger.shape, offset))


def _with_components(source, path, replaced):
    """Return a source with the components in `replaced` (by path) exchanged."""
    if isinstance(source, CompositeSource):
        return source.with_parts(
            {n: _with_components(p, f"{path}.parts.{n}", replaced) for n, p in source.parts.items()}
        )
    return replaced.get(path, source)


def _refreshed(parameters: Parameters, scene: Scene, observations) -> Parameters:
    """Return the parameters with the shapes, and the priors on images, of a scene whose stamps have changed."""
    table = dict(parameters.table)
    for new in Parameters.default(scene, observations):
        old = table[new.path]
        if old.shape != new.shape:
            table[new.path] = old.replace(shape=new.shape, prior=None if old.prior is None else new.prior)
    return Parameters(table, parameters.pixel_scale)
