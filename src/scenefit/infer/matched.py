"""Matched filters on the model frame: what all observations together say of a source at each of its pixels.

A source of unit flux at pixel x whose image is a Gaussian of standard deviation s (0: a point) is seen as the column `A_s(x)` of
the rendering: through the PSF of each observation, in its own pixels. With the residual r of the data and the covariance C of
their noise, its flux in a channel is estimated by `n / F` and has the variance `1 / F`, with

    n_s(x) = A_s(x)^T C^-1 r        and        F_s(x) = A_s(x)^T C^-1 A_s(x)

summed over the observations of the channel. (Zackay & Ofek 2017, ApJ 836, 187, doi:10.3847/1538-4357/836/2/187.)
n is exact: the transpose of the rendering and the whitening of the noise do it. So is F for independent pixels, whatever their
weights: the square of the PSF, resampled, is summed over them. For correlated noise the PSF is whitened first as if it were
far from masks and edges.
"""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from scenefit.arrays import fourier
from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_booleans, as_complexes, as_floats, compiled
from scenefit.data.abstractnoise import AbstractNoise
from scenefit.data.correlation import LEAST_POWER, power_at
from scenefit.data.observation import Observation
from scenefit.data.renderer import Renderer
from scenefit.data.sampling import GridSampling, NonuniformSampling, SeparableSampling, TurningSampling
from scenefit.sky.frame import Frame, pixel_map
from scenefit.sky.psf import mapped_frequencies


class Camera(eqx.Module):
    """One observation as the matched filter sees it, in units of the noise level of each channel.

    Attributes
    ----------
    renderer : Renderer
    residual : array, shape (channel, y, x)
        On the renderer's window.
    noise, independent : AbstractNoise
        Of these pixels, and as if they were independent.
    gain : array, shape (channel,)
        What a unit of the model is in those of the residual.
    shift, rotation, psf_variance
        Nuisances; None for none.
    response : array, shape (channel, k, l), complex
        Fourier transform of the PSF, whitened, on the renderer's modes.
    factor : array, complex
        What the renderer's sampling wants the modes to be multiplied by.
    """

    renderer: Renderer
    residual: Float[Array, "channel y x"]
    noise: AbstractNoise
    independent: AbstractNoise
    gain: Float[Array, " channel"]
    shift: Float[Array, " 2"]
    rotation: Float[Array, ""] | None
    psf_variance: Float[Array, " channel"] | None
    response: Complex[Array, "_ k l"]
    factor: Complex[Array, "..."]


def channel_units(frame: Frame, observations: Sequence[Observation]) -> np.ndarray:
    """Return the flux unit of each channel of the frame: the lowest noise level of the observations that show it."""
    unit = np.full(len(frame.channels), np.inf)
    for obs in observations:
        has_data = np.asarray(obs.noise.valid).any(axis=(1, 2))
        channels, levels = list(frame.channel_index(obs.channels)), np.where(has_data, obs.noise.level(), np.inf)
        unit[channels] = np.minimum(unit[channels], levels)
    return np.where(np.isfinite(unit), unit, 1.0)


def camera(frame: Frame, obs: Observation, residual: np.ndarray, unit: np.ndarray) -> Camera:
    """Return an observation as the matched filter sees it.

    Parameters
    ----------
    frame : Frame
    obs : Observation
        Matched to the frame.
    residual : array, shape (channel, y, x)
        Its data minus all that is known; 0 where there are none.
    unit : array, shape (channel,)
        Unit of fluxes in the channels of the frame.
    """
    renderer, level = obs.matched_renderer, obs.noise.level()
    window = renderer.window.slices
    noise = obs.noise.scaled(level).restricted(renderer.inside, window)
    independent, correlation = noise.independent()
    ky, kx = np.asarray(renderer.ky, float), np.asarray(renderer.kx, float)
    affine = np.asarray(renderer.affine, float)
    qy, qx = mapped_frequencies(ky, kx, affine)
    factor = _sampling_factor(frame, obs)
    gauss = frame.psf.transfer(ky, kx, np.eye(2))
    response = np.asarray(renderer.transfer) * np.prod(renderer.fft_shape) / factor * gauss
    variance = obs.calibration.psf_variance
    if variance.any():
        response = response * np.exp(-2 * np.pi**2 * variance[:, None, None] * (qy**2 + qx**2))
    if correlation is not None:
        response = response / np.sqrt(power_at(correlation, qy, qx, LEAST_POWER))
    return Camera(
        renderer=eqx.tree_at(lambda r: r.inside, renderer, as_booleans(renderer.inside)),
        residual=as_floats(residual[(slice(None), *window)] / level[:, None, None]),
        noise=noise.on_device(),
        independent=independent.on_device(),
        gain=as_floats(unit[list(renderer.channels)] / level * obs.calibration.flux_scale),
        shift=as_floats(obs.astrometry.shift),
        rotation=as_floats(obs.astrometry.rotation) if obs.astrometry.rotation.any() else None,
        psf_variance=as_floats(variance) if variance.any() else None,
        response=as_complexes(response),
        factor=as_complexes(factor),
    )


def _sampling_factor(frame: Frame, obs: Observation) -> np.ndarray:
    """Return what the renderer's sampling wants the modes of an image to be multiplied by."""
    renderer = obs.matched_renderer
    sampling = renderer.sampling
    ky, kx = np.asarray(renderer.ky, float)[:, None], np.asarray(renderer.kx, float)
    if isinstance(sampling, SeparableSampling):
        return np.ones((1, 1))
    if isinstance(sampling, GridSampling):
        ends = [(s.start, s.stop - 1) for s in renderer.window.slices]
        corners = pixel_map(obs.wcs, frame.wcs, *np.array(np.meshgrid(*ends)).reshape(2, -1))
        first = corners.min(axis=0) + frame.margin
        return np.exp(2j * np.pi * (ky * first[0] + kx * first[1]))
    if not isinstance(sampling, NonuniformSampling | TurningSampling):
        raise TypeError(f"{obs.name} has a sampling of an unknown kind: {type(sampling).__name__}.")
    fine, canvas = sampling.fine_shape, renderer.fft_shape
    return 1 / (fourier.window_transform(ky * canvas[0] / fine[0]) * fourier.window_transform(kx * canvas[1] / fine[1]))


@compiled
def smoothed(
    pulls: Float[Array, "channel height width"],
    response: Float[Array, "k l"],
    sigmas: Float[Array, " s"],
    inner: Box,
) -> Float[Array, "s channel y x"]:
    """Return the numerators n of sources of some sizes from what `pulled` returns, on a part of the canvas.

    `response` is that of a point on the frame.
    """
    fft_shape = pulls.shape[1:]
    ky, kx = np.fft.fftfreq(fft_shape[0])[:, None], np.fft.rfftfreq(fft_shape[1])
    sizes = jnp.exp(-2 * jnp.pi**2 * sigmas[:, None, None] ** 2 * jnp.asarray(ky**2 + kx**2, sigmas.dtype))
    modes = fourier.transform(pulls) * response
    planes = jnp.fft.irfft2(modes * sizes[:, None], s=fft_shape)
    return planes[(..., *inner.slices)]


@compiled
def pulled(cameras: tuple[Camera, ...], model: Float[Array, "channel y x"]) -> Float[Array, "channel height width"]:
    """Return `R^T C^-1 (r - R m)` on the canvas: R renders images on the frame, as `Renderer` has them, m is one of these."""
    canvas = (len(model), *cameras[0].renderer.fft_shape)

    def seen(spectrum):
        return [_whitened(camera, _rendered(camera, spectrum)) for camera in cameras]

    known = [_whitened(camera, camera.residual) for camera in cameras]
    now = seen(cameras[0].renderer.transform(model))
    rest = [before - after for before, after in zip(known, now, strict=True)]
    (result,) = jax.linear_transpose(
        lambda image: seen(fourier.transform(image)), jax.ShapeDtypeStruct(canvas, model.dtype)
    )(rest)
    return result


def _rendered(camera: Camera, spectrum):
    """Return an image of the model in an observation's window, in units of its noise."""
    image = camera.renderer(spectrum, camera.shift, camera.psf_variance, camera.rotation)
    return image * camera.gain[:, None, None]


def _whitened(camera: Camera, residual):
    """Return a residual, whitened by what the noise is for small ones."""
    _, slope = jax.linearize(camera.noise.fisher_residual, jnp.zeros_like(residual))
    return slope(residual)


@compiled
def information(
    cameras: tuple[Camera, ...],
    sigmas: Float[Array, " s"],
    pairs: tuple[tuple[int, int], ...],
    canvas: tuple[int, int, int],
    inner: Box,
):
    """Return the information of all pairs of sizes in all channels on a part of the canvas, shape (pair, channel, y, x)."""
    total = jnp.zeros((len(pairs), canvas[0], *inner.shape), sigmas.dtype)
    for camera in cameras:
        ones = jnp.ones_like(camera.residual)
        _, slope = jax.jvp(camera.independent.fisher_residual, (jnp.zeros_like(ones),), (ones,))
        weights = slope**2 * camera.renderer.area * (camera.gain**2)[:, None, None]
        square = camera.renderer.ky[:, None] ** 2 + camera.renderer.kx**2
        sizes = jnp.exp(-2 * jnp.pi**2 * sigmas[:, None, None] ** 2 * square)
        kernels = fourier.inverse_transform(
            _spread(camera.response * sizes[:, None], canvas[1:]), canvas[1:]
        ) / np.prod(canvas[1:])
        rows = []
        for first, second in pairs:
            product = fourier.transform(kernels[first] * kernels[second])
            rows.append(_collected(camera, product, weights, canvas)[(slice(None), *inner.slices)])
        total = total + jnp.stack(rows)
    return jnp.maximum(total, 0.0)


def _collected(camera: Camera, kernel, weights, canvas):
    """Return the sum over pixels of their weight times a kernel, given by its Fourier transform, about where they lie."""
    rows, columns = camera.renderer.num_modes
    positive = rows // 2 + 1
    if rows != canvas[1]:
        kernel = jnp.concatenate([kernel[:, :positive], kernel[:, canvas[1] - (rows - positive) :]], axis=1)
    transfer = kernel[:, :, :columns] * camera.factor / np.prod(canvas[1:])
    transfer = jnp.broadcast_to(transfer, (len(weights), *transfer.shape[1:]))
    renderer = eqx.tree_at(lambda r: r.transfer, camera.renderer, transfer)
    if renderer.turn is not None:
        renderer = eqx.tree_at(
            lambda r: (r.turn.slope, r.turn.bend), renderer, (None, None), is_leaf=lambda x: x is None
        )

    def image(points):
        return renderer(fourier.transform(points), camera.shift, None, camera.rotation)

    (collected,) = jax.linear_transpose(image, jax.ShapeDtypeStruct(canvas, weights.dtype))(weights)
    return collected


def _spread(modes, fft_shape):
    """Return the modes of the whole canvas from the lowest ones, shape (..., k, l)."""
    rows, columns = modes.shape[-2:]
    if rows == fft_shape[0]:
        whole = modes
    else:
        positive = rows // 2 + 1
        gap = jnp.zeros((*modes.shape[:-2], fft_shape[0] - rows, columns), modes.dtype)
        whole = jnp.concatenate([modes[..., :positive, :], gap, modes[..., positive:, :]], axis=-2)
    return jnp.pad(whole, [(0, 0)] * (modes.ndim - 1) + [(0, fft_shape[1] // 2 + 1 - columns)])
