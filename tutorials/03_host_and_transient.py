"""A supernova on its host galaxy: one model for all epochs, and a light curve out of it.

Difference imaging convolves a template to match each new image, resamples both and subtracts. None of that is needed
where the images are modelled together: the host is the same in all of them, the supernova changes from one to the
next, and each epoch keeps its own PSF, pointing, orientation, zeropoint and noise. The images from before the
explosion act as the template simply by taking part.

Eight r-band epochs are simulated here with nothing but numpy and a WCS, so that the truth is exact and independent of
the package: a galaxy of two Gaussian components, and a point source 0.7" off its center from the fourth epoch on.

    python 03_host_and_transient.py

writes the figures 03_*.png into the current folder and takes less than half a minute.
"""

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from numpyro.distributions import constraints

import scenefit as sf

BAND = "r"
DAYS = (60300, 60306, 60311, 60315, 60319, 60326, 60341, 60361)  # MJD of the epochs
TRUE_FLUX = np.array([0, 0, 0, 900, 2400, 3000, 1800, 800.0])  # nJy; 22.7 AB at its brightest
NUM_QUIET = 3  # epochs before the explosion

HOST = SkyCoord(150.3, 2.05, unit="deg")
SUPERNOVA = HOST.directional_offset_by(140 * u.deg, 0.7 * u.arcsec)
# Flux [nJy], half-light radius [arcsec] (geometric mean of the axes), axis ratio, position angle [deg east of north]
BULGE = (9000, 0.25, 0.9, 30)
DISK = (15000, 0.9, 0.55, 70)

SHAPE = (48, 48)
PIXEL_ARCSEC = 0.2
RADIUS_PER_SIGMA = np.sqrt(2 * np.log(2))  # half-light radius of a Gaussian of unit standard deviation


def main():
    observations = simulate_epochs(np.random.default_rng(3))
    for obs in observations:
        seeing = PIXEL_ARCSEC * 2.355 * obs.psf.effective_sigma[0]
        print(f'{obs.name}: channel {obs.channels[0]}, seeing {seeing:.2f}", sigma {obs.noise.level()[0]:.1f} nJy')

    # Every channel (band, epoch) is one of the model, which covers the union of all pointings.
    frame = sf.Frame.from_observations(observations)
    print(f"model frame: {frame.shape} (channel, y, x)")

    # First with the supernova free in every epoch. Fluxes are non-negative unless one says otherwise: a point source
    # that isn't there must be allowed to come out below zero, or else the mean of many such is above it.
    scene = build_scene(frame)
    parameters = free_parameters(scene, observations).constrain("sources.supernova.spectrum.flux", constraints.real)
    blind = sf.fit(scene, observations, parameters)
    flux, error = light_curve(blind, "supernova")
    report("free in every epoch", flux, error)
    assert blind.is_converged
    quiet = flux[:NUM_QUIET] / error[:NUM_QUIET]
    # No flux before the explosion, within the errors: 16.3 is the 99.9th percentile of chi-square for 3 epochs.
    assert np.sum(quiet**2) < 16.3
    explosion = int(np.argmax(flux / error > 5))
    print(f"first seen at more than 5 sigma on MJD {DAYS[explosion]}")
    assert explosion == NUM_QUIET

    # Now that the explosion is dated, the first epochs can serve as the template: there the supernova is exactly zero,
    # so they determine the host beneath it, and the errors of the others shrink.
    scene = build_scene(frame, epochs=DAYS[explosion:])
    result = sf.fit(scene, observations, free_parameters(scene, observations))
    better_flux, better_error = light_curve(result, "supernova")
    report("zero before the explosion", better_flux, better_error)
    assert result.is_converged
    np.testing.assert_array_equal(better_flux[:NUM_QUIET], 0)
    assert np.all(better_error[NUM_QUIET:] < error[NUM_QUIET:])
    pulls = (better_flux - TRUE_FLUX)[NUM_QUIET:] / better_error[NUM_QUIET:]
    print(f"chi-square of the light curve: {np.sum(pulls**2):.1f} for {len(pulls)} epochs")
    # 20.5 is the 99.9th percentile for 5 degrees of freedom.
    assert np.sum(pulls**2) < 20.5
    check_host(result)

    plot_epochs(result).savefig("03_epochs.png", dpi=150)
    plot_light_curve((flux, error), (better_flux, better_error)).savefig("03_light_curve.png", dpi=150)
    print("written: 03_epochs.png 03_light_curve.png")


def simulate_epochs(rng: np.random.Generator) -> list[sf.Observation]:
    """Draw one image a night, no two alike in orientation, pointing, PSF, depth and zeropoint."""
    observations = []
    for day, supernova_flux in zip(DAYS, TRUE_FLUX, strict=True):
        wcs = turned_wcs(rng.uniform(-40, 40), rng.uniform(-3, 3, size=2))
        # Second moments of the PSF in pixels: seeing of 0.75" to 1.3", a little elongated.
        psf_moments = ellipse(rng.uniform(1.6, 2.8), rng.uniform(0.85, 1), rng.uniform(0, np.pi))
        # d(x, y) [pixel] / d(east, north) [arcsec]
        jacobian = np.linalg.inv(3600 * wcs.wcs.cd)
        image = supernova_flux * gaussian(SHAPE, wcs.world_to_pixel(SUPERNOVA), psf_moments)
        for flux, radius, axis_ratio, position_angle in (BULGE, DISK):
            # From north through east is clockwise where x points east, hence 90 degrees minus the angle.
            on_sky = ellipse(radius / RADIUS_PER_SIGMA, axis_ratio, np.deg2rad(90 - position_angle))
            moments = jacobian @ on_sky @ jacobian.T + psf_moments
            image += flux * gaussian(SHAPE, wcs.world_to_pixel(HOST), moments)
        sigma, zeropoint = rng.uniform(10, 20), rng.uniform(26.7, 27.3)
        counts_per_nanojansky = 10 ** (0.4 * (zeropoint - 31.4))
        observations.append(
            sf.Observation(
                counts_per_nanojansky * rng.normal(image, sigma),
                sigma=counts_per_nanojansky * sigma,
                psf=gaussian((25, 25), (12, 12), psf_moments),
                wcs=wcs,
                channels=[(BAND, day)],
                name=f"MJD{day}",
                # With its zeropoint given, an epoch is in nJy like all others: one flux of the host fits them all.
                zeropoint=zeropoint,
            )
        )
    return observations


def turned_wcs(angle_deg: float, offset) -> WCS:
    """Return a tangent plane around the host, turned by an angle and moved by some pixels (y, x)."""
    angle = np.deg2rad(angle_deg)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [HOST.ra.deg, HOST.dec.deg]
    wcs.wcs.crpix = [(SHAPE[1] + 1) / 2 + offset[1], (SHAPE[0] + 1) / 2 + offset[0]]
    turn = np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs.wcs.cd = PIXEL_ARCSEC / 3600 * turn
    return wcs


def ellipse(sigma: float, axis_ratio: float, theta: float) -> np.ndarray:
    """Return the second moments of an ellipse whose major axis is at theta from the first axis."""
    turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    return turn @ np.diag([sigma**2 / axis_ratio, sigma**2 * axis_ratio]) @ turn.T


def gaussian(shape, center_xy, moments) -> np.ndarray:
    """Return samples of a Gaussian of unit flux; the PSF has the pixel response in it, so samples are pixel values."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    offset = np.stack([x - center_xy[0], y - center_xy[1]], axis=-1)
    exponent = np.einsum("...i,ij,...j", offset, np.linalg.inv(moments), offset)
    return np.exp(-exponent / 2) / (2 * np.pi * np.sqrt(np.linalg.det(moments)))


def build_scene(frame: sf.Frame, epochs=None) -> sf.Scene:
    """Build a rough start: a compact and an extended component for the host, and a point for the supernova.

    The supernova shines in the given epochs only, or in all.
    """
    center = frame.to_pixel(HOST)
    host = sf.CompositeSource(
        {
            # One flux for all epochs of the band.
            "bulge": sf.Source(center, sf.StaticSpectrum([10000], [BAND]), sf.GaussianMorphology(1.5)),
            "disk": sf.Source(center, sf.StaticSpectrum([10000], [BAND]), sf.GaussianMorphology(5.0)),
        }
    )
    # An alert gives the position to a tenth of an arcsecond; the fit does better.
    position = frame.to_pixel(SUPERNOVA.spherical_offsets_by(0.08 * u.arcsec, -0.06 * u.arcsec))
    spectrum = sf.TransientSpectrum(np.full(len(frame.channels), 1000), epochs)
    supernova = sf.Source(position, spectrum, sf.PointMorphology())
    return sf.Scene(frame, {"host": host, "supernova": supernova})


def free_parameters(scene: sf.Scene, observations) -> sf.Parameters:
    """Free everything natural, with one center for both components of the host."""
    parameters = sf.Parameters.default(scene, observations)
    return parameters.tie("sources.host.parts.bulge.center", "sources.host.parts.disk.center")


def light_curve(result: sf.FitResult, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return fluxes and errors of a source in all epochs, in nJy."""
    table = sf.catalog(result)
    row = table[list(table["id"]).index(name)]
    flux = [row[f"flux_{BAND}_{day}"].to_value("nJy") for day in DAYS]
    error = [row[f"flux_err_{BAND}_{day}"].to_value("nJy") for day in DAYS]
    return np.array(flux), np.array(error)


def report(title: str, flux, error):
    """Print a light curve beside the truth."""
    print(f"\n{title}\n  MJD   flux [nJy]     truth   pull")
    for day, value, sigma, true in zip(DAYS, flux, error, TRUE_FLUX, strict=True):
        pull = f"{(value - true) / sigma:+6.1f}" if sigma > 0 else "     -"
        print(f"{day} {value:6.0f} +- {sigma:3.0f} {true:8.0f} {pull}")


def check_host(result: sf.FitResult):
    """Make sure that the host is the one drawn, although the supernova shines on top of it."""
    flux, error = light_curve(result, "host")
    true = BULGE[0] + DISK[0]
    print(f"host: {flux[0]:.0f} +- {error[0]:.0f} nJy in every epoch (truth {true})")
    assert np.ptp(flux) == 0
    assert abs(flux[0] - true) < 4 * error[0]
    disk = result.scene.sources["host"].parts["disk"]
    radius = disk.morphology.half_light_radius * result.scene.frame.pixel_scale
    print(f'half-light radius of the disk: {radius:.3f}" (truth {DISK[1]}")')
    # Its standard error is about 0.01".
    assert abs(radius - DISK[1]) < 0.05
    supernova = result.scene.frame.to_sky(result.scene.sources["supernova"].center)
    print(f"supernova found {supernova.separation(SUPERNOVA).to_value('mas'):.0f} mas from where it is")
    # The width of the PSF, 0.4", over the signal-to-noise ratio of all epochs together, 35, is 12 mas a direction.
    assert supernova.separation(SUPERNOVA) < 40 * u.mas
    for obs in result.observations:
        # 48 x 48 pixels: chi-square per pixel scatters by 0.03.
        assert abs(obs.chi_square(result.scene)[0] / obs.noise.valid.sum() - 1) < 0.12


def plot_epochs(result: sf.FitResult) -> Figure:
    """Show each epoch as observed, without the host and without the whole model, in units of its noise."""
    fig = Figure(figsize=(11, 4.3), layout="constrained")
    axes = fig.subplots(3, len(DAYS))
    norms = [AsinhNorm(2, -3, 60), AsinhNorm(4, -10, 10), AsinhNorm(4, -10, 10)]
    host_alone = result.scene.without("supernova")
    for obs, column in zip(result.observations, axes.T, strict=True):
        images = (obs.data, obs.residual(host_alone), obs.residual(result.scene))
        place = obs.wcs.world_to_pixel(SUPERNOVA)
        for ax, image, norm, colors in zip(column, images, norms, ("gray", "RdBu_r", "RdBu_r"), strict=True):
            shown = ax.imshow(image[0] / obs.noise.level()[0], norm=norm, cmap=colors, origin="lower")
            ax.plot(*place, "o", ms=11, mfc="none", mec="#E69F00", mew=1)
            ax.set(xticks=[], yticks=[])
        column[0].set_title(f"MJD {obs.channels[0][1]}", size="medium")
        # North, to show how the camera was turned.
        north = obs.wcs.world_to_pixel(HOST.directional_offset_by(0 * u.deg, 4 * u.arcsec))
        start = obs.wcs.world_to_pixel(HOST.directional_offset_by(0 * u.deg, 2.4 * u.arcsec))
        column[0].annotate("", north, start, arrowprops={"arrowstyle": "->", "color": "white"})
    for ax, label in zip(axes[:, 0], ("observed", "− host", "− host\n− supernova"), strict=True):
        ax.set_ylabel(label)
    fig.colorbar(shown, ax=axes[1:], label="residual / σ", ticks=[-10, -3, 0, 3, 10], format="%g", pad=0.01)
    return fig


def plot_light_curve(blind, better) -> Figure:
    """Draw both light curves over the truth, and what is wrong with them in units of their errors."""
    fig = Figure(figsize=(6.4, 4.6), layout="constrained")
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    days = np.array(DAYS)
    upper.axhline(0, color="0.7", linewidth=1)
    upper.plot(days, TRUE_FLUX, "_", color="black", ms=18, mew=1.5, label="truth")
    lower.axhspan(-1, 1, color="0.9")
    styles = (("free in every epoch", "#0072B2", "o", -0.5), ("zero before the explosion", "#D55E00", "s", 0.5))
    for (flux, error), (label, color, marker, nudge) in zip((blind, better), styles, strict=True):
        seen = error > 0
        options = {"fmt": marker, "color": color, "ms": 4, "capsize": 2}
        upper.errorbar((days + nudge)[seen], flux[seen], error[seen], label=label, **options)
        pulls = (flux - TRUE_FLUX)[seen] / error[seen]
        lower.errorbar((days + nudge)[seen], pulls, np.ones(seen.sum()), **options)
    upper.set_ylabel("flux of the supernova [nJy]")
    upper.legend(frameon=False)
    lower.set(xlabel="MJD", ylabel="(fit − truth) / σ", ylim=(-3.5, 3.5))
    return fig


if __name__ == "__main__":
    main()
