"""Noise of a drizzled image: what taking it for white does to errors, and what they are with the noise measured.

Drizzled, coadded and otherwise resampled images have pixels that share the noise of the same detector pixels. Neighbours scatter
together, sums over a source scatter by more than the weights say, and nothing in chi-square per pixel tells: it is near one
either way. Here four dithered exposures of 0.05" pixels are drizzled (drops of 0.8 pixels) onto 0.03" pixels with nothing but
numpy, so that truth and noise are known. The image is then fitted twice: with its weights alone, and with
`CorrelatedObservation`, which measures the correlation where there are no sources.

    python 08_correlated_noise.py

writes the figure 08_noise.png into the current folder and takes about a minute.
"""

import numpy as np
from matplotlib.figure import Figure
from scipy.special import erf

import scenefit as sf

NATIVE, PIXEL, DROP = 0.05, 0.03, 0.8  # arcsec, arcsec, native pixels
SIZE, NATIVE_SIZE = 180, 118  # pixels of the drizzled image, and of an exposure, which covers more
DITHERS = np.array([[0.0, 0.0], [0.5, 0.25], [0.25, 0.75], [0.75, 0.5]])  # native pixels
PSF_SIGMA = 0.06  # arcsec, pixel response of the detector not included
NUM_GALAXIES, NUM_STARS, NUM_REALISATIONS = 9, 3, 12


def main():
    rng = np.random.default_rng(8)
    sources = draw_sources(rng)
    images = []
    for _ in range(NUM_REALISATIONS):
        exposures = [expose(sources, dither) + rng.standard_normal((NATIVE_SIZE, NATIVE_SIZE)) for dither in DITHERS]
        images.append(drizzle(exposures))
    psf = drizzled_psf()

    # The weight map of a drizzled image: what each pixel scatters by, taken by itself.
    sigma = pixel_sigma()
    observe = [sf.Observation(image, sigma=sigma, psf=psf, channels=["F814W"], name="HST") for image in images]
    white = observe[0]
    correlated = sf.CorrelatedObservation.from_observation(white)
    function = correlated.noise.correlation.function[0]
    middle = len(function) // 2
    neighbour, factor = function[middle, middle + 1], np.sqrt(function.sum())
    measured = float(np.median(correlated.noise.level()) / sigma)
    print(
        f"pixels that are neighbours are correlated by {neighbour:.2f}; measured pixel scatter / weight map: {measured:.2f}"
    )
    print(f"sums over many pixels scatter by {factor:.2f} times what independent ones would")
    # Without drizzling the exposures' own pixels are independent: sums over large areas are what they always were.
    assert abs(factor / expected_factor(sigma) - 1) < 0.15
    assert abs(measured - 1) < 0.05

    scene = first_guess(sources, white)
    table = {}
    for name, make in (("white", lambda obs: obs), ("correlated", sf.CorrelatedObservation.from_observation)):
        pulls, errors, chi_square = [], [], []
        for obs in observe:
            observation = make(obs)
            result = sf.fit(scene, observation, progress=False)
            assert result.is_converged
            # The models are those of the simulation: no error of models.
            fitted = sf.catalog(result, model_error=False, progress=False)
            truth = np.array([source["flux"] for source in sources])
            pulls.append((fitted["flux_F814W"] - truth) / fitted["flux_err_F814W"])
            errors.append(fitted["flux_err_F814W"] / truth)
            chi_square.append(result.observations[0].chi_square(result.scene)[0] / observation.noise.num_modes()[0])
        table[name] = np.array(pulls), np.median(errors), np.mean(chi_square)
        width = table[name][0].std()
        print(
            f"taken as {name:10}: chi-square per pixel {table[name][2]:.3f}, median error {100 * table[name][1]:.1f} % of the "
            f"flux, (fitted - true) / error scatters by {width:.2f}"
        )
    number = table["white"][0].size
    # Widths from so many numbers scatter by 1 / sqrt(2 n): three times that, and a tenth for the noise, which is measured.
    assert abs(table["correlated"][0].std() - 1) < 3 / np.sqrt(2 * number) + 0.1
    assert table["white"][0].std() > 1.5
    for name in table:
        assert abs(table[name][2] - 1) < 0.05

    best = sf.fit(scene, white, progress=False)
    plot(correlated, white.residual(best.scene)[0], table).savefig("08_noise.png", dpi=150)
    print("written: 08_noise.png")


def draw_sources(rng: np.random.Generator) -> list[dict]:
    """Return places (arcsec from the middle, y and x), fluxes and sizes (standard deviation in arcsec, 0 for stars)."""
    half = 0.4 * SIZE * PIXEL
    sources: list[dict] = []
    while len(sources) < NUM_GALAXIES + NUM_STARS:
        place = rng.uniform(-half, half, 2)
        if all(np.hypot(*(place - other["place"])) > 0.35 for other in sources):
            size = rng.uniform(0.06, 0.18) if len(sources) < NUM_GALAXIES else 0.0
            sources.append({"place": place, "flux": rng.uniform(60, 250), "sigma": size})
    return sources


def expose(sources, dither) -> np.ndarray:
    """Return an exposure without noise: Gaussians integrated over detector pixels."""
    image = np.zeros((NATIVE_SIZE, NATIVE_SIZE))
    for source in sources:
        sigma = np.hypot(PSF_SIGMA, source["sigma"]) / NATIVE
        at = source["place"] / NATIVE + (NATIVE_SIZE - 1) / 2 + dither
        edges = [(np.arange(NATIVE_SIZE + 1) - 0.5 - a) / (np.sqrt(2) * sigma) for a in at]
        y, x = (np.diff(erf(edge)) / 2 for edge in edges)
        image += source["flux"] * np.outer(y, x)
    return image


def overlaps(dither: float) -> np.ndarray:
    """Return the part of each native pixel's drop that falls on each pixel of the drizzled image, along one axis."""
    place = (np.arange(NATIVE_SIZE) - (NATIVE_SIZE - 1) / 2 - dither) * NATIVE / PIXEL + (SIZE - 1) / 2
    half = DROP * NATIVE / PIXEL / 2
    pixel = np.arange(SIZE)[:, None]
    shared = np.minimum(place + half, pixel + 0.5) - np.maximum(place - half, pixel - 0.5)
    return np.clip(shared, 0, None) / (2 * half)


def drizzle(exposures) -> np.ndarray:
    """Return the mean of the exposures, the flux of every native pixel spread over its drop (Fruchter & Hook 2002)."""
    parts = [overlaps(dy) @ image @ overlaps(dx).T for (dy, dx), image in zip(DITHERS, exposures, strict=True)]
    return np.mean(parts, axis=0)[None]


def pixel_sigma() -> float:
    """Return the root mean square scatter of a drizzled pixel, the native ones having 1."""
    variance = [np.outer((overlaps(dy) ** 2).sum(axis=1), (overlaps(dx) ** 2).sum(axis=1)) for dy, dx in DITHERS]
    return float(np.sqrt(np.sum(variance, axis=0).mean()) / len(DITHERS))


def expected_factor(sigma: float) -> float:
    """Return by how much sums over large areas scatter, compared with independent pixels of that scatter."""
    native_per_pixel = (PIXEL / NATIVE) ** 2
    return float(np.sqrt(native_per_pixel / len(DITHERS)) / sigma)


def drizzled_psf() -> sf.ImagePSF:
    """Return the PSF of the drizzled image: that of the exposures, averaged over where drops and pixels happen to lie."""
    oversampling, reach = 5, 13
    fine = (np.arange(-reach * oversampling, reach * oversampling + 1)) / oversampling
    edges = (fine[:, None] + 0.5 * np.array([-1, 1]) * NATIVE / PIXEL) / (np.sqrt(2) * PSF_SIGMA / PIXEL)
    profile = np.diff(erf(edges), axis=1)[:, 0]
    for width in (DROP * NATIVE / PIXEL, 1.0):
        # A box of that width: the mean over many places in it.
        shifts = (np.arange(40) + 0.5) / 40 * width - width / 2
        profile = np.mean([np.interp(fine - shift, fine, profile) for shift in shifts], axis=0)
    return sf.ImagePSF(np.outer(profile, profile), oversampling=oversampling)


def first_guess(sources, obs) -> sf.Scene:
    """Return a scene near the truth: positions off by a third of a pixel, sizes and fluxes by a tenth."""
    frame = sf.Frame.from_observations([obs])
    components = {}
    for number, source in enumerate(sources):
        center = source["place"] / PIXEL + (SIZE - 1) / 2 + 0.3
        radius = 1.1 * source["sigma"] / PIXEL * np.sqrt(2 * np.log(2))
        morphology = sf.GaussianMorphology(radius) if source["sigma"] else sf.PointMorphology()
        components[f"s{number}"] = sf.Source(center, sf.ArraySpectrum([0.9 * source["flux"]]), morphology)
    return sf.Scene(frame, components)


def plot(obs, residual, table) -> Figure:
    """Draw the noise, how it is correlated, and the pulls."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, center, right = figure.subplots(1, 3)
    left.imshow(residual[:90, :90], origin="lower", cmap="gray")
    left.set(title="residual of a corner", xlabel="x [pixel]", ylabel="y [pixel]")
    function = obs.noise.correlation.function[0]
    reach = len(function) // 2
    image = center.imshow(function, origin="lower", extent=[-reach - 0.5, reach + 0.5] * 2, cmap="viridis")
    figure.colorbar(image, ax=center, shrink=0.8)
    center.set(title="measured correlation", xlabel="lag in x [pixel]", ylabel="lag in y [pixel]")
    bins = np.linspace(-6, 6, 25)
    for name, (pulls, _, _) in table.items():
        right.hist(
            pulls.ravel(), bins, histtype="step", density=True, label=f"taken as {name}: {pulls.std():.2f}", lw=1.5
        )
    grid = np.linspace(-6, 6, 200)
    right.plot(grid, np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi), "k:", label="as it should be: 1")
    right.set(title="errors of fluxes", xlabel="(fitted - true) / error")
    right.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
