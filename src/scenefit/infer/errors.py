"""Standard errors of all free parameters at the best fit, for scenes of few parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from scenefit.arrays.compilation import compiled
from scenefit.infer import posterior
from scenefit.infer.dense import MAX_COORDINATES, dense_footprints, hessian
from scenefit.infer.fit import FitResult
from scenefit.infer.footprints import Footprints
from scenefit.infer.inverse import covariance_of
from scenefit.infer.problem import Problem, State


def parameter_errors(result: FitResult) -> dict[str, np.ndarray]:
    """Return the standard errors of all free parameters, everything else marginalised.

    From the inverse of the Hessian that is expected of such data (their Fisher information and the curvature of the priors) and
    the derivative of the parameters; values at a bound count as free. `sample(result, "laplace")` has the exact Hessian, and
    judges it.

    Parameters
    ----------
    result : FitResult
        Without free images, and with few free parameters.

    Returns
    -------
    dict of array
        By path, in the parameters' units and shapes; infinite where nothing determines them.

    Raises
    ------
    ValueError
        If there are free images or too many parameters.
    """
    problem, state, layout = posterior.build(result.scene, result.observations, result.parameters, whole_frame=True)
    where = dense_footprints(problem, layout, result.scene, result.observations)
    if where is None:
        raise ValueError(f"parameter_errors wants 1 to {MAX_COORDINATES} free numbers and no free image.")
    matrix, slopes = (np.asarray(part, dtype=float) for part in _information(problem, state, where))
    covariance = covariance_of(matrix)
    lost = ~np.isfinite(np.diag(covariance))
    finite = np.where(np.isfinite(covariance), covariance, 0.0)
    variance = np.einsum("em,mk,ek->e", slopes, finite, slopes)
    errors = np.where((slopes[:, lost] != 0).any(axis=1), np.inf, np.sqrt(np.maximum(variance, 0.0)))
    fitted = result.parameters.is_fitted
    return {path: errors[numbers] * units for path, (numbers, units) in layout.places.items() if fitted(path)}


@compiled
def _information(problem: Problem, state: State, where: Footprints):
    """Return information and curvature of the priors (m, m), and derivatives of all elements along the coordinates (e, m)."""
    rows = (where.index[:, None] == jnp.arange(len(state.vector))).astype(state.vector.dtype)
    slopes = jax.vmap(lambda row: jax.jvp(problem.elements, (state.vector,), (row,))[1])(rows)
    return hessian(problem, state, where, "fisher"), slopes.T
