"""Colors: images of any number of channels as RGB, with a stretch that keeps the color of every pixel."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from astropy.stats import mad_std

from scenefit.sky.frame import Channel

SOFTENING = 2.0
"""The stretch is linear below, logarithmic above this many times the noise."""
WHITE_PERCENTILE = 99.9
"""Percentile of the pixels that reaches full brightness, unless it is below `WHITE_FLOOR` times the noise."""
WHITE_FLOOR = 20.0
LUPTON_Q = 8.0
"""The value of Q that Lupton et al. (2004) recommend; used where there is no noise to set it."""
MIN_SIGNIFICANCE = 3.0
"""In balancing colors, every channel counts as having this mean signal-to-noise ratio at least."""
MISSING = 0.5
"""Grey level of pixels without information."""

_WAVELENGTHS = (
    {"u": 365, "g": 475, "r": 622, "i": 763, "z": 905, "y": 990, "Y": 1030, "J": 1250, "H": 1650}
    | {"U": 365, "B": 445, "V": 551, "R": 658, "I": 806, "K": 2200, "Ks": 2150, "VIS": 715}
    | {"FUV": 153, "NUV": 227, "W1": 3400, "W2": 4600, "W3": 12000, "W4": 22000}
)
"""Approximate wavelengths in nm: they only serve to put bands in order."""
_TENS_OF_NM = re.compile(r"F(0\d\d|1\d\d|200W|210M|250M|277W|300M|335M|356W|410M|430M|444W|460M|480M)")
"""HST and JWST filters whose number counts 10 nm instead of 1 nm."""


def asinh_rgb(
    image,
    *,
    channels: Sequence[Channel] | None = None,
    channel_map=None,
    noise=None,
    stretch: float | None = None,
    q: float | None = None,
) -> np.ndarray:
    """Map an image of any number of channels to RGB, with a stretch that keeps the color of every pixel.

    With (r, g, b) = `channel_map` @ image and I = (r + g + b) / 3 it is `(R, G, B) = (r, g, b) f(I) / I`,
    `f(I) = asinh(q I / stretch) / q`. Pixels whose largest component exceeds 1 are divided by it, negative
    components set to 0. Hence R : G : B equals r : g : b wherever none of them is negative.

    Parameters
    ----------
    image : array, shape (channel, y, x) or (y, x)
        Flux without sky. Pixels where a channel isn't finite are grey, unless it is so everywhere.
    channels : sequence of str or (band, epoch), optional
        Names of the channels. If all are known bands, colors follow the wavelength; otherwise the first
        channel is the bluest.
    channel_map : array, shape (3, channel), optional
        Weights of the channels in red, green and blue; `default_channel_map` by default.
    noise : float or array, shape (channel,), optional
        Standard deviation per pixel; from the median absolute deviation if not given.
    stretch : float, optional
        In the units of `image`; the scale turns from linear to logarithmic at `stretch / q`: by default, at
        twice the noise in a color.
    q : float, optional
        Strength of the stretch. By default such that 99.9 % of the pixels stay below full brightness, but 20
        times the noise does so too. If only `q` is given, `stretch` follows from the same percentile; if only
        `stretch` is given, or there is no noise, `q` is 8.

    Returns
    -------
    array, shape (y, x, 3)
        Values in 0..1; row 0 is the first row of the image (`imshow(..., origin="lower")`).

    Raises
    ------
    ValueError
        If shapes don't match, the noise is negative, or `stretch` or `q` isn't positive.

    References
    ----------
    Lupton et al. 2004, PASP 116, 133, doi:10.1086/382245

    Examples
    --------
    >>> import numpy as np
    >>> asinh_rgb(np.ones((5, 4, 6)), noise=0.1).shape
    (4, 6, 3)
    """
    image = _as_image(image)
    channel_map = _as_channel_map(channel_map, len(image), channels)
    stretch, q = default_stretch(image, channel_map, _as_noise(noise, image), stretch, q)
    if not (np.isfinite([stretch, q]).all() and stretch > 0 and q > 0):
        raise ValueError(f"stretch and q must be finite and positive; got {stretch} and {q}.")
    colors, missing = _colors(image, channel_map)
    colors = colors * _asinh_slope(colors.mean(axis=0), stretch / q) / q
    colors = np.clip(colors / np.maximum(colors.max(axis=0), 1), 0, None)
    colors[:, missing] = MISSING
    return np.moveaxis(colors, 0, -1)


def default_channel_map(num_channels: int, channels: Sequence[Channel] | None = None) -> np.ndarray:
    """Return the weights with which channels make up red, green and blue; those of each color sum to 1.

    One channel gives grey. Of two, one is blue, the other red, and green their mean. More are spread evenly
    from blue to red, each shared between the two colors next to it.

    Parameters
    ----------
    num_channels : int
        At least 1.
    channels : sequence of str or (band, epoch), optional
        Names; put in order of wavelength if all are known bands, otherwise taken as running from blue to red.

    Returns
    -------
    array, shape (3, channel)

    Raises
    ------
    ValueError
        If there isn't one name for each channel.

    Examples
    --------
    >>> default_channel_map(3, ["i", "r", "g"])
    array([[1., 0., 0.],
           [0., 1., 0.],
           [0., 0., 1.]])
    """
    if channels is not None and len(channels) != num_channels:
        raise ValueError(f"An image of {num_channels} channel(s) wants as many names; got {list(channels)}.")
    if num_channels == 1:
        return np.ones((3, 1))
    place = np.linspace(2, 0, num_channels)
    weights = np.clip(1 - np.abs(place - np.arange(3)[:, None]), 0, None)
    if num_channels == 2:
        weights[1] = 1
    wavelengths = np.array([_wavelength(channel) for channel in channels or ()])
    if wavelengths.size and np.isfinite(wavelengths).all():
        ordered = np.empty_like(weights)
        ordered[:, np.argsort(wavelengths, kind="stable")] = weights
        weights = ordered
    return weights / weights.sum(axis=1, keepdims=True)


def balanced_options(image, *, noise=None, channels: Sequence[Channel] | None = None, noise_free: bool = False) -> dict:
    """Return `channel_map`, `stretch`, `q` of `asinh_rgb` that make the light of a field neutral as a whole.

    Images shown with the same options can be compared. Channels without information are left out. Parameters
    are those of `asinh_rgb`; `noise_free` says that `image` itself has none: it is a model.
    """
    image = _as_image(image)
    noise = _as_noise(noise, image)
    unit = np.where(noise > 0, noise, 1.0)
    significance = np.nan_to_num(image / unit[:, None, None])
    bright = significance.sum(axis=0) > 5 * np.sqrt(len(image))
    # The noise of a channel without light isn't amplified beyond a fraction of the light of the others.
    floor = max(1, bright.sum()) * (1e-3 if noise_free else MIN_SIGNIFICANCE)
    total = np.maximum(significance[:, bright].sum(axis=1), floor)
    used = np.flatnonzero(np.isfinite(image).any(axis=(1, 2))).tolist()
    channel_map = np.zeros((3, len(image)))
    if used:
        gain = 1 / (total * unit)[used]
        names = None if channels is None else [channels[n] for n in used]
        channel_map[:, used] = default_channel_map(len(used), names) * (gain / np.median(gain))
    stretch, q = default_stretch(image, channel_map, noise)
    return {"channel_map": channel_map, "stretch": stretch, "q": q}


def default_stretch(image, channel_map, noise, stretch=None, q=None) -> tuple[float, float]:
    """Return `stretch` and `q` of `asinh_rgb`, as given or as follow from image and noise."""
    colors, missing = _colors(image, channel_map)
    colors = colors[:, ~missing]
    sigma = float(np.sqrt(np.mean(channel_map**2 @ noise**2)))
    if stretch is None and q is None and sigma > 0:
        turn = SOFTENING * sigma
        shown = colors.max(axis=0) * _asinh_slope(colors.mean(axis=0), turn)
        q = max(_percentile(shown), float(np.arcsinh(WHITE_FLOOR / SOFTENING)))
        return q * turn, q
    q = LUPTON_Q if q is None else q
    if stretch is None:
        white = max(_percentile(colors.max(axis=0)), WHITE_FLOOR * sigma)
        stretch = q * (white if white > 0 else 1.0) / np.sinh(q)
    return stretch, q


def _asinh_slope(intensity, turn):
    """Return `asinh(I / turn) / I`, which is 1 / turn at I = 0."""
    ratio = np.where(intensity == 0, 1e-9, intensity / turn)
    return np.arcsinh(ratio) / ratio / turn


def _percentile(values) -> float:
    """Return the percentile that is shown at full brightness, 0 if there are no values."""
    return float(np.percentile(values, WHITE_PERCENTILE)) if values.size else 0.0


def _colors(image, channel_map):
    """Return (r, g, b) before the stretch, and which pixels lack a channel that has information elsewhere."""
    known = np.isfinite(image)
    used = known.any(axis=(1, 2))
    missing = ~known[used].all(axis=0) if used.any() else np.ones(image.shape[1:], bool)
    return np.einsum("kc,cyx->kyx", channel_map, np.where(known, image, 0.0)), missing


def _as_image(image) -> np.ndarray:
    """Return an image as (channel, y, x) floats, NaN for whatever isn't finite."""
    image = np.asarray(image, dtype=float)
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"An image wants shape (channel, y, x) or (y, x); got {image.shape}.")
    return np.where(np.isfinite(image), image, np.nan)


def _as_channel_map(channel_map, num_channels, channels) -> np.ndarray:
    """Return the weights given, or the default ones."""
    if channel_map is None:
        return default_channel_map(num_channels, channels)
    channel_map = np.asarray(channel_map, dtype=float)
    if channel_map.shape != (3, num_channels) or not np.isfinite(channel_map).all():
        raise ValueError(f"channel_map wants finite weights, shape (3, {num_channels}); got {channel_map}.")
    return channel_map


def _as_noise(noise, image) -> np.ndarray:
    """Return the noise per channel, estimated unless given; 0 where a channel has no information."""
    known = [plane[np.isfinite(plane)] for plane in image]
    if noise is None:
        return np.array([mad_std(plane) if plane.size else 0.0 for plane in known])
    noise = np.asarray(noise, dtype=float)
    if noise.shape not in ((), (len(image),)) or not (np.isfinite(noise) & (noise >= 0)).all():
        raise ValueError(f"noise wants a finite number >= 0, or {len(image)}, one per channel; got {noise}.")
    return np.where([plane.size > 0 for plane in known], noise, 0.0)


def _wavelength(channel) -> float:
    """Return the approximate wavelength [nm] of a band by its name, NaN if unknown."""
    name = str(channel[0] if isinstance(channel, tuple) else channel)
    for word in re.split(r"[^A-Za-z0-9]+", name):
        if word in _WAVELENGTHS:
            return float(_WAVELENGTHS[word])
        if re.fullmatch(r"F\d{3}[A-Z]{1,2}", word):
            return float(word[1:4]) * (10 if _TENS_OF_NM.match(word) else 1)
    return float("nan")
