"""The inverse of an information matrix, and what its singular directions say."""

from __future__ import annotations

import numpy as np

from scenefit.infer.posterior import Layout
from scenefit.infer.problem import Problem

SINGULAR = 1e-7
"""Eigenvalues of the information, scaled to unit diagonal, below this fraction of the largest are rounding in single precision:
along their directions the data say nothing."""
PART = 1e-2
"""A coordinate takes part in a direction of unit length if its component is larger than this."""


def covariance_of(information: np.ndarray) -> np.ndarray:
    """Return the inverse of a positive semi-definite matrix; infinite variances for coordinates that nothing determines.

    Parameters
    ----------
    information : array, shape (m, m)

    Returns
    -------
    array, shape (m, m)
        Finite, but for the diagonal elements of coordinates that take part in a singular direction; their covariances are 0.
    """
    values, vectors, scale = _scaled_eigenvectors(information)
    known = values > SINGULAR * values.max(initial=0.0)
    inverse = (vectors[:, known] / values[known]) @ vectors[:, known].T * scale[:, None] * scale
    lost = (np.abs(vectors[:, ~known]) > PART).any(axis=1) | (scale == 0)
    inverse[np.ix_(lost, lost)] = np.where(np.eye(lost.sum(), dtype=bool), np.inf, 0.0)
    return inverse


def undetermined(information: np.ndarray) -> list[np.ndarray]:
    """Return the coordinates that take part in each direction along which the information is singular."""
    values, vectors, _ = _scaled_eigenvectors(information)
    lost = vectors[:, values <= SINGULAR * values.max(initial=0.0)].T
    return [np.nonzero(np.abs(direction) > max(PART, 0.2 * np.abs(direction).max()))[0] for direction in lost]


def coordinate_names(problem: Problem, layout: Layout, index: np.ndarray) -> list[str]:
    """Return the parameter, with its entry, that each coordinate of the problem stands for."""
    names = np.full(len(problem.lowest.vector), "", object)
    coordinates = np.asarray(problem.index)
    for path, (elements, _) in layout.places.items():
        for place in np.ndindex(elements.shape):
            coordinate = coordinates[elements[place]]
            entry = f"[{','.join(str(i) for i in place)}]" if place else ""
            # Tied parameters share a coordinate; the one that isn't tied has it for its own.
            if not names[coordinate] or coordinate == elements[place]:
                names[coordinate] = path + entry
    return [str(name) for name in names[np.asarray(index)]]


def _scaled_eigenvectors(matrix: np.ndarray):
    """Return eigenvalues and eigenvectors of the matrix scaled to unit diagonal, and the scale (0 where the diagonal is)."""
    diagonal = np.diag(matrix)
    scale = np.where(diagonal > 0, 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0)), 0.0)
    return *np.linalg.eigh(matrix * scale[:, None] * scale), scale
