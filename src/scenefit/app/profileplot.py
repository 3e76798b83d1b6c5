"""Figures of profiles and posteriors; reached as `scenefit.plot.profile`, `.corner` and `.link_curves`.

Every function returns a figure that pyplot knows nothing of, whose axes carry labels (`ax.get_label()`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

from scenefit.app.panels import NotebookFigure
from scenefit.infer.sample import Posterior
from scenefit.sky.frame import Channel, band_of
from scenefit.survey.profile import Profile, quantiles

INK, COLORS = "#000000", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colors of the whole and of its components (Okabe & Ito)."""
MAGNITUDE_RANGE = 12.0
"""How much fainter than the brightest point the profile of a source is shown."""
MAX_CORNER = 20
"""Numbers that a corner plot shows at most."""
CORNER_BINS, CORNER_SMOOTHING = 40, 1.2
"""Bins of an axis of a 2D histogram, and the standard deviation in bins of the Gaussian by which it is smoothed."""
CONTOUR_FRACTIONS = (0.865, 0.393)
"""Fractions of the draws inside contours, as within two and one standard deviations of a normal distribution of two numbers."""
_CURVE_POINTS = 100
_UNITS = {"pixel": "pix", "arcsec": "arcsec"}


def profile(profile: Profile, channels: Sequence[Channel] | None = None, *, components: bool = True) -> Figure:
    """Show surface brightness and curve of growth against the semi-major axis, a column a channel.

    Solid lines are the light itself, dashed ones are convolved with the PSF, if the profile has one. Shades reach from the 16
    to the 84 % quantile of a posterior, lines are medians; the dotted line is at the half-light radius.

    Parameters
    ----------
    profile : Profile
        From `scenefit.profile`.
    channels : sequence, optional
        Which channels to show; all by default.
    components : bool
        Whether to show the parts of a composite source.

    Returns
    -------
    matplotlib.figure.Figure
        Axes "CHANNEL surface brightness" and "CHANNEL curve of growth" for every channel. Radii are in arcsec and surface
        brightnesses in magnitudes where there is a WCS, and there are zeropoints.

    Raises
    ------
    ValueError
        If the profile lacks a channel, or none is asked for.
    """
    channels = profile.channels if channels is None else tuple(channels)
    if unknown := [channel for channel in channels if channel not in profile.channels]:
        raise ValueError(f"The profile has channels {list(profile.channels)}, not {unknown}.")
    if not channels:
        raise ValueError("There is no channel to show.")
    has_sky = bool(np.isfinite(profile.pixel_scale))
    scale = profile.pixel_scale if has_sky else 1.0
    lights = [("total", profile.total, INK)]
    if components and len(profile.components) > 1:
        lights += [(n, part, COLORS[k % len(COLORS)]) for k, (n, part) in enumerate(profile.components.items())]
    half_light = profile.r50
    fig = NotebookFigure((2.9 * len(channels) + 0.9, 5.6))
    axes = fig.subplots(2, len(channels), squeeze=False, sharex=True)
    for column, channel in enumerate(channels):
        number, name = profile.channels.index(channel), _channel_name(channel)
        top, bottom = axes[:, column]
        top.set_label(f"{name} surface brightness")
        bottom.set_label(f"{name} curve of growth")
        top.set_title(name, parse_math=False)
        if column > 0:
            top.sharey(axes[0, 0])
            top.tick_params(labelleft=False)
        for label, light, color in lights:
            for convolved, style in (("", "-"), ("convolved_", "--")):
                for ax, what in ((top, "surface_brightness"), (bottom, "curve_of_growth")):
                    values = getattr(light, convolved + what)
                    if values is None:
                        continue
                    shown = _as_shown(profile, values[:, number], is_density=ax is top)
                    legend = f"{label}, convolved" if convolved else label
                    line = {"color": color, "linestyle": style, "label": legend}
                    _draw_band(ax, profile.radius * scale, shown, profile.is_sampled, line)
        radius = float(quantiles(half_light[:, number])[1]) * scale
        for ax in (top, bottom):
            if radius > 0:
                ax.axvline(radius, color=INK, linewidth=0.8, linestyle=":")
            ax.grid(alpha=0.3)
        bottom.set(xscale="log", xlabel="semi-major axis [arcsec]" if has_sky else "semi-major axis [pix]")
    _scale_brightness(axes[0, 0], profile, [profile.channels.index(channel) for channel in channels])
    axes[1, 0].set_ylabel("flux inside [nJy]" if profile.is_calibrated else "flux inside")
    if len(lights) > 1 or profile.psf_sigma is not None:
        legend = axes[0, 0].legend(fontsize="x-small")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return fig


def corner(
    posterior: Posterior, paths: Sequence[str] | str | None = None, *, truths: Mapping[str, object] | None = None
) -> Figure:
    """Show the draws of parameters: of each by itself on the diagonal, of pairs below.

    Histograms have lines at the 16, 50 and 84 % quantiles; contours hold 39 and 86 % of the draws (one and two standard
    deviations of a normal distribution in two dimensions).

    Parameters
    ----------
    posterior : Posterior
    paths : sequence of str, optional
        Paths or patterns of parameters (see `Parameters.match`), of which those with draws are shown; all by default.
    truths : mapping of path to value, optional
        Values to mark.

    Returns
    -------
    matplotlib.figure.Figure
        Axes "X" on the diagonal and "Y X" below it, X and Y being paths with the place in an array, such as
        "sources.host.center[0]".

    Raises
    ------
    KeyError
        If a path matches no parameter, or only fixed ones.
    ValueError
        If there are more than 20 numbers to show, or a truth has another shape than its parameter.
    """
    columns = _columns(posterior, [paths] if isinstance(paths, str) else paths)
    if len(columns) > MAX_CORNER:
        raise ValueError(
            f"A corner plot shows at most {MAX_CORNER} numbers, not {len(columns)}: choose some with paths=."
        )
    marks = _truth_values(posterior, truths or {})
    names, count = list(columns), len(columns)
    ranges = [_range(columns[name], marks.get(name)) for name in names]
    labels = [_label(posterior, name) for name in names]
    fig = NotebookFigure((1.7 * count + 0.8, 1.7 * count + 0.8))
    for row, column in ((r, c) for r in range(count) for c in range(r + 1)):
        x, y = names[column], names[row]
        ax = fig.add_subplot(count, count, row * count + column + 1, label=x if row == column else f"{y} {x}")
        ax.set_xlim(ranges[column])
        if row == column:
            _draw_histogram(ax, columns[x], ranges[column])
        else:
            _draw_density(ax, columns[x], columns[y], ranges[column], ranges[row])
            ax.set_ylim(ranges[row])
        if x in marks:
            ax.axvline(marks[x], color=COLORS[1], linewidth=1)
        if y in marks and row != column:
            ax.axhline(marks[y], color=COLORS[1], linewidth=1)
        ax.tick_params(labelsize="x-small", labelbottom=row == count - 1, labelleft=column == 0 < row)
        ax.locator_params(nbins=3)
        if row == count - 1:
            ax.set_xlabel(labels[column], size="small", parse_math=False)
        if column == 0 < row:
            ax.set_ylabel(labels[row], size="small", parse_math=False)
    return fig


def link_curves(posterior: Posterior, path: str, *, truth: Mapping[str, object] | None = None) -> Figure:
    """Show a linked parameter against wavelength: its median, the 16 to 84 % quantiles, and points in the bands.

    Parameters
    ----------
    posterior : Posterior
    path : str
        Of a parameter of a morphology that is a link.
    truth : mapping of band to value, optional
        Values to mark.

    Returns
    -------
    matplotlib.figure.Figure
        Axes "PATH", or "PATH[0]", "PATH[1]", ... for each number of a parameter that is an array. A link that is free in
        every band (`PerBand`) has no curve, only points in the order of the channels.

    Raises
    ------
    ValueError
        If the parameter isn't linked, or a band of the truth is unknown.
    KeyError
        If there are no draws of it.
    """
    frame = posterior.result.scene.frame
    in_bands = posterior.in_channels(path)
    base, _, field = path.rpartition(".morphology.")
    link = getattr(dict(posterior.result.scene.components())[base].morphology, field)
    # Epochs of one band are one point.
    bands = {band_of(channel): number for number, channel in reversed(list(enumerate(frame.channels)))}
    bands = {band: bands[band] for band in dict.fromkeys(map(band_of, frame.channels))}
    if unknown := sorted(set(truth or {}) - set(bands)):
        raise ValueError(f"The model has bands {list(bands)}, not {unknown}.")
    wavelengths = getattr(link, "wavelengths", None)
    places = {band: wavelengths[band] if wavelengths else float(n) for n, band in enumerate(bands)}
    x = np.array(list(places.values()))
    elements = list(np.ndindex(in_bands.shape[2:]))
    fig = NotebookFigure((5.2, 2.7 * len(elements) + 0.5))
    axes = fig.subplots(len(elements), 1, squeeze=False, sharex=True)[:, 0]
    for ax, place in zip(axes, elements, strict=True):
        name = _element_name(path, place)
        ax.set_label(name)
        if wavelengths:
            fine = np.linspace(x.min(), x.max(), _CURVE_POINTS)
            curve = posterior.curve(path, fine)[(slice(None), slice(None), *place)]
            _draw_band(ax, fine, quantiles(curve), True, {"color": COLORS[0]})
        low, middle, high = quantiles(in_bands[(slice(None), list(bands.values()), *place)])
        ax.errorbar(x, middle, [middle - low, high - middle], fmt="o", color=INK, markersize=4, linewidth=1)
        if truth:
            values = [np.asarray(value, dtype=float)[place] for value in truth.values()]
            ax.plot([places[band] for band in truth], values, "x", color=COLORS[1])
        ax.set_ylabel(_label(posterior, name), parse_math=False)
        ax.grid(alpha=0.3)
    if wavelengths:
        axes[-1].set_xlabel("wavelength [micron]")
        above = axes[0].secondary_xaxis("top")
        above.set_xticks(x, list(bands), size="small")
    else:
        axes[-1].set_xticks(x, list(bands))
    return fig


def _as_shown(profile: Profile, values, is_density: bool) -> np.ndarray:
    """Return low, middle and high values of draws, shape (3, radius): of surface brightness in magnitudes if it has any."""
    shown = quantiles(values)
    if not is_density:
        return shown
    return profile.magnitudes(shown) if profile.has_magnitudes else np.where(shown > 0, shown, np.nan)


def _scale_brightness(ax, profile: Profile, numbers):
    """Scale and name the axis of surface brightness."""
    peaks = quantiles(profile.total.surface_brightness[:, numbers])[1].max(axis=0)
    if profile.total.convolved_surface_brightness is not None and not (peaks > 0).any():
        peaks = quantiles(profile.total.convolved_surface_brightness[:, numbers])[1].max(axis=0)
    if profile.has_magnitudes:
        ax.set_ylabel("surface brightness [mag / arcsec²]")
        ax.invert_yaxis()
    else:
        unit = " [nJy / pix²]" if profile.is_calibrated else " [flux / pix²]"
        ax.set(yscale="log", ylabel="surface brightness" + unit)
    peak = np.nanmax(peaks, initial=0.0)
    if peak > 0:
        faintest = peak * 10 ** (-0.4 * MAGNITUDE_RANGE)
        limits = 0.5 * faintest, 2 * peak
        ax.set_ylim(*(profile.magnitudes(np.array(limits)) if profile.has_magnitudes else limits))


def _draw_band(ax, x, values, is_sampled: bool, line: dict):
    """Draw the middle of three values, and a shade between the outer ones if they are quantiles of draws."""
    low, middle, high = values
    ax.plot(x, middle, linewidth=1.3, **line)
    if is_sampled:
        ax.fill_between(x, low, high, color=line["color"], alpha=0.2, linewidth=0)


def _draw_histogram(ax, values, limits):
    """Draw a histogram with its quantiles, which are the title."""
    ax.hist(values, bins=CORNER_BINS, range=limits, histtype="step", color=COLORS[0], density=True)
    low, middle, high = quantiles(values)
    for value, style in ((low, ":"), (middle, "-"), (high, ":")):
        ax.axvline(value, color=INK, linewidth=0.8, linestyle=style)
    digits = int(np.clip(1 - np.floor(np.log10(max(high - low, 1e-12))), 0, 8))
    title = f"${middle:.{digits}f}_{{-{middle - low:.{digits}f}}}^{{+{high - middle:.{digits}f}}}$"
    ax.set_title(title, size="small")
    ax.set_yticks([])


def _draw_density(ax, x, y, x_limits, y_limits):
    """Draw contours of a smoothed histogram, around fractions of the draws, and the draws outside of them."""
    counts, x_edges, y_edges = np.histogram2d(x, y, bins=CORNER_BINS, range=(x_limits, y_limits))
    smooth = ndimage.gaussian_filter(counts, CORNER_SMOOTHING, mode="constant")
    ordered = np.sort(smooth.ravel())[::-1]
    inside = np.cumsum(ordered) / ordered.sum()
    levels = np.unique([ordered[np.searchsorted(inside, fraction)] for fraction in CONTOUR_FRACTIONS])
    middles = [0.5 * (edges[1:] + edges[:-1]) for edges in (x_edges, y_edges)]
    ax.plot(x, y, ",", color=COLORS[0], alpha=0.3)
    # A flat or empty histogram has no contours.
    levels = levels[(levels > 0) & (levels < smooth.max())]
    if levels.size:
        ax.contourf(*middles, smooth.T, levels=[*levels, smooth.max()], colors=["#B3D4E8", COLORS[0]][-levels.size :])
        ax.contour(*middles, smooth.T, levels=levels, colors=INK, linewidths=0.7)


def _columns(posterior: Posterior, patterns: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Return the draws of single numbers by name."""
    if patterns is None:
        paths = list(posterior.draws)
    else:
        paths = []
        for pattern in patterns:
            matching = posterior.result.parameters.match(pattern)
            # A path without draws raises the posterior's own message.
            paths += [path for path in matching if path in posterior.draws] or [
                p for p in matching if posterior[p].size
            ]
    columns = {}
    for path in dict.fromkeys(paths):
        values = posterior[path]
        for place in np.ndindex(values.shape[1:]):
            columns[_element_name(path, place)] = values[(slice(None), *place)]
    return columns


def _truth_values(posterior: Posterior, truths: Mapping[str, object]) -> dict[str, float]:
    """Return true values of single numbers by name."""
    marks = {}
    for path, value in truths.items():
        value, shape = np.asarray(value, dtype=float), posterior[path].shape[1:]
        if value.shape != shape:
            raise ValueError(f"The truth of {path} must have shape {shape}; got {value.shape}.")
        marks |= {_element_name(path, place): float(value[place]) for place in np.ndindex(shape)}
    return marks


def _range(values, mark) -> tuple[float, float]:
    """Return the limits of an axis that shows draws, and a mark if there is one."""
    low, high = np.quantile(values, [0.001, 0.999])
    low, high = (low, high) if mark is None else (min(low, mark), max(high, mark))
    margin = 0.05 * (high - low) or 1e-6 * max(abs(high), 1.0)
    return float(low - margin), float(high + margin)


def _element_name(path: str, place: tuple[int, ...]) -> str:
    """Return the name of a number of an array, as `Posterior.summary` gives it."""
    return path + (f"[{','.join(str(i) for i in place)}]" if place else "")


def _label(posterior: Posterior, name: str) -> str:
    """Return a short name with the unit: "host half_light_radius [pix]"."""
    path, _, element = name.partition("[")
    words = [
        word for word in path.split(".") if word not in ("sources", "parts", "morphology", "spectrum", "observations")
    ]
    unit = posterior.result.parameters.table[path].unit
    if unit.startswith("flux"):
        is_calibrated = all(obs.flux_unit == "nJy" for obs in posterior.result.observations)
        unit = unit.replace("flux", "nJy") if is_calibrated else ""
    unit = _UNITS.get(unit, unit)
    return " ".join(words[:-1]) + "\n" + words[-1] + (f"[{element}" if element else "") + (f" [{unit}]" if unit else "")


def _channel_name(channel: Channel) -> str:
    """Return a channel name as text."""
    return " ".join(map(str, channel)) if isinstance(channel, tuple) else channel
