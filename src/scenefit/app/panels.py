"""Pieces of figures: color images with their scale and orientation on the sky, marked positions, outlines."""

from __future__ import annotations

import io

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from scenefit.app.color import MISSING
from scenefit.arrays.box import Box
from scenefit.sky.frame import Frame, pixel_scale_of

OUTLINE_COLOR = "#F0E442"
MAX_LABELS = 100
"""Of more marked positions than this the names aren't written: nobody could read them."""
_INK = {
    "color": "white",
    "path_effects": [patheffects.withStroke(linewidth=1.8, foreground="black", alpha=0.8)],
}
_FIXED_VIEW = {"scalex": False, "scaley": False}


class NotebookFigure(Figure):
    """A figure outside pyplot that notebooks show without any matplotlib magic."""

    def __init__(self, size: tuple[float, float]):
        super().__init__(figsize=size)
        self.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def show_rgb(ax, rgb, wcs, *, window=None, view=None, bar: bool = True, compass: bool = True):
    """Show an RGB image with its first row at the bottom.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    rgb : array, shape (y, x, 3)
    wcs : WCS or None
        Of the whole image of which this is `window`; without it neither bar nor compass is drawn.
    window, view : Box, optional
        Which pixels `rgb` holds, from (0, 0) by default, and which to show, grey outside `window`.
    bar, compass : bool
        Whether to draw a scale bar, and the directions of north and east (without WCS: pixel coordinates).
    """
    window = Box(rgb.shape[:2]) if window is None else window
    view = window if view is None else view
    ax.imshow(rgb, origin="lower", interpolation="nearest", extent=window.extent)
    x0, x1, y0, y1 = view.extent
    ax.set(xlim=(x0, x1), ylim=(y0, y1), facecolor=str(MISSING))
    if wcs is not None or not compass:
        ax.set(xticks=[], yticks=[])
    if wcs is not None and bar:
        scale = pixel_scale_of(wcs)
        length = round_length(0.3 * view.shape[1] * scale)
        x, y = x0 + 0.06 * view.shape[1], y0 + 0.06 * view.shape[0]
        ax.plot([x, x + length / scale], [y, y], linewidth=2, solid_capstyle="butt", **_FIXED_VIEW, **_INK)
        middle = (x + length / scale / 2, y)
        ax.annotate(f'{length:g}"', middle, (0, 3), textcoords="offset points", ha="center", size="small", **_INK)
    if wcs is not None and compass:
        _draw_compass(ax, wcs, view)


def mark_positions(ax, names, positions, shape):
    """Mark named positions, shape (n, 2) in (y, x), that lie on an image of `shape`."""
    positions = np.reshape(positions, (-1, 2))
    on_image = np.all((positions >= -0.5) & (positions <= np.array(shape) - 0.5), axis=1)
    few = on_image.sum() <= 20
    marker = {
        "linestyle": "none",
        "marker": "+",
        "markersize": 5 if few else 3,
        "markeredgewidth": 1 if few else 0.6,
    }
    ax.plot(positions[on_image, 1], positions[on_image, 0], **marker, **_FIXED_VIEW, **_INK)
    if on_image.sum() > MAX_LABELS:
        return
    size = "small" if few else "xx-small"
    for name, (y, x), shown in zip(names, positions, on_image, strict=True):
        if shown:
            left = x > 0.6 * shape[1]
            place = {
                "xytext": (-3 if left else 3, 2),
                "textcoords": "offset points",
                "ha": "right" if left else "left",
            }
            ax.annotate(name, (x, y), size=size, parse_math=False, **place, **_INK)


def show_residual(ax, values, limit, remark: str = ""):
    """Show residuals in units of sigma with diverging colors from -limit to limit, grey where NaN; with a remark at the scale."""
    colors = colormaps["RdBu_r"].with_extremes(bad=str(MISSING))
    shown = ax.imshow(values, cmap=colors, vmin=-limit, vmax=limit, origin="lower", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ticks = [-limit, -limit // 2, 0, limit // 2, limit]
    bar = ax.figure.colorbar(shown, cax=ax.inset_axes((1.04, 0, 0.05, 1)), ticks=ticks, extend="both")
    bar.set_label(f"residual / σ ({remark})" if remark else "residual / σ", size="small")
    bar.ax.tick_params(labelsize="small")


def draw_outlines(ax, outlines):
    """Draw closed lines through points, shape (n, point, 2) in (y, x)."""
    lines = LineCollection(outlines[..., ::-1], colors=OUTLINE_COLOR, linewidths=0.7, alpha=0.7)
    ax.add_collection(lines, autolim=False)


def round_length(length: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that isn't above `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(power * max(digit for digit in (1, 2, 5) if digit * power <= length * (1 + 1e-9)))


def _draw_compass(ax, wcs, view):
    """Draw arrows to the north and east in the lower right corner."""
    directions = Frame(view.shape, channels=("any",), wcs=wcs).sky_jacobian()
    length = min(0.18 * min(view.shape), 0.1 * np.sqrt(np.prod(view.shape)))
    arrows = length * (directions / np.linalg.norm(directions, axis=0)).T
    ends = np.vstack([np.zeros((1, 2)), 1.5 * arrows])
    margin = 0.03 * min(view.shape)
    bottom, right = view.origin[0] + margin, view.stop[1] - 1 - margin
    origin = np.array([bottom - ends[:, 0].min(), right - ends[:, 1].max()])
    line = {"arrowstyle": "-|>", "color": "white", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    for name, arrow in zip("EN", arrows, strict=True):
        ax.annotate("", (origin + arrow)[::-1], origin[::-1], arrowprops=line)
        y, x = origin + 1.35 * arrow
        ax.text(x, y, name, ha="center", va="center", size="small", **_INK)
