"""Figure of a comparison with the truth; reached as `scenefit.plot.validation`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from scenefit.app.panels import NotebookFigure
from scenefit.survey.validate import Validation

ISOLATED, BLENDED, TREND, GREY = "#0072B2", "#D55E00", "#000000", "#888888"
"""Colors of points, of those of blended sources, and of what is typical of them (Okabe & Ito)."""
PULL_RANGE, PULL_BINS = 5.0, 25
"""Pulls are shown from -5 to 5, in so many bins."""
MAX_COLUMNS, FEW_QUANTITIES = 3, 4
"""Quantities beside one another at most; up to so many are shown below one another."""
RANGE_SPREADS = 4.0
"""Residuals are shown as far as so many spreads of the widest bin, or as far as there are any."""
MIN_BINS, MAX_BINS, BIN_SOURCES = 4, 12, 40
"""Bins of the running median, and how many sources are in one if there are enough for more than the least number of bins."""
MILLIARCSEC_BELOW = 0.2
"""Positions are shown in mas where they are off by less than this, in arcsec."""


def validation(validation: Validation, quantities: Sequence[str] | None = None) -> Figure:
    """Show how far a catalogue is from the truth: residuals and pulls of every quantity, completeness and purity.

    Residuals are measured minus true, against true magnitude: a point a source, and in bins of equal number the median with its
    standard error and a shade of one robust standard deviation (1.4826 times the median absolute deviation) either way. What lies
    beyond the panel is drawn as a triangle at its edge. Beside them is the histogram of the pulls, residuals in standard errors,
    with the unit normal that they should follow, their median and robust standard deviation; pulls beyond 5 are in the outermost
    bins. Below are completeness and purity in
    bins, with 68 % intervals, over the numbers of sources.

    Parameters
    ----------
    validation : Validation
        From `validate` or `recover`.
    quantities : sequence of str, optional
        Which ones to show, of `validation.quantities`; all by default.

    Returns
    -------
    matplotlib.figure.Figure
        Axes "QUANTITY residual" and "QUANTITY pull" for each, "completeness" and "purity".

    Raises
    ------
    KeyError
        If there is no such quantity.
    """
    chosen = validation.quantities if quantities is None else list(quantities)
    if unknown := [name for name in chosen if name not in validation.quantities]:
        raise KeyError(f"There is no quantity {unknown[0]!r}; there are {validation.quantities}.")
    columns = int(np.clip(np.ceil(len(chosen) / FEW_QUANTITIES), 1, MAX_COLUMNS))
    rows = -(-len(chosen) // columns)
    width = 4.6 * max(columns, 1.5)
    fig = NotebookFigure((width, 1.75 * rows + 2.3))
    halves = fig.add_gridspec(2, 1, height_ratios=[max(1.75 * rows, 0.1), 2.3])
    above, below = fig.add_subfigure(halves[0]), fig.add_subfigure(halves[1])
    cells = above.add_gridspec(max(rows, 1), 2 * columns, width_ratios=[2.6, 1] * columns)
    limits = _magnitude_limits(validation)
    for number, name in enumerate(chosen):
        row, column = number % rows, 2 * (number // rows)
        is_last = row == rows - 1 or number == len(chosen) - 1
        residual = above.add_subplot(cells[row, column], label=f"{name} residual")
        pull = above.add_subplot(cells[row, column + 1], label=f"{name} pull")
        _draw_residuals(residual, validation, name)
        _draw_pulls(pull, validation, name)
        residual.set_xlim(limits)
        for ax, label in ((residual, _magnitude_label("true", validation)), (pull, "residual / error")):
            ax.tick_params(labelbottom=is_last, labelsize="small")
            if is_last:
                ax.set_xlabel(label, size="small", parse_math=False)
    above.align_ylabels()
    if chosen:
        above.legend(
            handles=_legend_entries(validation), loc="outside upper left", ncols=5, fontsize="x-small", frameon=False
        )
    axes = below.subplots(1, 2)
    for ax, kind, what in zip(axes, ("completeness", "purity"), ("true", "measured"), strict=True):
        ax.set_label(kind)
        _draw_fraction(ax, validation, kind)
        ax.set_xlabel(_magnitude_label(what, validation), size="small", parse_math=False)
    return fig


def _draw_residuals(ax, validation: Validation, name: str):
    """Draw the residuals of a quantity, their running median and spread."""
    scale, label = _scale_and_label(validation, name)
    magnitude = _values(validation.pairs["magnitude"])
    residual = scale * _values(validation.pairs[f"residual_{name}"])
    is_blended = np.asarray(validation.pairs["blended"], dtype=bool)
    running = validation.running(name, bins=int(np.clip(len(magnitude) // BIN_SOURCES, MIN_BINS, MAX_BINS)))
    middle, error, spread = (scale * _values(running[key]) for key in ("median", "median_error", "mad_sigma"))
    where = _values(running["magnitude"])
    low, high = _residual_limits(residual[np.isfinite(residual) & np.isfinite(magnitude)], middle, spread)
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    many = len(residual) > 300
    style = {"linestyle": "none", "markeredgewidth": 0, "rasterized": many}
    for chosen, color in ((~is_blended, ISOLATED), (is_blended, BLENDED)):
        for inside, marker, at in (
            ((residual >= low) & (residual <= high), "o", residual),
            (residual > high, "^", np.full(len(residual), high)),
            (residual < low, "v", np.full(len(residual), low)),
        ):
            shown = chosen & inside
            size, alpha = ((1.8, 0.35) if many else (3.5, 0.7)) if marker == "o" else (3.5, 0.8)
            ax.plot(magnitude[shown], at[shown], marker, color=color, markersize=size, alpha=alpha, **style)
    if len(where) > 1:
        ax.fill_between(where, middle - spread, middle + spread, color=TREND, alpha=0.13, linewidth=0, zorder=2.5)
        for edge in (middle - spread, middle + spread):
            ax.plot(where, edge, color=TREND, linewidth=0.7, linestyle="--", zorder=2.6)
    line = {"color": TREND, "linewidth": 1.1, "markersize": 3, "capsize": 2, "elinewidth": 1}
    # A single bin has its spread as the bar.
    ax.errorbar(where, middle, error if len(where) > 1 else spread, fmt="o-", **line)
    margin = 0.04 * (high - low)
    ax.set_ylim(low - margin, high + margin)
    ax.set_ylabel(label, size="small", parse_math=False)
    statistics = validation.statistics()
    row = statistics[list(statistics["quantity"]).index(name)]
    digits = _digits(scale * row["mad_sigma"])
    text = f"median {_signed(scale * row['median'], digits)}, σ {scale * row['mad_sigma']:.{digits}f}"
    if np.isfinite(row["outlier_fraction"]):
        text += f", {100 * row['outlier_fraction']:.1f} % outliers"
    ax.set_title(text if row["number"] else "no matched source", size="x-small", loc="left", pad=3)


def _draw_pulls(ax, validation: Validation, name: str):
    """Draw the histogram of the pulls of a quantity and the unit normal."""
    pulls = _values(validation.pairs[f"pull_{name}"])
    pulls = pulls[np.isfinite(pulls)]
    ax.set(xlim=(-PULL_RANGE, PULL_RANGE), yticks=[], xticks=[-4, -2, 0, 2, 4])
    grid = np.linspace(-PULL_RANGE, PULL_RANGE, 200)
    ax.plot(grid, np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi), color=TREND, linewidth=1, linestyle="--")
    if not len(pulls):
        ax.text(0.5, 0.85, "no errors", transform=ax.transAxes, ha="center", size="small", color=GREY)
        ax.set_ylim(0, 0.62)
        return
    # Few pulls in many bins would be a comb.
    bins = int(np.clip(2 * np.sqrt(len(pulls)), 5, PULL_BINS)) // 2 * 2 + 1
    style = {"bins": bins, "range": (-PULL_RANGE, PULL_RANGE), "density": True, "zorder": 0}
    heights, _, _ = ax.hist(np.clip(pulls, -PULL_RANGE, PULL_RANGE), color=ISOLATED, alpha=0.45, **style)
    ax.set_ylim(0, 1.3 * max(0.42, float(np.max(heights))))
    median, width = np.median(pulls), 1.4826 * np.median(np.abs(pulls - np.median(pulls)))
    ax.set_title(f"{_signed(median, 2)}, σ {width:.2f}", size="x-small", loc="left", pad=3)


def _draw_fraction(ax, validation: Validation, kind: str):
    """Draw completeness or purity in bins with their intervals, over the numbers of sources."""
    source, success = {"completeness": (validation.detections, "found"), "purity": (validation.entries, "real")}[kind]
    table = validation.fractions(kind)
    magnitude = _values(source["magnitude"])
    magnitude = magnitude[np.isfinite(magnitude)]
    total = getattr(validation, kind)
    found = int(np.sum(np.asarray(source[success], dtype=bool)))
    share = f" ({100 * total:.1f} %)" if np.isfinite(total) else ""
    ax.set_title(f"{kind}: {found} of {len(source)}{share}", size="x-small", loc="left", pad=3)
    ax.axhline(1, color=GREY, linewidth=0.8, zorder=0)
    ax.set_ylim(0, 1.08)
    ax.set_ylabel(kind, size="small")
    ax.tick_params(labelsize="small")
    counts = ax.twinx()
    counts.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    counts.set_label(f"{kind} numbers")
    if len(magnitude):
        # A few faint measurements of nothing shall not make the range.
        edges = np.histogram_bin_edges(magnitude, int(np.clip(len(magnitude) // 4, 4, 24)), _typical_range(magnitude))
        numbers, _, _ = counts.hist(magnitude, bins=edges.tolist(), color=GREY, alpha=0.25)
        counts.set_ylim(0, 3 * float(np.max(numbers)))
        ax.set_xlim(edges[0] - 0.02 * np.ptp(edges), edges[-1] + 0.02 * np.ptp(edges))
    else:
        ax.set_xticks([])
    counts.set_ylabel("sources in a bin", size="x-small", color=GREY)
    counts.tick_params(labelsize="x-small", colors=GREY)
    ax.set_zorder(counts.get_zorder() + 1)
    ax.patch.set_visible(False)
    where, fraction = _values(table["magnitude"]), _values(table["fraction"])
    bars = [fraction - _values(table["low"]), _values(table["high"]) - fraction]
    # Intervals of nothing or everything begin there, but for rounding.
    ax.errorbar(where, fraction, np.maximum(bars, 0), fmt="o-", color=ISOLATED, linewidth=1.1, markersize=4, capsize=2)


def _scale_and_label(validation: Validation, name: str) -> tuple[float, str]:
    """Return what the residuals of a quantity are multiplied with, and what then is their axis."""
    if name in ("ra", "dec"):
        residual = _values(validation.pairs[f"residual_{name}"])
        typical = np.nanquantile(np.abs(residual), 0.9) if np.isfinite(residual).any() else 0.0
        scale, unit = (1000.0, "mas") if typical < MILLIARCSEC_BELOW else (1.0, "arcsec")
        return scale, f"Δ{'RA cos(Dec)' if name == 'ra' else 'Dec'} [{unit}]"
    if name == "log_size":
        return 1.0, "Δ ln(half-light radius)"
    if name.startswith("mag_"):
        return 1.0, f"Δ{name.removeprefix('mag_')} [mag]"
    return 1.0, f"Δ({name.replace('-', ' − ', 1)}) [mag]"


def _residual_limits(residual, middle, spread) -> tuple[float, float]:
    """Return the range of an axis that shows most residuals and all of the running spread."""
    if not len(residual):
        return -1.0, 1.0
    reach = RANGE_SPREADS * float(np.nanmax(spread, initial=0.0)) or np.inf
    half = max(
        float(np.abs(middle).max()) + 0.5 * reach if np.isfinite(reach) else 0.0, min(np.abs(residual).max(), reach)
    )
    return -(half or 1e-3), half or 1e-3


def _magnitude_limits(validation: Validation) -> tuple[float, float]:
    """Return the range of the true magnitudes of the matched sources, of all if there is none."""
    table = validation.pairs if len(validation.pairs) else validation.detections
    magnitude = _values(table["magnitude"])
    magnitude = magnitude[np.isfinite(magnitude)]
    if not len(magnitude):
        return 0.0, 1.0
    margin = 0.04 * np.ptp(magnitude) or 0.5
    return float(magnitude.min() - margin), float(magnitude.max() + margin)


def _typical_range(magnitude) -> tuple[float, float]:
    """Return the range of magnitudes without the faintest and brightest hundredth, if these are far from the others."""
    low, high = np.quantile(magnitude, [0.01, 0.99])
    margin = 0.5 * (high - low)
    inside = magnitude[(magnitude >= low - margin) & (magnitude <= high + margin)]
    return float(inside.min()), float(inside.max())


def _legend_entries(validation: Validation) -> list[Line2D]:
    """Return what the signs in the panels of residuals mean."""
    point = {"linestyle": "none", "markeredgewidth": 0}
    entries = [Line2D([], [], marker="o", markersize=4, color=ISOLATED, label="isolated", **point)]
    if np.any(validation.pairs["blended"]):
        entries.append(Line2D([], [], marker="o", markersize=4, color=BLENDED, label="blended", **point))
    entries.append(Line2D([], [], marker="^", markersize=4, color=GREY, label="beyond the panel", **point))
    entries.append(Line2D([], [], marker="o", markersize=3, color=TREND, linewidth=1.1, label="running median"))
    return [*entries, Line2D([], [], color=TREND, linewidth=0.7, linestyle="--", label="± σ = 1.48 MAD")]


def _signed(value: float, digits: int) -> str:
    """Return a number with its sign, as typeset, without the minus of a zero."""
    text = f"{value:+.{digits}f}"
    return (text if float(text) else f"{0:.{digits}f}").replace("-", "−")


def _magnitude_label(what: str, validation: Validation) -> str:
    """Return the label of an axis of magnitudes."""
    return f"{what} {validation.channel} [AB mag]"


def _digits(value) -> int:
    """Return how many decimals a spread is given with."""
    return int(np.clip(1 - np.floor(np.log10(value)), 0, 6)) if value > 0 else 3


def _values(column) -> np.ndarray:
    """Return the values of a column as plain numbers."""
    return np.asarray(getattr(column, "value", column), dtype=float)
