"""How well correlated noise is calibrated: chi-square of noise alone, likelihoods against dense Gaussians, and what they cost.

    python noise_calibration.py [--draws 300] [--json]

Draws are made without scenefit: white noise through a kernel by NumPy, or through the sparse matrix of a resampling. Cases:
white noise; noise as drizzling makes it (white noise through [1, 2, 1] x [1, 2, 1], whose power vanishes at the highest
frequencies, and drops of 0.8 native pixels on pixels of 0.6, averaged over dithers); the first with 5 and 20 per cent masked,
holes and bad columns among it, and with a depth that varies by 4; and a ground-based image resampled to 5.6 times smaller pixels,
turned by 0 and by 23 degrees. Columns: mean chi-square per degree of freedom and its standard error; the scatter of chi-square in
units of what independent numbers would have; degrees of freedom (valid pixels, or those of the resampled image that are
independent) and, for the resampled, native pixels below its valid ones; relative difference of the log-likelihood from that of
a dense Gaussian, on an image of 24 x 24 pixels, in double and in single precision; milliseconds to whiten an image; and the
time to render a model onto it, compare the two and take the gradient, in units of that with white noise.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

import scenefit as sf
from scenefit.arrays.compilation import as_floats
from scenefit.data.resample import Resampling

SIZE, SMALL = 150, 24
TRIANGLE = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
Array = NDArray[np.float64]


def drops(phase: Array, size: float = 0.8 / 0.6, reach: int = 3) -> Array:
    """Return by how much a square drop, as large as `size` pixels and centred at `phase`, overlaps the pixels around it."""
    edges = np.arange(-reach, reach + 2) - 0.5
    overlaps = []
    for center in phase:
        low, high = center - size / 2, center + size / 2
        overlaps.append(np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None))
    return np.outer(*overlaps)


def autocorrelation(kernel: Array) -> Array:
    """Return the sums of products of a kernel with itself, displaced."""
    shape = [2 * n - 1 for n in kernel.shape]
    return np.fft.fftshift(np.fft.ifft2(np.abs(np.fft.fft2(kernel, shape)) ** 2).real)


class Stationary:
    """Noise whose correlation is the sum of those of kernels: each draw adds noise through all of them."""

    def __init__(self, kernels: list[Array], weights):
        self.kernels, self.weights = kernels, weights

    def function(self) -> Array:
        """Return the correlation function."""
        total = sum(autocorrelation(kernel) for kernel in self.kernels)
        return total / total.max()

    def weights_of(self, size: int, rng: np.random.Generator) -> Array:
        """Return the weights of an image."""
        return self.weights(size, rng)[None]

    def noise(self, weights: Array) -> sf.CorrelatedNoise:
        """Return scenefit's model."""
        return sf.CorrelatedNoise(weights, self.function())

    def draw(self, weights: Array, rng: np.random.Generator) -> Array:
        """Return an image of noise, shape (1, y, x)."""
        reach = len(self.kernels[0]) // 2
        shape = [n + 2 * reach for n in weights.shape[1:]]
        norm = np.sqrt(sum((kernel**2).sum() for kernel in self.kernels))
        image = np.zeros(weights.shape[1:])
        for kernel in self.kernels:
            white = np.fft.fft2(rng.standard_normal(shape))
            image += np.fft.ifft2(white * np.fft.fft2(kernel, shape)).real[2 * reach :, 2 * reach :]
        sigma = np.sqrt(np.where(weights > 0, 1 / np.where(weights > 0, weights, 1.0), 0.0))
        return sigma * image / norm

    def covariance(self, weights: Array) -> Array:
        """Return the covariance of the valid pixels."""
        function = self.function()
        y, x = np.nonzero(weights[0] > 0)
        reach = len(function) // 2
        dy, dx = y[:, None] - y, x[:, None] - x
        near = (np.abs(dy) <= reach) & (np.abs(dx) <= reach)
        values = np.where(near, function[np.where(near, dy, 0) + reach, np.where(near, dx, 0) + reach], 0.0)
        sigma = 1 / np.sqrt(weights[0][y, x])
        return values * sigma[:, None] * sigma


class Resampled:
    """White noise of native pixels on others, `density` times smaller and turned."""

    def __init__(self, density: float, rotation: float):
        self.density, self.rotation = density, rotation

    def weights_of(self, size: int, rng: np.random.Generator) -> Array:
        """Return the weights of an image, and keep the map to it."""
        native = int(np.ceil(size / self.density * 1.45)) + 8
        grids = [header(0.168, 0.0, native), header(0.168 / self.density, self.rotation, size)]
        resampling = Resampling.between(grids[0], (native, native), grids[1], (size, size))
        (self.rows,) = resampling.rows(np.ones((1, native, native), bool))
        self.matrix = resampling.matrix(self.rows)
        variance = (self.rows.weight**2).sum(axis=1).reshape(1, size, size)
        return np.where(self.rows.usable.reshape(variance.shape), 1 / variance, 0.0)

    def noise(self, weights: Array) -> sf.CorrelatedNoise:
        """Return scenefit's model, as an observation that is resampled has it."""
        shape = weights.shape[1:]
        native = int(np.sqrt(self.matrix.shape[1]))
        white = sf.Observation(
            np.zeros((native, native)),
            sigma=1.0,
            psf=sf.GaussianPSF(1.5),
            wcs=header(0.168, 0.0, native),
            channels=["i"],
        )
        target = header(0.168 / self.density, self.rotation, shape[0])
        target.pixel_shape = shape[::-1]
        return sf.CorrelatedObservation.from_observation(white, target).noise

    def draw(self, weights: Array, rng: np.random.Generator) -> Array:
        """Return an image of noise, shape (1, y, x)."""
        return (self.matrix @ rng.standard_normal(self.matrix.shape[1])).reshape(weights.shape)


def header(scale: float, rotation: float, size: int) -> WCS:
    """Return a tangent projection of square pixels, turned by degrees."""
    wcs, turn = WCS(naxis=2), np.deg2rad(rotation)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [150, 2], [(size + 1) / 2] * 2
    wcs.wcs.cd = scale / 3600 * np.array([[-np.cos(turn), np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return wcs


def masked(fraction: float):
    """Return weights with that fraction masked: bad columns and holes for half of it, single pixels for the rest."""

    def weights(size, rng):
        valid = np.ones((size, size), bool)
        valid[:, size // 3] = False
        y, x = np.mgrid[:size, :size]
        while (~valid).mean() < fraction / 2:
            center, radius = rng.uniform(0, size, 2), rng.uniform(1.5, 5)
            valid &= (y - center[0]) ** 2 + (x - center[1]) ** 2 > radius**2
        valid &= rng.random(valid.shape) > (fraction - (~valid).mean())
        return valid.astype(float)

    return weights


def uniform(size, rng):
    """Return weights of 1."""
    return np.ones((size, size))


def deeper(size, rng):
    """Return weights that grow by 4 from one side to the other."""
    return np.broadcast_to(np.geomspace(1, 4, size), (size, size)).copy()


def cases() -> dict:
    """Return what noise is drawn, by name."""
    phases = np.random.default_rng(0).uniform(-0.5, 0.5, (12, 2))
    return {
        "white": Stationary([np.ones((1, 1))], uniform),
        "drizzled": Stationary([TRIANGLE], uniform),
        "drizzled, drops": Stationary([drops(phase) for phase in phases], uniform),
        "drizzled, 5 % masked": Stationary([TRIANGLE], masked(0.05)),
        "drizzled, 20 % masked": Stationary([TRIANGLE], masked(0.20)),
        "drizzled, depth varying by 4": Stationary([TRIANGLE], deeper),
        "resampled": Resampled(5.6, 0.0),
        "resampled, turned by 23 degrees": Resampled(5.6, 23.0),
    }


def likelihood_errors(case, rng: np.random.Generator) -> list[float]:
    """Return by how much log-likelihoods of a small image differ from a dense Gaussian's, in double and single precision."""
    weights = case.weights_of(SMALL, rng)
    noise, residual = case.noise(weights), case.draw(weights, rng)
    if isinstance(case, Resampled):
        kept = np.asarray(noise.modes[0].ravel())
        rows = case.matrix.toarray()[kept]
        covariance = rows @ rows.T
    else:
        kept = (weights[0] > 0).ravel()
        covariance = case.covariance(weights)
    values = residual.ravel()[kept]
    determinant = np.linalg.slogdet(2 * np.pi * covariance)[1]
    expected = -0.5 * (determinant + values @ np.linalg.solve(covariance, values))
    single = float(noise.log_likelihood(as_floats(residual)))
    with jax.enable_x64(True):
        double = float(case.noise(weights).log_likelihood(as_floats(residual)))
    return [abs(value / expected - 1) for value in (double, single)]


def milliseconds(function, *arguments) -> float:
    """Return the median time of a call."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(times))


def cost(noise: sf.CorrelatedNoise) -> tuple[float, float]:
    """Return the milliseconds of a whitening, and those of rendering and comparing with it over those with white noise."""
    shape = noise.valid.shape
    obs = sf.Observation(np.zeros(shape), sigma=1.0, psf=sf.GaussianPSF(1.5), channels=["i"])
    obs = obs.match(sf.Frame.from_observations([obs]))
    renderer, model = obs.matched_renderer, as_floats(np.ones(obs.frame.shape))

    def loss(noise, model):
        rendered = renderer(renderer.transform(model), as_floats([0.0, 0.0]))
        return noise.chi_square(rendered).sum()

    evaluate = jax.jit(jax.value_and_grad(loss, argnums=1))
    kinds = [kind.on_device() for kind in (noise, sf.WhiteNoise(np.ones(shape)))]
    correlated, white = (milliseconds(evaluate, kind, model) for kind in kinds)
    return milliseconds(jax.jit(lambda kind, image: kind.whiten(image)), kinds[0], model), correlated / white


def measure(name: str, case, count: int) -> dict:
    """Return the figures of a case."""
    rng = np.random.default_rng(1)
    weights = case.weights_of(SIZE, rng)
    noise = case.noise(weights)
    modes = int(noise.num_modes()[0])
    on_device = noise.on_device()
    chi_square = jax.jit(lambda kind, image: kind.chi_square(image)[0])
    values = np.array([float(chi_square(on_device, as_floats(case.draw(weights, rng)))) for _ in range(count)]) / modes
    time_ms, ratio = cost(noise)
    double, single = likelihood_errors(case, rng)
    return {
        "case": name,
        "mean_chi2_per_dof": float(values.mean()),
        "standard_error": float(values.std() / np.sqrt(count)),
        "scatter": float(values.std() * np.sqrt(modes / 2)),
        "degrees_of_freedom": modes,
        "valid_pixels": int(noise.valid.sum()),
        "log_likelihood_error": double,
        "log_likelihood_error_single": single,
        "whitening_ms": time_ms,
        "cost": ratio,
    }


def main():
    """Print the figures of all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=300, help="images of noise for each case")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    rows = []
    print(
        f"{'case':32} {'chi2/dof':>16} {'scatter':>8} {'dof':>6} {'valid':>6} {'log L':>8} {'single':>8} {'ms':>6} {'cost':>5}"
    )
    for name, case in cases().items():
        row = measure(name, case, arguments.draws)
        rows.append(row)
        print(
            f"{name:32} {row['mean_chi2_per_dof']:8.4f} +- {row['standard_error']:.4f} {row['scatter']:8.2f} "
            f"{row['degrees_of_freedom']:6d} {row['valid_pixels']:6d} {row['log_likelihood_error']:8.1e} "
            f"{row['log_likelihood_error_single']:8.1e} {row['whitening_ms']:6.2f} {row['cost']:5.2f}",
            flush=True,
        )
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
