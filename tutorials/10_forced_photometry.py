"""Forced photometry: shapes from the sharpest image, fluxes in every other one, and light curves from many epochs.

A sharp image of one band says what the sources of a field look like. With that held, their fluxes in any other image are a
linear problem: solved for all sources at a time, so that neighbours don't count each other's light, with the full covariance of
the errors. Nothing is resampled, and images too shallow to detect anything still give fluxes, negative ones included, and upper
limits.

First, a sharp image (0.06" pixels) and a fit of all shapes. Then the fluxes in three bands seen from the ground, in one call.
Last, twenty epochs, no two alike in pointing, orientation, seeing and depth, in which a star in front of a galaxy varies.

    python 10_forced_photometry.py

simulates the images with scenefit's renderer from true profiles, and writes figures 10_*.png into the current folder. It takes
less than a minute.
"""

import time

import numpy as np
from astropy.wcs import WCS
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure

import scenefit as sf

FIELD_DEG = (150.1, 2.2)
SHARP_SHAPE, SHARP_ARCSEC = (120, 120), 0.06
GROUND_SHAPE, GROUND_ARCSEC = (40, 40), 0.18
BANDS = ("g", "r", "i")
# Position (y, x) on the sharp image, shape, and fluxes [nJy] in its band and in g, r, i.
GALAXIES = {
    "spiral": ((58.3, 55.1), sf.SersicMorphology(9.0, 1.2, (0.25, 0.15)), 9000, (4000, 7000, 9500)),
    "companion": ((66.4, 74.0), sf.SersicMorphology(4.5, 2.5, (-0.2, 0.1)), 3000, (900, 2200, 3300)),
    "faint": ((34.2, 78.7), sf.SersicMorphology(4.0, 1.0, (0.1, -0.3)), 250, (40, 130, 240)),
    "dropout": ((88.5, 40.2), sf.SersicMorphology(2.5, 1.0, (0.0, 0.1)), 400, (0, 90, 420)),
}
STAR = ((51.6, 62.9), 1500, (1100, 1400, 1500))  # on an arm of the spiral
NUM_EPOCHS, PERIOD_DAYS = 20, 6.4


def main():
    rng = np.random.default_rng(10)
    truth = true_scene()
    sharp = simulate(rng, truth, ["F814W"], SHARP_SHAPE, SHARP_ARCSEC, 0.0, 1.6, 3.0, "sharp")

    # Shapes and positions from the sharp image alone.
    result = sf.fit(rough_scene(sharp), sharp)
    assert result.is_converged
    print(f"fit of the sharp image: {result.status.name} after {result.num_steps} steps")

    # Fluxes of the same sources in three bands, each with its own PSF and depth. None is a channel of the scene.
    ground = [
        simulate(rng, truth, [band], GROUND_SHAPE, GROUND_ARCSEC, 12.0, seeing, sigma, f"ground-{band}")
        for band, seeing, sigma in zip(BANDS, (2.1, 1.9, 1.7), (12.0, 15.0, 20.0), strict=True)
    ]
    photometry = sf.forced_photometry(result.scene, ground)
    shown = photometry.table["id", "channel", "flux", "flux_err", "mag", "upper_limit", "snr"]
    for column in shown.colnames[2:]:
        shown[column].info.format = ".2f" if column == "mag" else ".1f"
    print("\n".join(shown.pformat(max_lines=-1, max_width=-1)))
    check_bands(photometry)

    # Twenty epochs, in which the star varies.
    days = 60300 + np.sort(rng.uniform(0, 30, NUM_EPOCHS)).round(2)
    epochs = [simulate_epoch(rng, truth, number, day) for number, day in enumerate(days)]
    begin = time.perf_counter()
    monitored = sf.forced_photometry(result.scene, epochs)
    seconds = time.perf_counter() - begin
    # Nothing is compiled: the shape of the images is that of those before.
    print(f"{len(epochs)} epochs of {len(monitored.ids)} sources: {1e3 * seconds / len(epochs):.0f} ms an epoch")
    check_variability(monitored, days)

    plot_images(sharp, ground, result.scene).savefig("10_images.png", dpi=150)
    plot_light_curves(monitored).savefig("10_light_curves.png", dpi=150)
    print("written: 10_images.png 10_light_curves.png")


def true_scene() -> sf.Scene:
    """Return the field as it is: fluxes in the band of the sharp image and in g, r, i."""
    channels = ("F814W", *BANDS)
    frame = sf.Frame(SHARP_SHAPE, channels=channels, wcs=make_wcs(SHARP_SHAPE, SHARP_ARCSEC, 0.0), padding=64)
    sources = {
        name: sf.Source(center, [sharp, *fluxes], shape) for name, (center, shape, sharp, fluxes) in GALAXIES.items()
    }
    center, sharp, fluxes = STAR
    return sf.Scene(frame, {**sources, "star": sf.Source(center, [sharp, *fluxes], sf.PointMorphology())})


def star_flux(day: float) -> float:
    """Return the flux of the star in r on some day."""
    return STAR[2][1] * (1 + 0.4 * np.sin(2 * np.pi * day / PERIOD_DAYS))


def make_wcs(shape, pixel_arcsec: float, angle_deg: float, offset=(0.0, 0.0)) -> WCS:
    """Return a tangent plane about the field, turned by an angle and moved by some pixels (y, x)."""
    angle = np.deg2rad(angle_deg)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = FIELD_DEG
    wcs.wcs.crpix = [(shape[1] + 1) / 2 + offset[1], (shape[0] + 1) / 2 + offset[0]]
    wcs.wcs.cd = pixel_arcsec / 3600 * np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return wcs


def simulate(rng, scene, channels, shape, pixel_arcsec, angle, psf_sigma, sigma, name, offset=(0.0, 0.0)):
    """Return an image in nJy with noise of so much per pixel; the PSF is a Gaussian of so many pixels."""
    known = {
        "sigma": sigma,
        "psf": sf.GaussianPSF(psf_sigma),
        "wcs": make_wcs(shape, pixel_arcsec, angle, offset),
        "channels": channels,
        "name": name,
        "unit": "nJy",
    }
    empty = sf.Observation(np.zeros((len(channels), *shape)), **known)
    # From the ground, a sky that wasn't subtracted quite well.
    sky = 0.0 if name == "sharp" else sigma * rng.uniform(-0.3, 0.3)
    return sf.Observation(empty.render(scene) + sky + rng.normal(scale=sigma, size=empty.shape), **known)


def simulate_epoch(rng, truth: sf.Scene, number: int, day: float) -> sf.Observation:
    """Return an r image of one night, on which the star has its own brightness."""
    channel = ("r", float(day))
    frame = sf.Frame(SHARP_SHAPE, channels=[channel], wcs=truth.frame.wcs, padding=64)
    sources = {name: sf.Source(s.center, [s.spectrum.flux[2]], s.morphology) for name, s in truth.sources.items()}
    sources["star"] = sf.Source(truth.sources["star"].center, [star_flux(day)], sf.PointMorphology())
    offset, angle = rng.uniform(-1, 1, size=2), rng.uniform(-8, 8)
    options = (GROUND_SHAPE, GROUND_ARCSEC, angle, rng.uniform(1.7, 2.4), rng.uniform(12, 25))
    return simulate(rng, sf.Scene(frame, sources), [channel], *options, f"night {number}", offset)


def rough_scene(sharp: sf.Observation) -> sf.Scene:
    """Return a start: the true positions to a pixel, all galaxies alike."""
    frame = sf.Frame.from_observations(sharp)
    sources = {
        name: sf.Source(np.round(center), [flux], sf.SersicMorphology(4.0, 1.5))
        for name, (center, _, flux, _) in GALAXIES.items()
    }
    return sf.Scene(frame, {**sources, "star": sf.Source(np.round(STAR[0]), [STAR[1]], sf.PointMorphology())})


def check_bands(photometry: sf.ForcedPhotometry):
    """Make sure that the fluxes are the true ones, and say what the neighbours know of each other."""
    table = photometry.table
    known = {name: fluxes for name, (*_, fluxes) in GALAXIES.items()} | {"star": STAR[2]}
    true = np.array([known[row["id"]][BANDS.index(row["channel"])] for row in table])
    pulls = (table["flux"].to_value("nJy") - true) / table["flux_err"].to_value("nJy")
    print(f"pulls of {len(pulls)} fluxes: {np.round(pulls, 1)}")
    # Shapes have errors, too, which these errors leave out: a percent of the bright galaxy's flux, one of its errors here.
    assert np.abs(pulls).max() < 5
    covariance = photometry.covariance("ground-r")
    pair = [photometry.ids.index(name) for name in ("spiral", "star")]
    correlation = covariance[pair[0], pair[1]] / np.sqrt(np.prod(np.diag(covariance)[pair]))
    print(f"correlation of the fluxes of spiral and star in r: {correlation:.2f}")
    assert correlation < -0.1
    dropout = table[(table["id"] == "dropout") & (table["channel"] == "g")][0]
    print(f"the dropout in g: {dropout['flux']:.0f}, below {dropout['upper_limit']:.0f} (3 sigma)")
    assert dropout["snr"] < 4


def check_variability(photometry: sf.ForcedPhotometry, days: np.ndarray):
    """Make sure that the star varies as it should, and nothing else does."""
    curve = photometry.light_curve("star")
    flux, error = curve["flux"].to_value("nJy"), curve["flux_err"].to_value("nJy")
    np.testing.assert_allclose(curve["epoch"], days)
    # The shape of the galaxy beneath has errors, which are the same in all epochs: a constant is free.
    excess = flux - np.array([star_flux(day) for day in days])
    for name in photometry.ids:
        own = photometry.light_curve(name)
        value, sigma = (own[c].to_value("nJy") for c in ("flux", "flux_err"))
        weights = sigma**-2
        chi_square = np.sum(weights * (value - np.sum(weights * value) / weights.sum()) ** 2)
        print(f"{name}: chi-square of a constant {chi_square:.0f} for {len(value) - 1} degrees of freedom")
        # 43.8 is the 99.9th percentile of chi-square for 19 degrees of freedom.
        assert (chi_square > 100) if name == "star" else (chi_square < 43.8)
    weights = error**-2
    chi_square = np.sum(weights * (excess - np.sum(weights * excess) / weights.sum()) ** 2)
    print(f"star without its variation: {chi_square:.0f}")
    assert chi_square < 43.8


def plot_images(sharp: sf.Observation, ground, scene: sf.Scene) -> Figure:
    """Show the sharp image, what is left of it, and the images from the ground."""
    fig = Figure(figsize=(11, 2.6), layout="constrained")
    images = [(sharp.data, sharp, "sharp"), (sharp.residual(scene), sharp, "sharp - model")]
    images += [(obs.data, obs, obs.name) for obs in ground]
    for ax, (image, obs, title) in zip(fig.subplots(1, len(images)), images, strict=True):
        ax.imshow(image[0] / obs.noise.level()[0], norm=AsinhNorm(2, -3, 60), cmap="gray", origin="lower")
        ax.set(xticks=[], yticks=[], title=title)
    return fig


def plot_light_curves(photometry: sf.ForcedPhotometry) -> Figure:
    """Draw the light curve of the star, and of the galaxy that it lies on."""
    fig = Figure(figsize=(6.4, 4.6), layout="constrained")
    for ax, name in zip(fig.subplots(2, 1, sharex=True), ("star", "spiral"), strict=True):
        curve = photometry.light_curve(name)
        flux, error = (curve[c].to_value("nJy") for c in ("flux", "flux_err"))
        ax.errorbar(curve["epoch"], flux, error, fmt="o", color="#0072B2", ms=4, capsize=2)
        if name == "star":
            days = np.linspace(curve["epoch"].min(), curve["epoch"].max(), 300)
            ax.plot(days, [star_flux(day) for day in days], color="0.6", zorder=0, label="truth")
            ax.legend(frameon=False)
        else:
            ax.axhline(GALAXIES[name][3][1], color="0.6", zorder=0)
        ax.set_ylabel(f"{name} [nJy]")
    ax.set_xlabel("MJD")
    return fig


if __name__ == "__main__":
    main()
