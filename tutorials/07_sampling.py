"""Posteriors: what the errors of a blend are worth, by four approximations side by side.

A galaxy, a neighbour and a star overlap. One camera has them in g and r, another one in z, with larger pixels, turned, and with
wrong coordinates. The galaxy's radius is linear in wavelength, and the offset of the second camera is a parameter like all
others. `sf.sample` draws from the posterior of all of them together:

- "laplace" takes the normal distribution with the curvature at the best fit. It costs seconds, and is right where there is much
  signal. Use it first; its Pareto k says when not to believe it.
- "svi" fits a distribution by maximising a bound on the evidence: a normal one, which may differ from Laplace's where the
  posterior leans to one side, or a flow, which bends. Use them where Laplace is refused and chains would take too long.
- "nuts" runs Hamiltonian chains that end up at the posterior itself, whatever its form, and R-hat and the effective sample size
  say whether they have got there. Use it for the numbers that go into a paper, and to judge the others.

    python 07_sampling.py

simulates the images, prints the tables, writes figures 07_*.png into the current folder and takes two minutes. It ends
with a galaxy too small to be resolved, whose radius is at the end of its range: there Laplace is refused.
"""

import jax
import numpy as np
import numpyro.distributions as dist
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS
from scipy import ndimage

import scenefit as sf

FIELD = SkyCoord(150.1, 2.2, unit="deg")
WAVELENGTHS = {"g": 0.48, "r": 0.62, "z": 0.91}  # micron
RADIUS = "sources.galaxy.morphology.half_light_radius"
INDEX = "sources.galaxy.morphology.sersic_index"
ELLIPTICITY = "sources.galaxy.morphology.ellipticity"
SHIFT = "observations.red.astrometry.shift"
TRUE_SHIFT = (0.06, -0.04)  # arcsec (east, north)
TRUE_RADIUS = {"g": 0.9, "r": 0.848, "z": 0.74}  # arcsec; a straight line in wavelength
TRUE_INDEX, PIXEL_SCALE = 2.2, 0.3
METHODS = {
    "Laplace": {"method": "laplace"},
    "SVI normal": {"method": "svi"},
    "SVI flow": {"method": "svi", "guide": "flow"},
    "NUTS": {"method": "nuts"},
}
COLORS = {"Laplace": "#CC79A7", "SVI normal": "#E69F00", "SVI flow": "#009E73"}


def main():
    observations, truth = simulate(np.random.default_rng(7))
    # Model pixels need only be half as wide as the sharpest PSF; chains evaluate the model some twenty thousand times.
    frame = sf.Frame.from_observations(observations, pixel_scale=PIXEL_SCALE)
    scene = make_scene(frame, radius=(0.6, 0.6), index=1.5)
    parameters = sf.Parameters.default(scene, observations).free(SHIFT)
    result = sf.fit(scene, observations, parameters)
    print(f"fit {result.status.value} after {result.num_steps} steps")
    assert result.is_converged
    sf.plot.scene(result.scene, result.observations).savefig("07_scene.png", dpi=150)

    # The same call for all. Nothing has to be set but the method, and the key of the random numbers.
    posteriors = {}
    for number, (name, options) in enumerate(METHODS.items()):
        posteriors[name] = sf.sample(result, key=jax.random.key(number), **options)
    report(posteriors, truth)
    judge(posteriors, truth)

    draw_corner(posteriors, truth).savefig("07_corner.png", dpi=150)
    # A linked parameter is a curve with a band of errors, also between the bands.
    in_pixels = {band: radius / PIXEL_SCALE for band, radius in TRUE_RADIUS.items()}
    sf.plot.link_curves(posteriors["NUTS"], RADIUS, truth=in_pixels).savefig("07_link.png", dpi=150)
    run_into_a_bound(np.random.default_rng(3))


def tangent_plane(size: int, scale: float, turn_deg: float) -> WCS:
    angle = np.deg2rad(turn_deg)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [FIELD.ra.deg, FIELD.dec.deg]
    wcs.wcs.crpix = [(size + 1) / 2] * 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs.wcs.cd = np.diag([-1.0, 1.0]) @ turn * scale / 3600
    return wcs


def make_scene(frame: sf.Frame, radius, index: float) -> sf.Scene:
    """Return galaxy, neighbour and star; with the galaxy's radius (arcsec) at both ends of the wavelengths."""
    middle, scale = np.array(frame.center), frame.pixel_scale
    linear = sf.link.Polynomial(np.array(radius) / scale, WAVELENGTHS)
    shapes = {
        "galaxy": ((0.0, 0.0), [500.0, 900.0, 1300.0], sf.SersicMorphology(linear, index, (0.2, 0.1))),
        "neighbor": ((1.4, 1.6), [400.0, 500.0, 600.0], sf.ExponentialMorphology(0.6 / scale, (-0.2, 0.2))),
        "star": ((-1.0, -0.6), [150.0, 200.0, 250.0], sf.PointMorphology()),
    }
    return sf.Scene(frame, {n: sf.Source(middle + np.array(at) / scale, *rest) for n, (at, *rest) in shapes.items()})


def simulate(rng):
    """Return two observations of the blend, and the true values of all parameters."""
    blank = [
        sf.Observation(
            np.zeros((2, 44, 44)),
            sigma=[1.0, 1.2],
            psf=sf.GaussianPSF([1.7, 1.5], integrate_pixel=True),
            wcs=tangent_plane(44, 0.2, 0.0),
            channels=["g", "r"],
            name="blue",
        ),
        sf.Observation(
            np.zeros((28, 28)),
            sigma=2.5,
            psf=sf.GaussianPSF(1.4, integrate_pixel=True),
            wcs=tangent_plane(28, 0.3, 25.0),
            channels="z",
            name="red",
        ),
    ]
    # On a finer grid than that of the fit.
    scene = make_scene(sf.Frame.from_observations(blank), (TRUE_RADIUS["g"], TRUE_RADIUS["z"]), TRUE_INDEX)
    blank[1] = blank[1].with_shift(TRUE_SHIFT)
    truth = {f"sources.{name}.spectrum.flux": source.spectrum.flux for name, source in scene.sources.items()}
    truth |= {
        RADIUS: np.array([TRUE_RADIUS["g"], TRUE_RADIUS["z"]]) / PIXEL_SCALE,
        INDEX: TRUE_INDEX,
        SHIFT: TRUE_SHIFT,
    }
    return [with_noise(obs, scene, rng) for obs in blank], truth


def with_noise(blank: sf.Observation, scene: sf.Scene, rng) -> sf.Observation:
    """Return an observation of a scene, with coordinates that know of no offset."""
    sigma = blank.noise.level()
    data = blank.render(scene) + sigma[:, None, None] * rng.normal(size=blank.shape)
    return sf.Observation(data, sigma=sigma, psf=blank.psf, wcs=blank.wcs, channels=blank.channels, name=blank.name)


def report(posteriors, truth):
    """Print medians and widths (half of the 16 to 84 % range) of some parameters by each method, and what each says of itself."""
    print(f"\n{'median and half-width':30s}" + "".join(f"{name:>22s}" for name in posteriors) + f"{'truth':>10s}")
    for path, trues in truth.items():
        values = {name: posterior[path].reshape(len(posterior[path]), -1) for name, posterior in posteriors.items()}
        for n, true in enumerate(np.ravel(trues)):
            label = path.removeprefix("sources.").removeprefix("observations.").replace("morphology.", "")
            row = f"{label.replace('spectrum.', '').replace('astrometry.', '')}[{n}]"
            cells = []
            for draws in values.values():
                low, middle, high = np.quantile(draws[:, n], [0.16, 0.5, 0.84])
                cells.append(f"{middle:12.3f} ±{(high - low) / 2:7.3f}")
            print(f"{row:30s}" + "".join(f"{cell:>22s}" for cell in cells) + f"{true:10.3f}")
    print(f"\n{'':12s}{'status':24s}{'R-hat':>8s}{'ESS':>8s}{'Pareto k':>10s}{'seconds':>9s}")
    for name, posterior in posteriors.items():
        table, found = posterior.summary(), posterior.diagnostics
        # Chains have R-hat and ESS, draws from an approximation are independent and have Pareto k.
        is_chain = np.isfinite(table["r_hat"]).any()
        r_hat, ess = (f"{np.nanmax(table['r_hat']):.4f}", f"{np.nanmin(table['ess']):.0f}") if is_chain else ("-", "-")
        k = "-" if is_chain else f"{found.pareto_k:.2f}"
        seconds = sum(posterior.timing.values())
        print(f"{name:12s}{posterior.status.name:24s}{r_hat:>8s}{ess:>8s}{k:>10s}{seconds:9.1f}")


def judge(posteriors, truth):
    """Fail if chains haven't mixed or are off the truth, or if an approximation isn't like them."""
    chains = posteriors["NUTS"]
    assert chains.status is sf.PosteriorStatus.GOOD, chains.message
    for name, posterior in posteriors.items():
        for path in chains.draws:
            middle, width = chains[path].mean(axis=0), chains[path].std(axis=0)
            # Chains of an effective size of 400 know the mean to 0.05 widths, and the width to 4 %. Normal distributions lean
            # to no side, as the posterior does: Laplace's, about the most probable values, is off by a third of a width here.
            assert np.all(np.abs(posterior[path].mean(axis=0) - middle) < 0.6 * width), (name, path)
            assert np.all(np.abs(np.log(posterior[path].std(axis=0) / width)) < 0.3), (name, path)
    for path, true in truth.items():
        # 15 numbers exceed four standard deviations once in a thousand blends.
        assert np.all(np.abs(chains[path].mean(axis=0) - true) < 4 * chains[path].std(axis=0)), path


def draw_corner(posteriors, truth):
    """Show the chains, and the others as contours on top."""
    chains, paths = posteriors["NUTS"], [RADIUS, INDEX, SHIFT, "sources.galaxy.spectrum.flux"]
    fig = sf.plot.corner(chains, paths, truths={path: truth[path] for path in paths})
    fractions = (0.865, 0.393)
    for ax in fig.axes:
        # The axes of a corner plot are labelled with the numbers that they show: "X" on the diagonal, "Y X" below it.
        *first, last = [number_of(name) for name in ax.get_label().split()]
        for name, color in COLORS.items():
            x = last(posteriors[name])
            if not first:
                ax.hist(x, bins=40, range=ax.get_xlim(), histtype="step", color=color, density=True)
                continue
            limits = ax.get_xlim(), ax.get_ylim()
            counts, x_edges, y_edges = np.histogram2d(x, first[0](posteriors[name]), bins=40, range=limits)
            smooth = ndimage.gaussian_filter(counts, 1.5)
            ordered = np.sort(smooth.ravel())[::-1]
            inside = np.cumsum(ordered) / ordered.sum()
            levels = [ordered[np.searchsorted(inside, fraction)] for fraction in fractions]
            middles = [(edges[1:] + edges[:-1]) / 2 for edges in (x_edges, y_edges)]
            ax.contour(*middles, smooth.T, levels=levels, colors=color, linewidths=0.9)
    lines = [
        fig.axes[0].plot([], [], color=color, label=name)[0] for name, color in {"NUTS": "#0072B2", **COLORS}.items()
    ]
    fig.legend(handles=lines, loc="upper right", fontsize="x-large")
    return fig


def number_of(name: str):
    """Return a function that gives the draws of one number, such as "sources.host.center[0]"."""
    path, _, place = name.partition("[")
    where = tuple(int(n) for n in place.rstrip("]").split(",")) if place else ()
    return lambda posterior: posterior[path][(slice(None), *where)]


def run_into_a_bound(rng):
    """Show that Laplace's draws are refused where a normal distribution can't stand for the posterior, and what helps."""
    blank = sf.Observation(
        np.zeros((32, 32)),
        sigma=1.0,
        psf=sf.GaussianPSF(1.6, integrate_pixel=True),
        wcs=tangent_plane(32, 0.2, 0.0),
        channels="r",
        name="small",
    )
    frame = sf.Frame.from_observations(blank)
    small = sf.Scene(frame, {"galaxy": sf.Source(frame.center, [400.0], sf.ExponentialMorphology(0.3))})
    observations = [with_noise(blank, small, rng)]
    start = sf.Scene(frame, {"galaxy": sf.Source(frame.center, [400.0], sf.SersicMorphology(1.5, 1.0))})

    # The radius is a fifth of the PSF's sigma: it may as well be zero, where its range ends, and index and axis ratio anything.
    free = sf.Parameters.default(start, observations)
    # Knowing what galaxies of this kind look like keeps all away from the ends of their ranges.
    informed = free.prior(RADIUS, dist.LogNormal(np.log(0.4), 0.3)).prior(ELLIPTICITY, dist.Normal(0, 0.3))
    informed = informed.prior(INDEX, dist.TruncatedNormal(1.0, 0.3, low=0.5, high=6.0))
    found = {}
    for title, parameters in {"flat": free, "informed": informed}.items():
        result = sf.fit(start, observations, parameters)
        posterior = found[title] = sf.sample(result, "laplace", key=jax.random.key(4))
        low, middle, high = np.quantile(posterior[RADIUS], [0.16, 0.5, 0.84])
        print(
            f"radius of a small galaxy, {title} prior: {middle:.2f} (-{middle - low:.2f} +{high - middle:.2f}) pixels"
        )
        print(f"  {posterior.status.name}: {posterior.message}")
    assert found["flat"].status is sf.PosteriorStatus.POOR_APPROXIMATION
    assert found["informed"].diagnostics.pareto_k < found["flat"].diagnostics.pareto_k


if __name__ == "__main__":
    main()
