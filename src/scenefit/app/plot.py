"""Figures: observations, scenes, single sources, convergence, profiles, posteriors, comparisons with the truth.

Every function returns a figure that pyplot knows nothing of. Save it with `fig.savefig(path)`; at the end of
a notebook cell it shows itself. Its axes carry labels (`ax.get_label()`) such as "HSC residual".
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from astropy.coordinates import SkyCoord
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure

from scenefit.app.color import asinh_rgb, balanced_options, default_channel_map, default_stretch
from scenefit.app.panels import NotebookFigure, draw_outlines, mark_positions, show_residual, show_rgb
from scenefit.app.profileplot import corner, link_curves, profile
from scenefit.app.validationplot import validation
from scenefit.arrays.box import Box
from scenefit.data.correlated import CorrelatedNoise
from scenefit.data.noise import WhiteNoise
from scenefit.model.packing import component_box
from scenefit.sky.frame import Channel, pixel_map, pixel_scale_of
from scenefit.survey.deblend import deblend

__all__ = [
    "asinh_rgb",
    "convergence",
    "corner",
    "default_channel_map",
    "link_curves",
    "observation",
    "profile",
    "scene",
    "sources",
    "validation",
]

RESIDUAL_LIMITS = (4, 10)
"""Smallest and largest range of the residual maps, in standard deviations."""
MAX_SOURCE_ROWS = 20
"""Number of sources that `sources` shows unless told which."""
PSF_MARGIN = 3.0
"""Standard deviations of the PSF by which the view of a source in an observation exceeds its stamp."""


def observation(obs, *, catalog=None) -> Figure:
    """Show the data of an observation in color, and its PSF in every channel.

    Colors are balanced so that the light of the field is neutral as a whole. The PSF is as the renderer knows
    it: recentered, sampled at the observation's pixels; on an asinh scale.

    Parameters
    ----------
    obs : Observation
        With a WCS, a scale bar and the directions of north and east are drawn.
    catalog : SkyCoord, optional
        Positions to mark, labelled by their index; those outside the image aren't drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Axes "NAME data", and "NAME PSF CHANNEL" for each channel of the PSF.

    Raises
    ------
    TypeError
        If `obs` isn't an observation, or `catalog` no SkyCoord.
    ValueError
        If there is a catalog but no WCS.
    """
    _check_observation(obs)
    if catalog is not None and not isinstance(catalog, SkyCoord):
        raise TypeError(f"catalog wants sky coordinates (SkyCoord); got {type(catalog).__name__}.")
    if catalog is not None and obs.wcs is None:
        raise ValueError(f"{obs.name} has no WCS, so sky coordinates have no place on it.")
    psf = _psf_images(obs)
    names = [_channel_name(c) for c in obs.channels] if len(psf) == len(obs.channels) else ["all channels"]
    rows = min(3, len(psf))
    columns = int(np.ceil(len(psf) / rows))
    height, width = obs.shape[-2:]
    side = 4.6
    widths = [side * float(np.clip(width / height, 0.4, 3)), *[1.1 * side / max(2, rows)] * columns]
    fig = NotebookFigure((sum(widths) + 0.9, side + 0.3))
    grid = fig.add_gridspec(rows, columns + 1, width_ratios=widths)
    ax = fig.add_subplot(grid[:, 0], label=f"{obs.name} data")
    ax.set_title(_heading(obs.name, obs.channels), parse_math=False)
    show_rgb(ax, asinh_rgb(_light(obs), **_look(obs)), obs.wcs)
    if catalog is not None:
        x, y = obs.wcs.world_to_pixel(catalog.reshape(-1))
        mark_positions(ax, [str(n) for n in range(len(x))], np.stack([y, x], axis=-1), (height, width))
    panels = []
    for n, (name, plane) in enumerate(zip(names, psf, strict=True)):
        ax = fig.add_subplot(grid[n % rows, 1 + n // rows], label=f"{obs.name} PSF {name}")
        extent = Box(plane.shape, (-(plane.shape[0] // 2), -(plane.shape[1] // 2))).extent
        norm = AsinhNorm(linear_width=1e-3, vmin=-1e-3, vmax=1)
        shown = ax.imshow(plane / plane.max(), norm=norm, cmap="cividis", origin="lower", extent=extent)
        ax.set_title(f"PSF {name}", size="small", parse_math=False)
        ax.tick_params(labelsize="x-small")
        if n % rows == rows - 1 or n == len(psf) - 1:
            ax.set_xlabel("pixels", size="x-small")
        panels.append(ax)
    bar = fig.colorbar(shown, ax=panels, ticks=[0, 1e-3, 1e-2, 1e-1, 1], shrink=0.8 if rows > 1 else 0.45)
    bar.ax.set_yticklabels(["0", "0.001", "0.01", "0.1", "1"], size="x-small")
    bar.ax.minorticks_off()
    bar.set_label("PSF / peak", size="small")
    return fig


def scene(scene, observations, *, labels: bool = True, boxes: bool = True, channel: Channel | None = None) -> Figure:
    """Compare a scene with all observations: observed, rendered, residual, below the model on its own frame.

    Observed and rendered images are shown without background and with the same stretch. The residual map is
    the sum over channels of (observed - rendered) / sigma, divided by the root of their number: it has unit
    variance where the model is right, keeps the sign, and brings out what the channels have in common (wrong
    shapes, dipoles of wrong positions) better than any one of them. Residuals of opposite sign can cancel in
    it, but not in the chi-square per pixel, which is given for every channel; pass `channel` for the map of
    that one alone. Pixels without information or outside the frame are grey and don't count.

    Where noise is correlated, too, the map is in units of the standard deviation of each pixel by itself, and the scale
    says so: neighbours then scatter together. The chi-square is that of the residuals without their correlation, for each of
    the independent numbers (`noise.num_modes`) that the pixels are worth.

    Parameters
    ----------
    scene : Scene
    observations : Observation or sequence of Observation
        They are matched to the scene's frame here.
    labels : bool
        Whether to mark the sources, where they appear in each observation (its astrometric shift included),
        and to write their names if there are no more than 100.
    boxes : bool
        Whether to outline the stamps of the components.
    channel : str or (band, epoch), optional
        Show the residuals of this channel alone in the observations that have it.

    Returns
    -------
    matplotlib.figure.Figure
        Axes "model", and "NAME observed", "NAME rendered", "NAME residual" for each observation.

    Raises
    ------
    TypeError
        If something else than observations is given.
    ValueError
        If there is no observation, or none has the channel asked for.
    """
    matched = _matched(observations, scene.frame)
    if channel is not None and not any(channel in obs.channels for obs in matched):
        having = sorted({_channel_name(c) for obs in matched for c in obs.channels})
        raise ValueError(f"No observation has a channel {channel!r}; there are {having}.")
    outer = scene.evaluate(outer=True)
    model, rendered = outer[(slice(None), *scene.frame.inner_box.slices)], [obs.render(outer) for obs in matched]
    compared = [_compare(obs, image) for obs, image in zip(matched, rendered, strict=True)]
    maps = [_residual_map(obs, values, channel) for obs, values in zip(matched, compared, strict=True)]
    finite = np.concatenate([[0.0], *(np.abs(values[np.isfinite(values)]) for values, _ in maps)])
    limit = 2 * int(np.ceil(np.clip(np.percentile(finite, 99.8), *RESIDUAL_LIMITS) / 2))
    fig, model_axes, rows = _scene_axes(scene.frame, matched)
    model_axes.set_title(_heading("model", scene.frame.channels), parse_math=False)
    look = _model_look(scene.frame, _model_noise(scene.frame, matched), model)
    show_rgb(model_axes, asinh_rgb(model, **look), scene.frame.wcs)
    _mark_scene(model_axes, scene, None, labels, boxes)
    for obs, image, values, (shown, title), axes in zip(matched, rendered, compared, maps, rows, strict=True):
        look = _look(obs)
        light = np.where(obs.covered, image - obs.background_image(), np.nan)
        show_rgb(axes[0], asinh_rgb(_light(obs), **look), obs.wcs)
        show_rgb(axes[1], asinh_rgb(light, **look), obs.wcs, compass=False)
        _mark_scene(axes[0], scene, obs, labels, boxes)
        axes[0].set_ylabel(_heading(obs.name, obs.channels), parse_math=False)
        axes[0].set_title("observed")
        axes[1].set_title("rendered")
        show_residual(axes[2], shown, limit, "pixels correlated" if _is_correlated(obs) else "")
        axes[2].set_title(title, parse_math=False)
        axes[2].set_xlabel(_chi_square_text(values, obs.channels), size="x-small", parse_math=False)
    return fig


def sources(scene, observations, names: Sequence[str] | None = None) -> Figure:
    """Show sources one by one, beside what the data hold once all other sources are subtracted.

    Colors are balanced as for the whole field; each source has its own stretch, common to its rendering and
    the data. Pixels without information, beyond the image or outside the frame are grey.

    Parameters
    ----------
    scene : Scene
    observations : Observation or sequence of Observation
    names : sequence of str, optional
        Names of sources; the first 20 of the scene by default.

    Returns
    -------
    matplotlib.figure.Figure
        For each source a row of axes: "SOURCE model" (its stamp of the frame), and for each observation
        "SOURCE NAME rendered" and "SOURCE NAME data - others".

    Raises
    ------
    KeyError
        If the scene has no source of that name.
    TypeError
        If something else than observations is given.
    ValueError
        If there is no observation or no source to show, or a source lies outside the frame.
    """
    matched = _matched(observations, scene.frame)
    names = list(scene.sources)[:MAX_SOURCE_ROWS] if names is None else list(names)
    unknown = [name for name in names if name not in scene.sources]
    if unknown:
        raise KeyError(f"The scene has no source {unknown}; it has {list(scene.sources)}.")
    if not names:
        raise ValueError("There is no source to show.")
    model, noise = scene.evaluate(), _model_noise(scene.frame, matched)
    model_map = _model_look(scene.frame, noise, model)["channel_map"]
    apart = deblend(scene, matched, names, progress=False)
    maps = [_look(obs)["channel_map"] for obs in matched]
    columns = 1 + 2 * len(matched)
    fig = NotebookFigure((1.7 * columns + 0.3, 1.75 * len(names) + 0.5))
    axes = fig.subplots(len(names), columns, squeeze=False)
    axes[0, 0].set_title("model", size="small")
    for name, (model_axes, *others) in zip(names, axes, strict=True):
        box = _source_box(scene, name)
        alone = scene.evaluate([name])
        model_axes.set_label(f"{name} model")
        model_axes.set_ylabel(name, parse_math=False)
        rgb = asinh_rgb(alone[(slice(None), *box.slices)], channel_map=model_map, noise=noise)
        show_rgb(model_axes, rgb, scene.frame.wcs, compass=False)
        for n, obs in enumerate(matched):
            image = np.where(obs.covered, apart.image(name, obs.name), np.nan)
            view = _view(scene.frame, obs, box)
            window = view.intersection(Box(obs.shape[-2:]))
            alone_here, residual = (
                plane[(slice(None), *window.slices)] for plane in (image, apart.residuals[obs.name])
            )
            stretch, q = default_stretch(alone_here, maps[n], obs.noise.level())
            pair = zip(others[2 * n : 2 * n + 2], ("rendered", "data - others"), (0, residual), strict=True)
            for ax, what, rest in pair:
                ax.set_label(f"{name} {obs.name} {what}")
                if name == names[0]:
                    ax.set_title(f"{obs.name}\n{what}", size="small", parse_math=False)
                if window.is_empty:
                    ax.set_axis_off()
                    continue
                rgb = asinh_rgb(alone_here + rest, channel_map=maps[n], stretch=stretch, q=q)
                show_rgb(ax, rgb, obs.wcs, window=window, view=view, bar=what == "rendered", compass=False)
    return fig


def convergence(result) -> Figure:
    """Show how a fit came to its end: the loss above its best value, and the projected gradient.

    Parameters
    ----------
    result : FitResult
        Its `history` maps names to equally long arrays: "loss", and, as far as recorded, "step" (else
        counted), "seconds" and "projected_gradient".

    Returns
    -------
    matplotlib.figure.Figure
        Axes "loss by step", "loss by seconds" and "projected gradient", for what was recorded. Where the loss
        is the best one there is no point: the scale is logarithmic.

    Raises
    ------
    ValueError
        If there is no loss, or the arrays differ in length.
    """
    history = {key: np.atleast_1d(np.asarray(values, dtype=float)) for key, values in result.history.items()}
    if not history.get("loss", np.empty(0)).size:
        raise ValueError(f"The history holds no 'loss' to show; it has {list(history)}.")
    lengths = {key: len(values) for key, values in history.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The arrays of the history must be equally long; got {lengths}.")
    steps = history.get("step", np.arange(len(history["loss"])))
    excess = history["loss"] - np.nanmin(history["loss"])
    panels = [("loss by step", "step", "loss − best loss", steps, excess)]
    if "seconds" in history:
        panels.append(("loss by seconds", "time [s]", "loss − best loss", history["seconds"], excess))
    if "projected_gradient" in history:
        gradient = history["projected_gradient"]
        panels.append(("projected gradient", "step", "projected gradient", steps, gradient))
    fig = NotebookFigure((3.4 * len(panels), 2.9))
    for n, (label, x_label, y_label, x, y) in enumerate(panels):
        ax = fig.add_subplot(1, len(panels), n + 1, label=label)
        ax.plot(x, np.where(y > 0, y, np.nan), ".-", color="#0072B2", linewidth=1.2, markersize=4)
        if (y > 0).any():
            ax.set_yscale("log")
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.grid(alpha=0.3)
    return fig


def _check_observation(obs):
    """Raise TypeError unless `obs` has what an observation has."""
    if not all(hasattr(obs, name) for name in ("data", "noise", "psf", "match", "render")):
        raise TypeError(f"Expected an Observation; got {type(obs).__name__}.")


def _matched(observations, frame) -> list:
    """Return the observations, one or several, matched to the frame."""
    if not isinstance(observations, Sequence):
        observations = [observations]
    if not observations:
        raise ValueError("There is no observation to show; give at least one.")
    for obs in observations:
        _check_observation(obs)
    return [obs.match(frame) for obs in observations]


def _light(obs) -> np.ndarray:
    """Return the data without background, NaN where there is no information."""
    return np.where(obs.noise.valid, obs.data - obs.background_image(), np.nan)


def _look(obs) -> dict:
    """Return the options of `asinh_rgb` for an observation."""
    return balanced_options(_light(obs), noise=obs.noise.level(), channels=obs.channels)


class _Comparison(NamedTuple):
    """An observation compared with a model.

    residual : array, shape (channel, y, x)
        Observed minus rendered, in standard deviations of each pixel; NaN where there is nothing to compare.
    chi_square, num_modes : array, shape (channel,)
        Of the whitened residuals, and how many independent numbers these are.
    """

    residual: np.ndarray
    chi_square: np.ndarray
    num_modes: np.ndarray

    def per_mode(self, channels: slice | list[int] = slice(None)) -> float:
        """Return the chi-square of some channels for each independent number; NaN if there are none."""
        count = self.num_modes[channels].sum()
        return float(self.chi_square[channels].sum() / count) if count else float("nan")


def _is_correlated(obs) -> bool:
    """Return whether whitened pixels are combinations of many: those of a decimated lattice, say, show a pattern of their own."""
    return isinstance(obs.noise, CorrelatedNoise)


def _compare(obs, rendered) -> _Comparison:
    """Compare a matched observation with its rendering."""
    known, unit = obs.compared, obs.noise.level()
    residual = np.where(known, obs.data - rendered, 0.0) / unit[:, None, None]
    noise = obs.on_frame().noise.scaled(unit)
    whitened = np.asarray(noise.whiten(residual), float)
    # Of correlated noise, that of each pixel by itself.
    alone = WhiteNoise(noise.weights, noise.scale).whiten(residual) if _is_correlated(obs) else whitened
    chi_square = np.sum(whitened**2, axis=(1, 2))
    return _Comparison(np.where(known, np.asarray(alone, float), np.nan), chi_square, noise.num_modes())


def _residual_map(obs, compared: _Comparison, channel):
    """Return the map (y, x) of the channel asked for or of all together, and its title."""
    number = obs.channels.index(channel) if channel in obs.channels else None
    chosen, name = (slice(None), "") if number is None else ([number], f" {_channel_name(channel)}")
    residual = compared.residual[chosen]
    count = np.isfinite(residual).sum(axis=0)
    total = np.nansum(residual, axis=0) / np.sqrt(np.maximum(count, 1))
    return np.where(count > 0, total, np.nan), f"residual{name}, χ²/pixel {compared.per_mode(chosen):.2f}"


def _chi_square_text(compared: _Comparison, channels) -> str:
    """Return the chi-square per pixel of each of several channels; of many, the ten largest."""
    values = [compared.per_mode([n]) for n in range(len(channels))]
    order = np.sort(np.argsort(np.nan_to_num(values))[-10:])
    texts = [f"{values[n]:.2f}" if np.isfinite(values[n]) else "–" for n in order]
    names = [_channel_name(channels[n]) for n in order]
    entries = [f"{name} {text}".replace(" ", "\xa0") for name, text in zip(names, texts, strict=True)]
    return textwrap.fill(", ".join(entries), 44) if len(values) > 1 else ""


def _channel_name(channel) -> str:
    """Return a channel name as text."""
    return " ".join(map(str, channel)) if isinstance(channel, tuple) else str(channel)


def _heading(name, channels) -> str:
    """Return a name with those of the channels, shortened if they are many."""
    names = [_channel_name(channel) for channel in channels]
    return f"{name}: {', '.join(names if len(names) <= 6 else [*names[:3], '…', names[-1]])}"


def _psf_images(obs) -> np.ndarray:
    """Return the PSF on the observation's pixels, odd-sized and centered, shape (channel, y, x)."""
    half = int(np.ceil(obs.psf.extent))
    size = 2 * max(half, int(obs.psf.size) // 2) + 1
    fine = max(1, int(np.ceil(2 * obs.psf.band_limit)))
    frequency = np.fft.fftfreq(size * fine)
    transfer = obs.psf.transfer(frequency, frequency, fine * np.eye(2))
    images = np.fft.fftshift(np.fft.ifft2(transfer).real[:, ::fine, ::fine], axes=(1, 2)) * fine**2
    middle = slice(size // 2 - half, size // 2 + half + 1)
    return images[:, middle, middle]


def _model_look(frame, noise, model) -> dict:
    """Return the options of `asinh_rgb` for the model image."""
    return balanced_options(model, noise=noise, channels=frame.channels, noise_free=True)


def _model_noise(frame, observations) -> np.ndarray:
    """Return per model channel the deepest image's noise, as flux in a model pixel of equal brightness."""
    noise = np.full(len(frame.channels), np.inf)
    for obs in observations:
        ratio = 1.0 if frame.wcs is None else (frame.pixel_scale / pixel_scale_of(obs.wcs)) ** 2
        index = list(frame.channel_index(obs.channels))
        noise[index] = np.minimum(noise[index], obs.noise.level() * ratio)
    return np.where(np.isfinite(noise), noise, 0.0)


def _place(frame, obs, positions) -> np.ndarray:
    """Return where positions (..., 2) on the frame appear in an observation, its shift and rotation included."""
    if obs is None:
        return positions
    moved = obs.apparent_positions(positions, frame)
    return pixel_map(frame.wcs, obs.wcs, moved[..., 0], moved[..., 1])


def _corners(box) -> list:
    """Return the outer corners (y, x) of a box, in order."""
    x0, x1, y0, y1 = box.extent
    return [(y0, x0), (y0, x1), (y1, x1), (y1, x0)]


def _mark_scene(ax, scene, obs, labels, boxes):
    """Mark sources and outline stamps on the model frame (`obs` None) or on an observation."""
    stamps = [component_box(c, scene.frame).intersection(scene.frame.box) for _, c in scene.components()]
    outlines = [[*_corners(box), _corners(box)[0]] for box in stamps if not box.is_empty]
    if boxes and outlines:
        draw_outlines(ax, _place(scene.frame, obs, np.array(outlines)))
    if labels and scene.sources:
        centers = [
            np.mean([np.asarray(c.center, float) for _, c in source.components(name)], axis=0)
            for name, source in scene.sources.items()
        ]
        shape = scene.frame.box.shape if obs is None else obs.shape[-2:]
        mark_positions(ax, list(scene.sources), _place(scene.frame, obs, np.array(centers)), shape)


def _source_box(scene, name) -> Box:
    """Return the box of the frame that holds the stamps of all components of a source."""
    boxes = [component_box(component, scene.frame) for _, component in scene.sources[name].components(name)]
    whole = boxes[0]
    for box in boxes[1:]:
        whole = whole.union(box)
    whole = whole.intersection(scene.frame.box)
    if whole.is_empty:
        raise ValueError(f"Source {name!r} lies outside the model frame of {scene.frame.box.shape} pixels.")
    return whole


def _view(frame, obs, box) -> Box:
    """Return the box of an observation's pixels, on the image or not, where the light of a stamp falls."""
    corners = _place(frame, obs, np.array(_corners(box)))
    margin = PSF_MARGIN * obs.psf.effective_sigma.max()
    low = np.floor(corners.min(axis=0) - margin + 0.5).astype(int).tolist()
    high = np.ceil(corners.max(axis=0) + margin + 0.5).astype(int).tolist()
    return Box.from_bounds((low[0], high[0]), (low[1], high[1]))


def _scene_axes(frame, observations):
    """Return the figure of `scene`, the axes of the model, and three axes for each observation."""
    side = 2.7
    aspects = [np.clip(obs.shape[1] / obs.shape[2], 0.4, 2.0) for obs in observations]
    heights = [1.5 * side * min(1.0, frame.box.shape[0] / frame.box.shape[1]), *(side * a for a in aspects)]
    fig = NotebookFigure((3 * side + 1.2, sum(heights) + 0.5 * len(heights)))
    grid = fig.add_gridspec(len(heights), 3, height_ratios=heights)
    model = fig.add_subplot(grid[0, :], label="model")
    rows = [[fig.add_subplot(grid[n, k]) for k in range(3)] for n in range(1, len(heights))]
    for obs, row in zip(observations, rows, strict=True):
        for ax, what in zip(row, ("observed", "rendered", "residual"), strict=True):
            ax.set_label(f"{obs.name} {what}")
    return fig, model, rows
