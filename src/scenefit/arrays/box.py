"""Integer boxes: where a stamp lies on a larger grid."""

from __future__ import annotations

import equinox as eqx


class Box(eqx.Module):
    """A rectangle of pixels: rows `y0 <= y < y0 + height`, columns `x0 <= x < x0 + width`.

    Parameters
    ----------
    shape : tuple of int
        (height, width) in pixels, both at least 0 (0: an empty box).
    origin : tuple of int
        (y0, x0), the first pixel.

    Raises
    ------
    ValueError
        If `shape` or `origin` isn't a pair, or an extent is negative.
    """

    shape: tuple[int, int] = eqx.field(static=True)
    origin: tuple[int, int] = eqx.field(static=True)

    def __init__(self, shape: tuple[int, int], origin: tuple[int, int] = (0, 0)):
        if len(shape) != 2 or len(origin) != 2 or min(shape) < 0:
            raise ValueError(
                f"A Box wants shape (height, width), both >= 0, and origin (y0, x0); got {shape} and {origin}."
            )
        self.shape = (int(shape[0]), int(shape[1]))
        self.origin = (int(origin[0]), int(origin[1]))

    @classmethod
    def from_bounds(cls, y: tuple[int, int], x: tuple[int, int]) -> Box:
        """Build the box of rows `y[0] <= y < y[1]` and columns `x[0] <= x < x[1]`; empty where reversed."""
        return cls((max(0, y[1] - y[0]), max(0, x[1] - x[0])), (y[0], x[0]))

    @classmethod
    def around(cls, center: tuple[float, float], half_size: int | tuple[int, int]) -> Box:
        """Build the box of `2 half_size + 1` pixels a side around the pixel nearest to `center` (y, x)."""
        half = (half_size, half_size) if isinstance(half_size, int) else half_size
        middle = (round(float(center[0])), round(float(center[1])))
        return cls((2 * half[0] + 1, 2 * half[1] + 1), (middle[0] - half[0], middle[1] - half[1]))

    @property
    def stop(self) -> tuple[int, int]:
        """(y1, x1), one past the last pixel."""
        return self.origin[0] + self.shape[0], self.origin[1] + self.shape[1]

    @property
    def is_empty(self) -> bool:
        """Whether the box holds no pixel."""
        return 0 in self.shape

    @property
    def slices(self) -> tuple[slice, slice]:
        """Slices (y, x) of this box in an array whose first pixel is (0, 0)."""
        return slice(self.origin[0], self.stop[0]), slice(self.origin[1], self.stop[1])

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """(x0, x1, y0, y1) of the outer pixel edges, as matplotlib's `imshow` takes it."""
        return self.origin[1] - 0.5, self.stop[1] - 0.5, self.origin[0] - 0.5, self.stop[0] - 0.5

    def intersection(self, other: Box) -> Box:
        """Return the box of the pixels in both (empty if there are none)."""
        y0, x0 = (max(a, b) for a, b in zip(self.origin, other.origin, strict=True))
        y1, x1 = (min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box.from_bounds((y0, y1), (x0, x1))

    def union(self, other: Box) -> Box:
        """Return the smallest box that holds both."""
        y0, x0 = (min(a, b) for a, b in zip(self.origin, other.origin, strict=True))
        y1, x1 = (max(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box.from_bounds((y0, y1), (x0, x1))

    def shift(self, offset: tuple[int, int]) -> Box:
        """Return the box moved by (dy, dx) pixels."""
        return Box(self.shape, (self.origin[0] + offset[0], self.origin[1] + offset[1]))

    def grow(self, margin: int) -> Box:
        """Return the box with `margin` more pixels on each side (fewer, if negative)."""
        (y0, x0), (y1, x1) = self.origin, self.stop
        return Box.from_bounds((y0 - margin, y1 + margin), (x0 - margin, x1 + margin))

    def contains(self, position: tuple[float, float]) -> bool:
        """Whether the position (y, x) lies on a pixel of the box."""
        return all(o - 0.5 <= float(p) < s - 0.5 for o, p, s in zip(self.origin, position, self.stop, strict=True))
