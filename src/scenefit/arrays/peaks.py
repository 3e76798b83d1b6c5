"""Peaks of images: where they are, to a fraction of a pixel, and which of them stand for one thing."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def find_peaks(image: np.ndarray, threshold: float) -> np.ndarray:
    """Return the pixels that are as high as all their neighbours and above a threshold, highest first.

    Parameters
    ----------
    image : array, shape (y, x)
        Of finite values.
    threshold : float

    Returns
    -------
    array of int, shape (n, 2)
        (y, x). A plateau counts once.
    """
    is_peak = (image > threshold) & (image == ndimage.maximum_filter(image, size=3, mode="nearest"))
    labels, count = ndimage.label(is_peak, structure=np.ones((3, 3)))
    first = np.unique(labels.ravel(), return_index=True)[1][-count:] if count else np.zeros(0, int)
    places = np.stack(np.unravel_index(first, image.shape), axis=-1)
    return places[np.argsort(-image[tuple(places.T)], kind="stable")]


def refine_peak(image: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """Return the top (y, x) of the parabolas through a peak and its neighbours along each axis; at most half a pixel away."""
    result = np.array(place, dtype=float)
    for axis in (0, 1):
        if not 0 < place[axis] < image.shape[axis] - 1:
            continue
        step = np.eye(2, dtype=int)[axis]
        before, after = image[tuple(place - step)], image[tuple(place + step)]
        bend = 2 * image[tuple(place)] - before - after
        if bend > 0:
            result[axis] += np.clip(0.5 * (after - before) / bend, -0.5, 0.5)
    return result


def climb(image: np.ndarray, place: tuple[int, int], radius: float) -> tuple[int, int]:
    """Return the highest pixel within a radius of another."""
    reach = int(np.ceil(radius))
    low = [max(p - reach, 0) for p in place]
    window = image[low[0] : place[0] + reach + 1, low[1] : place[1] + reach + 1]
    y, x = np.ogrid[low[0] : low[0] + window.shape[0], low[1] : low[1] + window.shape[1]]
    near = (y - place[0]) ** 2 + (x - place[1]) ** 2 <= radius**2
    top = np.unravel_index(np.argmax(np.where(near, window, -np.inf)), window.shape)
    return int(top[0] + low[0]), int(top[1] + low[1])


def keep_apart(places: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return which places to keep so that none lies within the radius of one before it, nor has one before it within its own.

    Parameters
    ----------
    places : array, shape (n, 2)
        Those to be preferred first.
    radii : array, shape (n,)

    Returns
    -------
    array of int
        Their numbers.
    """
    kept: list[int] = []
    for number, (place, radius) in enumerate(zip(places, radii, strict=True)):
        distance = np.hypot(*(places[kept] - place).T)
        if (distance > np.maximum(radii[kept], radius)).all():
            kept.append(number)
    return np.array(kept, dtype=int)
