"""Sampling: the posterior of a fit's free parameters, by one of several methods."""

from __future__ import annotations

import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from arviz_base import from_dict
from astropy.table import QTable
from jaxtyping import Array

from scenefit.arrays.compilation import as_floats, compiled
from scenefit.arrays.progress import with_progress
from scenefit.data.observation import Observation
from scenefit.infer import chains, diagnostics, guides, posterior, truncated
from scenefit.infer.dense import MAX_COORDINATES, dense_footprints
from scenefit.infer.diagnostics import Diagnostics, PosteriorStatus
from scenefit.infer.fit import FitResult
from scenefit.infer.linear import LinearModel, data_losses, linear_model
from scenefit.infer.problem import Problem, State
from scenefit.infer.target import Target, laplace_target
from scenefit.model.link import AbstractCurve, AbstractLink
from scenefit.model.scene import Scene

METHODS = ("laplace", "svi", "nuts", "linear")
JUDGED_DRAWS, JUDGED_BATCH = 1000, 100
"""Draws of an approximation whose posterior density is computed, for Pareto's k."""
SWEEPS = (4, 16, 64)
"""Sweeps of the chains of the linear method from one draw to the next: more, from the start, if so many don't mix them."""


class Posterior(eqx.Module):
    """Draws from the posterior of a fit's free parameters.

    Attributes
    ----------
    draws : dict of array
        By path, shape (chain, draw, ...): values in the units of the parameters.
    log_density : array, shape (chain, draw)
        Of the posterior, up to a constant; NaN where it wasn't computed.
    method : str
    status : PosteriorStatus
    message : str
        What the status rests on.
    diagnostics : Diagnostics
    result : FitResult
        The fit that it belongs to.
    timing : dict of float
        Seconds by stage.
    log_evidence, log_evidence_error : float
        Of the "linear" method: logarithm of the integral of likelihood times priors over all that is free, and its standard
        error. Differences between fits to the same data count (Bayes factors): the likelihood lacks factors of the noise alone,
        and what has no prior has unit density in units of the noise, the same for fits that share it. Amplitudes must have
        priors: NaN otherwise, and for other methods.
    """

    draws: dict[str, np.ndarray]
    log_density: np.ndarray
    method: str = eqx.field(static=True)
    status: PosteriorStatus = eqx.field(static=True)
    message: str = eqx.field(static=True)
    diagnostics: Diagnostics
    result: FitResult
    timing: dict[str, float]
    log_evidence: float = float("nan")
    log_evidence_error: float = float("nan")

    def __getitem__(self, path: str) -> np.ndarray:
        """Return the draws of a parameter, chains joined: shape (draw, ...)."""
        if path not in self.draws:
            raise KeyError(f"No draws of {path!r}; there are {', '.join(self.draws)}.")
        values = self.draws[path]
        return values.reshape(-1, *values.shape[2:])

    def curve(self, path: str, wavelengths) -> np.ndarray:
        """Return a linked parameter at wavelengths (microns or a Quantity), shape (draw, wavelength, ...)."""
        link = self._link(path)
        if not isinstance(link, AbstractCurve):
            raise ValueError(f"{path} is free in every band; there is no curve between them.")
        return np.einsum("wk,dk...->dw...", link.basis_at(wavelengths), self[path])

    def in_channels(self, path: str) -> np.ndarray:
        """Return a linked parameter in every channel of the model frame, shape (draw, channel, ...)."""
        return np.einsum("ck,dk...->dc...", self._link(path).basis(self.result.scene.frame.channels), self[path])

    def _link(self, path: str) -> AbstractLink:
        """Return the link at a path."""
        base, _, name = path.rpartition(".morphology.")
        component = dict(self.result.scene.components()).get(base)
        value = getattr(component.morphology, name, None) if component is not None else None
        if not isinstance(value, AbstractLink):
            raise ValueError(f"{path!r} isn't a linked parameter of the scene.")
        return value

    def model(self, number: int) -> tuple[Scene, tuple[Observation, ...]]:
        """Return scene and observations with the values of a draw."""
        values = {path: self[path][number] for path in self.draws}
        return posterior.with_parameters(self.result.scene, self.result.observations, values)

    def to_arviz(self):
        """Return the draws for ArviZ: an xarray DataTree with the groups "posterior" and "sample_stats".

        Variables are named by path, with dimensions (chain, draw, ...); "lp" is the log-density, where it was computed.
        """
        groups = {"posterior": self.draws, "sample_stats": {"lp": self.log_density}}
        attributes = {"inference_library": "scenefit", "method": self.method, "status": self.status.name}
        return from_dict(groups, attrs={"posterior": attributes})

    def summary(self) -> QTable:
        """Return mean, standard deviation and quantiles of every number, a row each, with R-hat and effective sample size."""
        rows = []
        for path in self.draws:
            values = self[path]
            for place in np.ndindex(values.shape[1:]):
                column = values[(slice(None), *place)]
                low, middle, high = np.quantile(column, [0.16, 0.5, 0.84])
                name = path + (f"[{','.join(str(i) for i in place)}]" if place else "")
                chain = [
                    float(table[path][place]) if table else np.nan
                    for table in (self.diagnostics.r_hat, self.diagnostics.ess)
                ]
                rows.append((name, column.mean(), column.std(ddof=1), low, middle, high, *chain))
        return QTable(rows=rows, names=("parameter", "mean", "std", "q16", "q50", "q84", "r_hat", "ess"))


def sample(
    result: FitResult,
    method: str = "nuts",
    *,
    key: Array,
    num_samples: int = 2400,
    num_chains: int = 4,
    num_warmup: int = 150,
    guide: str = "normal",
    num_steps: int = 400,
    num_particles: int = 4,
    progress: bool = True,
) -> Posterior:
    """Draw from the posterior of all free parameters of a fit, those of the observations included.

    The density of the parameters is the likelihood times their priors; without a prior it is flat over the range of the
    parameter's constraint. All methods start from the mode; all but "linear" from the exact Hessian there.

    The "linear" method is for rings (`MultiGaussianMorphology`), fluxes and backgrounds, which the model is linear in: their
    density, normal and cut off at zero, is sampled exactly, in seconds, however many amplitudes are zero. What isn't linear
    (centres, ellipticities, ...) is replaced by its derivatives at the fit. Amplitudes have no prior, or half-Cauchy, half-normal
    or exponential ones, of fractions of the fitted flux; fluxes and backgrounds none or normal ones; noise is Gaussian.

    Parameters
    ----------
    result : FitResult
    method : "nuts", "laplace", "svi" or "linear"
        No-U-Turn chains; the normal approximation at the mode; the approximation that maximises the evidence lower bound; or
        chains for what the model is linear in. The normal ones are normal in unconstrained coordinates.
    key : jax.random key
    num_samples : int
        Draws in all.
    num_chains, num_warmup : int
        For "nuts" and "linear": chains, and transitions of each before its first draw.
    guide : "normal" or "flow"
        For "svi": a multivariate normal, or that through inverse autoregressive flows.
    num_steps, num_particles : int
        For "svi": steps of the optimiser, and draws for each.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    Posterior
        Its `status` says whether the draws can be trusted; look at it. If interrupted (Ctrl-C), with the draws so far.

    Raises
    ------
    ValueError
        If the fit has free images or too many free parameters, nothing determines a parameter, or an option is unknown; with
        "linear" if noise, priors or links are of another kind than it takes.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}; got {method!r}.")
    if guide not in guides.GUIDES:
        raise ValueError(f"guide is one of {', '.join(guides.GUIDES)}; got {guide!r}.")
    counts = {
        "num_samples": num_samples,
        "num_chains": num_chains,
        "num_steps": num_steps,
        "num_particles": num_particles,
    }
    if wrong := {name: value for name, value in counts.items() if value < 1}:
        raise ValueError(f"Numbers of draws, chains and steps are at least 1; got {wrong}.")
    begin = time.perf_counter()
    problem, state, layout = posterior.build(result.scene, result.observations, result.parameters)
    if method == "linear":
        model = linear_model(problem, state, layout, result)
        size = num_chains, -(-num_samples // num_chains)
        return _sample_linear(model, problem, state, layout, result, key, size, num_warmup, progress, begin)
    where = dense_footprints(problem, layout, result.scene, result.observations)
    if where is None:
        raise ValueError(
            f"Sampling wants 1 to {MAX_COORDINATES} free numbers and no free image: fix some, such as "
            "parameters.fix('sources.*.morphology.image'), and fit again."
        )
    target = laplace_target(problem, state, layout, where)
    whitened = time.perf_counter()
    if method == "nuts":
        white, log_density, divergent, complete = chains.run_chains(
            target, key, num_chains, num_warmup, -(-num_samples // num_chains), progress
        )
    else:
        white, log_density, pareto, complete = _approximate(
            target, method, key, num_samples, guide, num_steps, num_particles, progress
        )
    drawn = time.perf_counter()
    draws = _parameter_draws(_elements(target, jnp.asarray(white, target.center.dtype)), layout, result)
    found = diagnostics.of_chains(draws, divergent) if method == "nuts" else pareto
    status, message = found.judge()
    return Posterior(
        draws=draws,
        log_density=log_density,
        method=method,
        status=status if complete else PosteriorStatus.INTERRUPTED,
        message=message,
        diagnostics=found,
        result=result,
        timing={"laplace": whitened - begin, "draws": drawn - whitened, "diagnostics": time.perf_counter() - drawn},
    )


def _sample_linear(
    model: LinearModel, problem: Problem, state: State, layout, result, key, size, num_warmup, progress, begin
) -> Posterior:
    """Return draws of what the model is linear in, with their evidence; `size` is (chains, draws of each)."""
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    built = time.perf_counter()
    for num_sweeps in SWEEPS:
        options = {"num_warmup": num_warmup, "num_sweeps": num_sweeps, "progress": progress}
        values, complete = truncated.draw(model.density, rng, *size, **options)
        vectors = model.vectors(values)
        draws = _parameter_draws(_elements_at(problem, as_floats(vectors)), layout, result)
        found = diagnostics.of_chains(draws, float("nan"))
        # So few draws can't be good.
        if not complete or size[0] * size[1] < diagnostics.MIN_ESS or found.judge()[0] is PosteriorStatus.GOOD:
            break
    drawn = time.perf_counter()
    log_density = model.density.log_density(values)
    if not model.is_exact:
        flat, chosen = values.reshape(-1, values.shape[-1]), _spread(values.shape[0] * values.shape[1], JUDGED_DRAWS)
        points = as_floats(vectors.reshape(-1, vectors.shape[-1])[chosen])
        losses = _in_batches(lambda rows: data_losses(problem, state, points[rows]), len(chosen), progress)
        judged = diagnostics.of_approximation(-losses, model.log_likelihood(flat[chosen]))
        found = eqx.tree_at(lambda d: d.pareto_k, found, judged.pareto_k)
    status, message = found.judge()
    evidence = truncated.log_evidence(model.density, values, rng) if model.is_proper else (float("nan"), float("nan"))
    return Posterior(
        draws=draws,
        log_density=log_density,
        method="linear",
        status=status if complete else PosteriorStatus.INTERRUPTED,
        message=message,
        diagnostics=found,
        result=result,
        timing={"design": built - begin, "draws": drawn - built, "diagnostics": time.perf_counter() - drawn},
        log_evidence=evidence[0],
        log_evidence_error=evidence[1],
    )


def _spread(total: int, count: int) -> np.ndarray:
    """Return at most `count` numbers below `total`, spread evenly."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(int))


def _approximate(target, method, key, count, guide, num_steps, num_particles, progress):
    """Return draws (1, draw, m) of an approximation, log-densities of the posterior, diagnostics, and whether it was finished."""
    first, second = jax.random.split(key)
    complete = True
    if method == "laplace":
        white = jax.random.normal(first, (count, len(target.center)), target.center.dtype)
        proposal = -0.5 * jnp.sum(white**2, axis=1)
    else:
        fitted, _, complete = guides.fit_guide(target, first, guide, num_steps, num_particles, progress)
        white, proposal = guides.guide_draws(fitted, jax.random.split(second, count))
    judged = min(count, JUDGED_DRAWS)
    density = _in_batches(lambda rows: _log_densities(target, white[rows]), judged, progress)
    found = diagnostics.of_approximation(density, np.asarray(proposal[:judged], dtype=float))
    log_density = np.full((1, count), np.nan)
    log_density[0, :judged] = density
    return np.asarray(white)[None], log_density, found, complete


def _in_batches(function: Callable, count: int, progress: bool) -> np.ndarray:
    """Return a function of draws, given their numbers, for all of them: so many at a time that it can be seen to go on."""
    batch = min(count, JUDGED_BATCH)
    # The last batch is filled up: another size would be compiled anew.
    rows = [np.minimum(np.arange(first, first + batch), count - 1) for first in range(0, count, batch)]
    parts = [np.asarray(function(each), dtype=float) for each in with_progress(rows, "diagnostics", progress)]
    return np.concatenate(parts)[:count]


@compiled
def _log_densities(target: Target, white):
    return jax.lax.map(lambda z: -target.potential(z), white)


@compiled
def _elements(target: Target, white):
    return jax.vmap(jax.vmap(target.elements))(white)


@compiled
def _elements_at(problem: Problem, vectors):
    return jax.vmap(jax.vmap(problem.elements))(vectors)


def _parameter_draws(elements, layout, result) -> dict[str, np.ndarray]:
    """Return the draws of all free parameters, and those tied to them, by path, from those of all elements."""
    elements = np.asarray(elements, dtype=float)
    fitted = result.parameters.is_fitted
    return {path: elements[..., numbers] * units for path, (numbers, units) in layout.places.items() if fitted(path)}
