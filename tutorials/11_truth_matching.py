"""Is a catalogue right? Truth matching in a simulated field, and injection and recovery where the truth isn't known.

In a simulation every source is known, and `validate` says how far the catalogue is from it: bias and scatter of magnitudes,
colours, sizes and positions, whether the errors are as large as the catalogue says (pulls of unit width), how many sources were
found, and how many of those found are real. In real images nobody knows the truth. What one can do is to add sources of one's
own, one small set after the other, run the same pipeline again, and look at those: `recover`. They land on real sources, too,
seen and unseen, as real ones do, so that completeness and scatter are those of this field, crowded as it is.

    python 11_truth_matching.py

simulates the field with scenefit's renderer, writes the figures 11_field.png, 11_validation.png and 11_recovery.png into the
current folder, and takes about a minute.
"""

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import QTable
from astropy.wcs import WCS
from photutils.detection import find_peaks
from scipy.ndimage import gaussian_filter

import scenefit as sf
from scenefit.survey.inject import inject, recover
from scenefit.survey.validate import validate

FIELD = SkyCoord(150.1, 2.2, unit="deg")
SHAPE, SCALE = (120, 120), 0.168  # pixels, arcsec
PSF_SIGMA = {"g": 2.0, "i": 1.6}  # pixels
NOISE = {"g": 6.0, "i": 10.0}  # nJy in a pixel
NUM_SOURCES, NUM_INJECTED, NUM_TRIALS = 24, 12, 2
EDGE = 10  # pixels around the field without sources
ISOLATION = 1.5 * u.arcsec  # from any other source, or it counts as blended
THRESHOLD = 6.0  # of a peak, in standard deviations of the smoothed image


def main():
    rng = np.random.default_rng(11)
    sky = noise_image(rng)
    frame = sf.Frame.from_observations([sky])

    # A field with a truth: sources added to noise.
    centers = rng.uniform(EDGE, np.array(SHAPE) - EDGE, (NUM_SOURCES, 2))
    observations, truth = inject([sky], draw_scene(frame, centers, rng))
    catalog = measure(observations)
    options = {"channel": "i", "radius": 0.4 * u.arcsec, "isolation": ISOLATION}
    comparison = validate(catalog, truth, **options)
    print(f"simulated: completeness {comparison.completeness:.2f}, purity {comparison.purity:.2f}")
    print("\n".join(comparison.statistics().pformat(max_width=-1)))
    sf.plot.observation(observations[0], catalog=SkyCoord(truth["ra"], truth["dec"])).savefig("11_field.png", dpi=120)
    sf.plot.validation(comparison).savefig("11_validation.png", dpi=150)
    check_pulls(comparison)
    # Noise peaks above six standard deviations are rarer than one in a thousand fields.
    assert comparison.purity > 0.95
    # Every bright source is found that isn't in another one's light: the detection takes no more than a peak for a source.
    places = SkyCoord(truth["ra"], truth["dec"])
    nearest = places.match_to_catalog_sky(places, nthneighbor=2)[1]
    is_clear = (comparison.detections["magnitude"] < 24) & (nearest > ISOLATION)
    assert np.sum(is_clear) > 5
    assert np.all(comparison.detections["found"][is_clear])

    # The same field as if its truth weren't known: every trial adds twelve sources to the image as it is.
    def draw(rng: np.random.Generator) -> sf.Scene:
        grid = np.stack(np.meshgrid([20, 47, 73, 100], [25, 60, 95], indexing="ij"), axis=-1).reshape(-1, 2)
        return draw_scene(frame, grid + rng.uniform(-8, 8, grid.shape), rng)

    recovery = recover(observations, draw, measure, trials=NUM_TRIALS, existing=catalog, seed=1, **options)
    print(f"\ninjected: completeness {recovery.completeness:.2f}, purity {recovery.purity:.2f}")
    print("\n".join(recovery.statistics().pformat(max_width=-1)))
    sf.plot.validation(recovery, ["mag_i", "g-i", "log_size", "ra"]).savefig("11_recovery.png", dpi=150)
    assert len(recovery.detections) == NUM_INJECTED * NUM_TRIALS
    check_pulls(recovery)
    # What the trials say about completeness is what the simulated truth says: both are fractions of some twenty-five sources.
    shares = np.array([comparison.completeness, recovery.completeness])
    error = np.sqrt(np.sum(shares * (1 - shares) / [NUM_SOURCES, NUM_INJECTED * NUM_TRIALS]))
    assert abs(shares[0] - shares[1]) < 3 * max(error, 1 / NUM_SOURCES)
    print("written: 11_field.png, 11_validation.png, 11_recovery.png")


def noise_image(rng) -> sf.Observation:
    """Return an image of the sky in two bands without any source."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [FIELD.ra.deg, FIELD.dec.deg]
    wcs.wcs.crpix, wcs.wcs.cdelt = (np.array(SHAPE[::-1]) + 1) / 2, [-SCALE / 3600, SCALE / 3600]
    sigma = np.array(list(NOISE.values()))
    return sf.Observation(
        sigma[:, None, None] * rng.standard_normal((len(sigma), *SHAPE)),
        sigma=sigma,
        psf=sf.GaussianPSF(list(PSF_SIGMA.values())),
        wcs=wcs,
        channels=list(NOISE),
        name="HSC",
        unit="nJy",
    )


def draw_scene(frame: sf.Frame, places, rng) -> sf.Scene:
    """Return Gaussian galaxies at some places: faint ones are frequent, small and blue."""
    sources = []
    for place in places:
        magnitude = 25.0 - 3.5 * rng.power(1.6) if rng.random() < 0.5 else rng.uniform(23.0, 25.0)
        flux = 10 ** (-0.4 * (magnitude - 31.4))
        color = rng.normal(0.8 - 0.15 * (magnitude - 23), 0.2)
        radius = np.exp(rng.normal(np.log(0.45) - 0.15 * (magnitude - 22.5), 0.2)) / SCALE
        angle, elongation = rng.uniform(0, np.pi), rng.uniform(0, 0.4)
        ellipticity = elongation * np.array([np.cos(2 * angle), np.sin(2 * angle)])
        fluxes = np.array([flux * 10 ** (-0.4 * color), flux])
        sources.append(sf.Source(place, fluxes, sf.GaussianMorphology(radius, ellipticity)))
    return sf.Scene(frame, sources)


def measure(observations) -> QTable:
    """Find the peaks in images, fit a Gaussian galaxy to each, all together, and return the catalogue."""
    (obs,) = observations
    frame = sf.Frame.from_observations(observations)
    # Smoothed with about the PSF, in units of the noise that is left, both bands added.
    smooth = np.mean([gaussian_filter(plane / level, 1.5) for plane, level in zip(obs.data, obs.noise.level())], axis=0)
    sigma = 1 / np.sqrt(4 * np.pi * 1.5**2 * len(obs.data))
    peaks = find_peaks(smooth, THRESHOLD * sigma, box_size=5, border_width=EDGE // 2)
    positions = obs.wcs.pixel_to_world(peaks["x_peak"], peaks["y_peak"])
    scene = sf.initialize(frame, observations, positions, model="gaussian", progress=False)
    # A peak of noise or of a blend may have nothing to be fitted to: priors keep it where it was found.
    result = sf.fit(scene, observations, sf.priors.automatic(scene, observations), progress=False)
    return sf.catalog(result, progress=False)


def check_pulls(comparison):
    """Check that errors are as large as the catalogue says, and that nothing is biased by more than its error."""
    isolated = comparison.statistics(select=~np.asarray(comparison.pairs["blended"]))
    for row in isolated:
        # The median absolute deviation of n normal numbers scatters by 1.17 / sqrt(n), their median by 1.25 / sqrt(n): three
        # and a half times that. Gaussians of blends are correlated, and peaks of a faint source can split.
        number = max(row["number"], 1)
        assert abs(row["pull_mad_sigma"] - 1) < 3.5 * 1.17 / np.sqrt(number), row
        assert abs(row["pull_median"]) < 3.5 * 1.25 / np.sqrt(number), row


if __name__ == "__main__":
    main()
