"""Multi-Gaussian profile: sizes of a galaxy whose profile has no formula, with errors, averaged over sets of widths.

A galaxy is fitted by Gaussian rings of fixed widths, whose fluxes are free but not negative: a profile of any form. Many of these
fluxes are zero, where other samplers get stuck; but the model is linear in them, so that their posterior is a normal
distribution cut off at zero, which `sf.sample(result, "linear", ...)` draws from in seconds. It also gives the evidence, by
which three sets of widths are averaged.

    python 06_multi_gaussian.py

simulates the galaxy (a Sersic profile on a tilted sky), writes figures named 06_* into the current folder, prints the sizes
beside the true ones, and fails if one is off.
"""

import jax
import numpy as np
import scipy.special
from matplotlib.figure import Figure

import scenefit as sf

SHAPE, SIGMA, PSF = (120, 120), 0.01, sf.GaussianPSF(1.6)
FLUX, RADIUS, INDEX, RATIO = 250.0, 6.0, 1.5, 0.7  # radius: semi-major, pixels
GALAXY, SKY = "sources.galaxy", "observations.image"
# The widths of the rings, from less than the PSF to a third of the image.
NUM_RINGS, WIDTHS = (7, 9, 12), (0.6, 40.0)
ISOPHOTE = 0.02  # flux per square pixel: two standard deviations of a pixel


def main():
    obs = simulated_galaxy()
    posteriors = [posterior_of_rings(obs, number) for number in NUM_RINGS]

    # Each posterior gives profiles and sizes; draws are along the first axis.
    middle = posteriors[1]
    profile = sf.profile(middle, "galaxy")
    table = profile.summary()["r50", "r50_minus", "r50_plus", "C80_20", "C80_20_minus", "C80_20_plus"]
    for column in table.itercols():
        column.info.format = ".3f"
    print(table)

    # Which set of widths do the data prefer? Equal before the data, they have these probabilities.
    weights = sf.evidence_weights(posteriors)
    for number, posterior, weight in zip(NUM_RINGS, posteriors, weights):
        print(
            f"{number:2d} rings: log-evidence {posterior.log_evidence:.2f} ± {posterior.log_evidence_error:.2f}, {weight:.3f}"
        )
    mean = sf.average_profiles(posteriors, "galaxy", key=jax.random.key(1), radii=profile.radius)

    sf.plot.scene(middle.result.scene, middle.result.observations).savefig("06_scene.png", dpi=150)
    plot_profiles(mean, [sf.profile(each, "galaxy", radii=profile.radius) for each in posteriors]).savefig(
        "06_profile.png", dpi=150
    )
    check(mean, weights)


def simulated_galaxy():
    """Return an image of the galaxy."""
    norm = (1 - RATIO**2) / (1 + RATIO**2)
    morphology = sf.SersicMorphology(RADIUS * np.sqrt(RATIO), INDEX, (norm * np.cos(0.8), norm * np.sin(0.8)))
    frame = sf.Frame(SHAPE, channels="i", padding=20)
    blank = sf.Observation(np.zeros(SHAPE), sigma=SIGMA, psf=PSF, channels="i", name="image").match(frame)
    data = blank.render(sf.Scene(frame, {"galaxy": sf.Source((60.3, 59.6), [FLUX], morphology)}))[0]
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] - 59.5
    data = data + 2e-4 * x - 1e-4 * y + SIGMA * np.random.default_rng(6).normal(size=SHAPE)
    return sf.Observation(data, sigma=SIGMA, psf=PSF, channels="i", name="image")


def posterior_of_rings(obs, number):
    """Fit that many rings to the image, and draw from their posterior."""
    frame = sf.Frame.from_observations(obs)
    rings = sf.MultiGaussianMorphology.log_spaced(*WIDTHS, number)
    scene = sf.Scene(frame, {"galaxy": sf.Source((60.0, 60.0), [200.0], rings)})
    parameters = sf.Parameters.default(scene, [obs]).free(f"{SKY}.background").free(f"{SKY}.background_slope")
    result = sf.fit(scene, obs, parameters, progress=False)

    # Rings much wider than the galaxy look like a sky. A prior that knows roughly how large the galaxy is keeps them empty,
    # unless the data say otherwise.
    size = sf.profile(result, "galaxy")
    radius = float(size.r50[0, 0] * np.sqrt(size.axis_ratio[0, 0]))
    parameters = parameters.prior(f"{GALAXY}.morphology.amplitudes", sf.ring_prior(rings.sigmas, radius))
    result = sf.fit(result.scene, result.observations, parameters, progress=False)
    assert result.is_converged

    posterior = sf.sample(result, "linear", key=jax.random.key(number), progress=False)
    print(f"{number:2d} rings: {posterior.status.value}; {posterior.message}")
    assert posterior.status is sf.PosteriorStatus.GOOD
    return posterior


def sersic_radius(fraction):
    """Return the true semi-major axis with a fraction of the light."""
    b = scipy.special.gammaincinv(2 * INDEX, 0.5)
    return RADIUS * (scipy.special.gammaincinv(2 * INDEX, fraction) / b) ** INDEX


def sersic_brightness(radius):
    """Return the true surface brightness at semi-major axes."""
    b = scipy.special.gammaincinv(2 * INDEX, 0.5)
    total = 2 * np.pi * INDEX * RADIUS**2 * RATIO * b ** (-2 * INDEX) * scipy.special.gamma(2 * INDEX)
    return FLUX * np.exp(-b * (radius / RADIUS) ** (1 / INDEX)) / total


def isophotal_radius():
    """Return the true semi-major axis of the isophote."""
    b = scipy.special.gammaincinv(2 * INDEX, 0.5)
    return RADIUS * (np.log(sersic_brightness(0.0) / ISOPHOTE) / b) ** INDEX


def petrosian_radius():
    """Return the true Petrosian radius, where the light between 0.8 and 1.25 radii has 0.2 of the mean brightness inside."""
    b, radius = scipy.special.gammaincinv(2 * INDEX, 0.5), np.linspace(1, 60, 60001)

    def growth(at):
        return scipy.special.gammainc(2 * INDEX, b * (at / RADIUS) ** (1 / INDEX))

    annulus = (growth(1.25 * radius) - growth(0.8 * radius)) / (1.25**2 - 0.8**2)
    return radius[np.flatnonzero(annulus > 0.2 * growth(radius))[-1]]


def plot_profiles(mean, each):
    """Draw the averaged profile with its error, those of the sets of widths, and the truth."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    truth = sersic_brightness(mean.radius)
    for ax, scale, label in ((left, 1.0, "surface brightness"), (right, truth, "surface brightness / true one")):
        low, middle, high = np.quantile(mean.total.surface_brightness[:, 0], [0.16, 0.5, 0.84], axis=0)
        ax.fill_between(mean.radius, low / scale, high / scale, alpha=0.3, label="average, 68 %")
        ax.plot(mean.radius, middle / scale)
        for number, profile in zip(NUM_RINGS, each):
            line = np.median(profile.total.surface_brightness[:, 0], axis=0)
            ax.plot(mean.radius, line / scale, lw=0.8, ls="--", label=f"{number} rings")
        ax.plot(mean.radius, truth / scale, "k:", label="truth")
        ax.set(xscale="log", xlabel="semi-major axis [pixel]", ylabel=label, xlim=(0.5, 40))
    left.set(yscale="log", ylim=(1e-4, 10))
    left.legend(frameon=False)
    right.set(ylim=(0.7, 1.3))
    return figure


def check(mean, weights):
    """Print sizes beside the true ones, and fail if one is off."""
    assert np.isclose(weights.sum(), 1)
    sizes = {
        "flux": (mean.flux, FLUX),
        "r20": (mean.r20, sersic_radius(0.2)),
        "r50": (mean.r50, sersic_radius(0.5)),
        "r80": (mean.r80, sersic_radius(0.8)),
        "r90": (mean.r90, sersic_radius(0.9)),
        "isophotal": (mean.isophotal_radius(surface_brightness=ISOPHOTE), isophotal_radius()),
        "Petrosian": (mean.petrosian_radius(), petrosian_radius()),
    }
    print(f"{'':12s}{'average of three sets':>28s}{'truth':>10s}")
    off = []
    for name, (draws, true) in sizes.items():
        low, middle, high = np.quantile(draws[:, 0], [0.16, 0.5, 0.84])
        print(f"{name:12s}{middle:12.3f} -{middle - low:.3f} +{high - middle:.3f}{true:12.3f}")
        if not middle - 3 * (middle - low) < true < middle + 3 * (high - middle):
            off.append(name)
    if off:
        raise SystemExit(f"off by more than three standard errors: {', '.join(off)}")


if __name__ == "__main__":
    main()
