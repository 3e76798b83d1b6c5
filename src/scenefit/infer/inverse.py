"""The inverse of an information matrix, and what its singular directions say."""

from __future__ import annotations

import numpy as np
from scipy.sparse.csgraph import connected_components

from scenefit.infer.posterior import Layout
from scenefit.infer.problem import Problem

SINGULAR = 1e-7
"""Eigenvalues of the information, scaled to unit diagonal, below this fraction of the largest are rounding in single precision:
along their directions the data say nothing."""
PART = 1e-2
"""A coordinate takes part in a direction of unit length if its component is larger than this."""
LINKED, CHIEF = 0.1, 0.2
"""Coordinates are named together if the cosine between their projections onto what is lost is larger, and their own projection is
larger than this part of the largest."""


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
    """Return the sets of coordinates that take part in directions along which the information is singular.

    Where it is singular along several directions, any of their combinations are, too; the projection onto all of them is unique,
    and the blocks of its matrix are the sets.
    """
    values, vectors, _ = _scaled_eigenvectors(information)
    lost = vectors[:, values <= SINGULAR * values.max(initial=0.0)]
    projection = lost @ lost.T
    share = np.sqrt(np.diag(projection))
    linked = np.abs(projection) > LINKED * share[:, None] * share
    taking_part = share > PART
    _, block = connected_components(linked & taking_part & taking_part[:, None], directed=False)
    sets = [np.nonzero(taking_part & (block == number))[0] for number in np.unique(block[taking_part])]
    return [members[share[members] > CHIEF * share[members].max()] for members in sets]


def coordinate_names(problem: Problem, layout: Layout, index: np.ndarray) -> list[str]:
    """Return the parameter, with its entry, that each coordinate of the problem stands for."""
    names = np.full(len(problem.lowest.vector), "", object)
    coordinates = np.asarray(problem.index)
    for path, (elements, _) in layout.places.items():
        for name, element in zip(entry_names(path, elements.shape), elements.ravel(), strict=True):
            coordinate = coordinates[element]
            # Tied parameters share a coordinate; the one that isn't tied has it for its own.
            if not names[coordinate] or coordinate == element:
                names[coordinate] = name
    return [str(name) for name in names[np.asarray(index)]]


def undetermined_names(problem: Problem, layout: Layout, index: np.ndarray, information: np.ndarray) -> list[str]:
    """Return the names of the parameters, with their entries, in each set that is `undetermined`."""
    names = coordinate_names(problem, layout, index)
    return [", ".join(names[number] for number in group) for group in undetermined(information)]


def entry_names(path: str, shape: tuple[int, ...]) -> list[str]:
    """Return the names of the entries of a parameter: its path, and the indices if it has any."""
    return [path + (f"[{','.join(str(i) for i in place)}]" if place else "") for place in np.ndindex(shape)]


def _scaled_eigenvectors(matrix: np.ndarray):
    """Return eigenvalues and eigenvectors of the matrix scaled to unit diagonal, and the scale (0 where the diagonal is)."""
    diagonal = np.diag(matrix)
    scale = np.where(diagonal > 0, 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0)), 0.0)
    return *np.linalg.eigh(matrix * scale[:, None] * scale), scale
