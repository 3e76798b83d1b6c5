"""Standard errors and covariances of all free parameters at the best fit, for scenes of few parameters."""

from __future__ import annotations

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scenefit.arrays.compilation import as_integers, compiled
from scenefit.infer import posterior
from scenefit.infer.dense import MAX_COORDINATES
from scenefit.infer.fit import FitResult
from scenefit.infer.inverse import covariance_of, entry_names, undetermined_names
from scenefit.infer.jacobian import free_coordinates, information_matrix
from scenefit.infer.problem import Problem, State


class ParameterCovariance(eqx.Module):
    """Covariance of all free parameters of a fit.

    `covariance[path]` is the covariance of one parameter, `covariance[path, other]` that of two.

    Attributes
    ----------
    matrix : array, shape (n, n)
        Of all entries of all free parameters, in their units; symmetric. Infinite variances, and no covariances, for entries
        that nothing determines.
    names : list of str
        What each row is: path and, for arrays, the indices of the entry.
    places : dict of array of int
        Rows by path, of the parameter's shape.
    """

    matrix: np.ndarray
    names: list[str]
    places: dict[str, np.ndarray]

    def __getitem__(self, paths: str | tuple[str, str]) -> np.ndarray:
        """Return the covariances of the entries of two parameters, or of one, with the axes of the first and of the second.

        Raises
        ------
        KeyError
            If there is no free parameter at a path.
        """
        first, second = (paths, paths) if isinstance(paths, str) else paths
        if unknown := sorted({first, second} - set(self.places)):
            raise KeyError(f"There is no free parameter {unknown}; there are {list(self.places)}.")
        rows, columns = self.places[first], self.places[second]
        return self.matrix[np.ix_(rows.ravel(), columns.ravel())].reshape(*rows.shape, *columns.shape)

    @property
    def errors(self) -> dict[str, np.ndarray]:
        """Standard errors by path, in the parameters' units and shapes."""
        errors = np.sqrt(np.maximum(np.diag(self.matrix), 0.0))
        return {path: errors[rows] for path, rows in self.places.items()}


def parameter_errors(result: FitResult) -> dict[str, np.ndarray]:
    """Return the standard errors of all free parameters, everything else marginalised: those of `parameter_covariance`.

    Parameters
    ----------
    result : FitResult
        Without free images, and with few free parameters.

    Returns
    -------
    dict of array
        By path, in the parameters' units and shapes; infinite, with a warning, where nothing determines them.

    Raises
    ------
    ValueError
        If there are free images or too many parameters.
    """
    return parameter_covariance(result).errors


def parameter_covariance(result: FitResult) -> ParameterCovariance:
    """Return the covariance of all free parameters.

    It is `D H^-1 D^T`, with the Hessian H that is expected of such data (their Fisher information and the curvature of the
    priors) and the derivative D of the parameters along its coordinates; values at a bound count as free. `sample(result,
    "laplace")` has the exact Hessian, and judges it.

    Parameters
    ----------
    result : FitResult
        Without free images, and with few free parameters.

    Returns
    -------
    ParameterCovariance
        In the parameters' units. Tied parameters are there, too, with a correlation of 1.

    Warns
    -----
    UserWarning
        If the Hessian is singular to rounding: names the parameters that take part in each direction which nothing determines.

    Raises
    ------
    ValueError
        If there are free images or too many parameters.
    """
    problem, state, layout = posterior.build(result.scene, result.observations, result.parameters, whole_frame=True)
    count = len(free_coordinates(problem))
    if not 0 < count <= MAX_COORDINATES or any(np.any(image) for image in problem.free.images):
        raise ValueError(f"Errors of all parameters want 1 to {MAX_COORDINATES} free numbers and no free image.")
    index, information = information_matrix(problem, state, layout, result.scene, result.observations)
    information = information.toarray()
    covariance = covariance_of(information)
    slopes = np.asarray(_slopes(problem, state, as_integers(index)), dtype=float)
    lost = ~np.isfinite(np.diag(covariance))
    if lost.any():
        _warn_undetermined(undetermined_names(problem, layout, index, information))
    fitted = {path: place for path, place in layout.places.items() if result.parameters.is_fitted(path)}
    slopes = np.concatenate([slopes[numbers.ravel()] * units.ravel()[:, None] for numbers, units in fitted.values()])
    matrix = slopes @ np.where(np.isfinite(covariance), covariance, 0.0) @ slopes.T
    unknown = (slopes[:, lost] != 0).any(axis=1)
    matrix[unknown | unknown[:, None]] = 0.0
    matrix[unknown, unknown] = np.inf
    names = [name for path, (numbers, _) in fitted.items() for name in entry_names(path, numbers.shape)]
    sizes = [numbers.size for numbers, _ in fitted.values()]
    rows = np.split(np.arange(len(names)), np.cumsum(sizes)[:-1])
    places = {path: row.reshape(numbers.shape) for row, (path, (numbers, _)) in zip(rows, fitted.items(), strict=True)}
    return ParameterCovariance(0.5 * (matrix + matrix.T), names, places)


def _warn_undetermined(groups: list[str]):
    """Warn of what neither the data nor a prior determine."""
    warnings.warn(
        "Neither the data nor a prior determine "
        + "; nor ".join(groups)
        + ". Their errors are infinite: fix some of them, or give "
        "them priors.",
        stacklevel=3,
    )


@compiled
def _slopes(problem: Problem, state: State, index: Int[Array, " m"]):
    """Return the derivatives of all elements along the coordinates, shape (e, m)."""
    rows = (index[:, None] == jnp.arange(len(state.vector))).astype(state.vector.dtype)
    return jax.vmap(lambda row: jax.jvp(problem.elements, (state.vector,), (row,))[1], out_axes=1)(rows)
