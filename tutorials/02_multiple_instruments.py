"""Two instruments, one model: a blend seen sharply by one and in five bands by the other.

HST resolves a crowded field in one band; HSC sees it in five, with pixels 5.6 times as wide and everything blurred
together. The usual ways out are to resample one image to the other's pixels, which correlates the noise, or to degrade
the sharp one. Here the model is rendered in the pixels of each instrument instead, and both are fitted as they are.

The steps: look at the data, lay out a model frame, start from the sharp image, fit, find dipoles in the HSC residuals,
free the offset of the HSC image, fit again, and judge the result.

    python 02_multiple_instruments.py            # the COSMOS blend if SCENEFIT_DATA has it, else the demo field
    python 02_multiple_instruments.py cosmos     # ditto, but download it from Hugging Face if need be

writes figures 02_*.png into the current folder and takes less than a minute. Noise is taken as independent from pixel
to pixel in both images; data that come resampled, with correlated noise, are beyond this version.
"""

import os
import sys

import astropy.units as u
import numpy as np
import numpyro.distributions as dist
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from matplotlib.figure import Figure

import scenefit as sf

SHIFT, BACKGROUND = "observations.HSC.astrometry.shift", "observations.HSC.background"
# A bright galaxy in the COSMOS field whose middle lies beyond the edge of both images, and a faint one beside it.
BEYOND_COSMOS = SkyCoord([150.31877, 150.31943], [2.04056, 2.04056], unit="deg")


def main(name: str):
    field = sf.datasets.load(name)
    print(f"{name}: {field.description}; {len(field.catalog)} sources")

    # One file holds image, weights, PSF and WCS of both instruments, and the positions of the sources.
    hst, hsc = sf.read_observations(field.path, names=["HST", "HSC"])
    positions, _ = sf.read_catalog(field.path)
    for obs in (hst, hsc):
        print(f"  {obs.name}: {obs.shape} (channel, y, x), channels {', '.join(obs.channels)}, in {obs.flux_unit}")
        sf.plot.observation(obs, catalog=positions).savefig(f"02_{obs.name}.png", dpi=150)

    # What no source of the catalogue can explain would be blamed on those that are nearest, so it is masked.
    if name == "cosmos":
        hsc = mask_around(hsc, BEYOND_COSMOS, 1.9 * u.arcsec)
    observations = [hst, hsc]

    # The model needs the finest pixels of all and the channels of all. Over the union of the images every pixel counts,
    # and sources may reach beyond the HST image; the intersection is smaller, and enough for what both instruments see.
    frame = sf.Frame.from_observations(observations, coverage="union")
    inner = sf.Frame.from_observations(observations, coverage="intersection")
    for coverage, each in (("union", frame), ("intersection", inner)):
        print(f'{coverage}: {each.shape} (channel, y, x), {each.pixel_scale:.3f}" a pixel, {", ".join(each.channels)}')
    plot_frames({"union": frame, "intersection": inner}, observations, positions).savefig("02_frames.png", dpi=150)

    # Shapes start from the image with the sharpest PSF: smooth envelopes. Fluxes are those with which all envelopes together
    # fit each band best. The residuals in the figure show what is left to the fit: all that isn't smooth.
    scene = sf.initialize(frame, observations, positions, model="pixel")
    sf.plot.scene(scene, observations).savefig("02_start.png", dpi=150)

    # Fluxes and pixels are free, and non-negative, by default. So is here the sky level of HSC in every band. There are
    # no step sizes to choose and no instrument to be rescaled.
    parameters = sf.Parameters.default(scene, observations).free(BACKGROUND)
    before = sf.fit(scene, observations, parameters)
    assert before.is_converged
    judge(before, "offset fixed")
    sf.plot.scene(before.scene, before.observations).savefig("02_offset_fixed.png", dpi=150)

    # Dipoles: the residuals look like the derivative of the model with respect to its position. How far the image would
    # have to move to explain them is a linear problem.
    shift, error = shift_from_residuals(before)
    print(f"the HSC residuals ask for a shift of {mas(shift, error)}: {np.max(np.abs(shift) / error):.0f} sigma")
    # By chance a shift of 5 sigma would be asked for once in a million fields.
    assert np.max(np.abs(shift) / error) > 5

    # One observation has to stay where it is, the anchor: if all moved, the scene could move along with them.
    try:
        parameters.free("observations.*.astrometry.shift")
    except ValueError as exc:
        print(f"freeing all shifts: ValueError: {exc}")
    else:
        raise AssertionError("expected an error when no observation is left as the anchor")

    # The same start with the offset of HSC free, HST being the anchor. The prior is optional, and says that the two
    # agree to a tenth of an arcsecond or so. It is fifty times wider than the error of the fit, which it hardly changes.
    after = sf.fit(scene, observations, parameters.free(SHIFT, prior=dist.Normal(0, 100 * u.mas)))
    assert after.is_converged
    judge(after, "offset free")
    sf.plot.scene(after.scene, after.observations).savefig("02_offset_free.png", dpi=150)
    plot_dipoles(before, after).savefig("02_dipoles.png", dpi=150)
    gain = before.loss - after.loss
    print(f"the loss fell by {gain:.0f} for two more parameters")
    # The shift that the residuals asked for is worth at least half its squared significance. The sources, which had
    # given way to the dipoles, can go back to where HST sees them, which is worth more.
    assert gain > 0.5 * np.max(np.abs(shift) / error) ** 2
    leftover, error = shift_from_residuals(after)
    print(f"now the residuals ask for {mas(leftover, error)}")
    # At the minimum they ask for nothing. The fit stops a few hundredths of a standard deviation away from it.
    assert np.all(np.abs(leftover) < error)

    report_offset(after, field.path)
    report_fluxes(after, field.truth)
    compare_with_intersection(inner, observations, positions, after)
    show_dialects_and_epochs(after)


def mask_around(obs: sf.Observation, positions: SkyCoord, radius: u.Quantity) -> sf.Observation:
    """Return the observation with the pixels around some positions masked."""
    y, x = np.mgrid[: obs.shape[1], : obs.shape[2]]
    sky = obs.wcs.pixel_to_world(x, y)
    mask = (sky[..., None].separation(positions) < radius).any(axis=-1)
    print(f"  {obs.name}: {mask.sum()} pixels masked")
    return sf.Observation(
        obs.data, noise=obs.noise, psf=obs.psf, wcs=obs.wcs, channels=obs.channels, name=obs.name, mask=mask
    )


def judge(result: sf.FitResult, title: str):
    """Print how well the model describes the original pixels of each image."""
    print(f"{title}: {result.status.value} after {result.num_steps} steps, loss {result.loss:.0f}")
    for obs in result.observations:
        per_pixel = obs.chi_square(result.scene) / obs.noise.valid.sum(axis=(1, 2))
        print(
            f"  {obs.name}: chi-square per pixel",
            {c: round(v, 3) for c, v in zip(obs.channels, per_pixel.tolist(), strict=True)},
        )


def find(result: sf.FitResult, name: str) -> sf.Observation:
    """Return an observation of a result by its name."""
    return next(obs for obs in result.observations if obs.name == name)


def shift_from_residuals(result: sf.FitResult) -> tuple[np.ndarray, np.ndarray]:
    """Return the (east, north) shift in arcsec that best explains the HSC residuals, with all else held fixed."""
    hsc = find(result, "HSC")
    step = 0.01
    sigma = hsc.noise.level()[:, None, None]
    derivatives = []
    for direction in np.eye(2):
        ahead = hsc.with_shift(hsc.astrometry.shift + step * direction).render(result.scene)
        behind = hsc.with_shift(hsc.astrometry.shift - step * direction).render(result.scene)
        derivatives.append(((ahead - behind) / (2 * step * sigma))[hsc.noise.valid])
    residual = (hsc.residual(result.scene) / sigma)[hsc.noise.valid]
    design = np.array(derivatives)
    covariance = np.linalg.inv(design @ design.T)
    return covariance @ design @ residual, np.sqrt(np.diag(covariance))


def mas(shift, error) -> str:
    """Return a shift as text."""
    (east, north), (east_error, north_error) = 1e3 * np.asarray(shift), 1e3 * np.asarray(error)
    return f"{east:+.1f} +- {east_error:.1f} mas east, {north:+.1f} +- {north_error:.1f} mas north"


def report_offset(result: sf.FitResult, path):
    """Print the offset of the HSC image in arcsec, in model pixels and in its own, and compare with what is known."""
    hsc, frame = find(result, "HSC"), result.scene.frame
    shift, error = hsc.astrometry.shift, sf.offset_errors(result)["HSC"]
    print(f'HSC: sources appear {shift[0]:+.4f}" east and {shift[1]:+.4f}" north of where the WCS puts them')
    print(f"  = {mas(shift, error)}")
    native = sf.Frame(hsc.shape[1:], channels=hsc.channels, wcs=hsc.wcs)
    for grid, jacobian in (("model", frame.sky_jacobian()), ("native HSC", native.sky_jacobian())):
        # d(y, x) / d(east, north); the errors of the two directions are nearly independent.
        y, x = jacobian @ shift
        y_error, x_error = np.sqrt(jacobian**2 @ error**2)
        print(f"  = {x:+.4f} +- {x_error:.4f} in x and {y:+.4f} +- {y_error:.4f} in y, {grid} pixels")
    # Surveys tied to one reference catalogue agree to a tenth of an arcsecond, and HSC is registered to a hundredth of
    # its PSF of 0.6": anything larger would mean that sources have been confused.
    assert np.hypot(*shift) < 0.1
    assert np.all(error < 0.006)
    # Both fields have an offset of several hundredths of an arcsecond, many times that.
    assert np.hypot(*(shift / error)) > 10
    header = fits.getheader(path)
    if "OFF_E" in header:
        true = np.array([header["OFF_E"], header["OFF_N"]])
        print(f"  truth: {1e3 * true[0]:+.1f} mas east, {1e3 * true[1]:+.1f} mas north")
        # Two numbers exceed 4 standard errors once in eight thousand fields.
        assert np.all(np.abs(shift - true) < 4 * error)


def report_fluxes(result: sf.FitResult, truth: Table | None):
    """Print the catalogue, beside the truth where it is known."""
    table = sf.catalog(result)
    shown = table["id", "ra", "dec"]
    shown["ra"].info.format = shown["dec"].info.format = ".6f"
    for channel in ("F814W", "g", "i"):
        flux, error = table[f"flux_{channel}"], table[f"flux_err_{channel}"]
        shown[f"flux {channel}"] = [f"{f:.1f} +- {e:.1f}" for f, e in zip(flux.value, error.value, strict=True)]
        if truth is not None:
            shown[f"true {channel}"] = np.round(truth[f"flux_{channel}"].value, 1)
    shown["snr"] = np.round(table["snr"], 0)
    print("\n".join(shown.pformat(max_width=-1)))
    # Every source of the catalogue is there in at least one band.
    assert np.all(table["snr"] > 3)
    if truth is None:
        return
    # The errors are those of the noise with the pixels held as fitted. What free pixels make of the outskirts adds some
    # hundredths of a magnitude, and more to the one source that is fainter than 22.5 (tutorial 01 looks into that).
    bright = truth["mag_i"] < 22.5
    for channel in ("F814W", "i"):
        error = (table[f"mag_{channel}"].value - truth[f"mag_{channel}"].value)[bright]
        assert np.abs(error).max() < 0.12


def compare_with_intersection(frame: sf.Frame, observations, positions: SkyCoord, union: sf.FitResult):
    """Fit on the smaller frame, and make sure that the offset doesn't depend on that choice."""
    scene = sf.initialize(frame, observations, positions, model="pixel")
    parameters = sf.Parameters.default(scene, observations).free(BACKGROUND).free(SHIFT)
    result = sf.fit(scene, observations, parameters, progress=False)
    assert result.is_converged
    shift, other = find(result, "HSC").astrometry.shift, find(union, "HSC").astrometry.shift
    print(f"on the intersection frame the offset is {1e3 * shift[0]:+.1f} mas east, {1e3 * shift[1]:+.1f} mas north")
    # HST sees none of the pixels outside, so they say little about the offset: the two agree to a few standard errors.
    assert np.all(np.abs(shift - other) < 3 * sf.offset_errors(union)["HSC"])


def show_dialects_and_epochs(result: sf.FitResult):
    """Say how other headers and repeated bands are dealt with."""
    hsc = find(result, "HSC")
    options = {"noise": hsc.noise, "psf": hsc.psf}
    # A header may write the same WCS in any dialect (CD, PC with CDELT, CROTA; with SIP or TPV distortions, too).
    header = hsc.wcs.to_header()
    steps = [header.get(f"CDELT{axis}", 1.0) for axis in (1, 2)]
    for i in (1, 2):
        for j in (1, 2):
            header[f"CD{i}_{j}"] = header.pop(f"PC{i}_{j}", float(i == j)) * steps[i - 1]
        header.remove(f"CDELT{i}", ignore_missing=True)
    same = sf.Observation(hsc.data, wcs=header, channels=hsc.channels, astrometry=hsc.astrometry, **options)
    image = hsc.render(result.scene) - hsc.background[:, None, None]
    np.testing.assert_allclose(same.render(result.scene), image, rtol=0, atol=1e-5 * image.max())

    # A name is a channel of the model: a second HSC visit with channel "i" would constrain the same light as the first.
    # Where the light itself changes from visit to visit, channels are named (band, epoch), as in tutorial 03.
    visits = [
        sf.Observation(
            hsc.data[2], wcs=hsc.wcs, channels=[("i", epoch)], name=f"visit {epoch}", weights=1.0, psf=hsc.psf.image[2]
        )
        for epoch in (1, 2)
    ]
    print("two epochs of i are channels", sf.Frame.from_observations(visits).channels)


def plot_frames(frames: dict[str, sf.Frame], observations, positions: SkyCoord) -> Figure:
    """Draw the outlines of images and model frames on the sky."""
    union = frames["union"]
    to_arcsec = np.linalg.inv(union.sky_jacobian())

    def offsets(sky):
        return to_arcsec @ (union.to_pixel(sky) - union.center).T

    def outline(wcs, shape):
        low, high = -0.5, np.array(shape) - 0.5
        return offsets(wcs.pixel_to_world([low, high[1], high[1], low, low], [low, low, high[0], high[0], low]))

    fig = Figure(figsize=(4.6, 4.6), layout="constrained")
    ax = fig.add_subplot()
    # The HST image lies on top: it is the smaller one.
    for obs, color in zip(observations[::-1], ("#fdd0a2", "#9ecae1"), strict=True):
        ax.fill(*outline(obs.wcs, obs.shape[1:]), color=color, linewidth=0, label=f"{obs.name} image")
    for (coverage, frame), style in zip(frames.items(), ("-", "--"), strict=True):
        ax.plot(*outline(frame.wcs, frame.box.shape), "k", linestyle=style, linewidth=1.2, label=f"{coverage} frame")
    ax.plot(*offsets(positions), "k+", label="sources")
    ax.set(xlabel="east [arcsec]", ylabel="north [arcsec]", aspect="equal")
    ax.invert_xaxis()
    ax.margins(0.12)
    fig.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    return fig


def plot_dipoles(before: sf.FitResult, after: sf.FitResult) -> Figure:
    """Show the HSC residuals, all bands together, with the offset fixed and free."""
    fig = Figure(figsize=(8.2, 3.9), layout="constrained")
    axes = fig.subplots(1, 2)
    for ax, result, title in zip(axes, (before, after), ("offset fixed", "offset free"), strict=True):
        obs = find(result, "HSC")
        scaled = obs.residual(result.scene) / obs.noise.level()[:, None, None]
        image = np.where(obs.noise.valid.any(axis=0), scaled.sum(axis=0) / np.sqrt(len(scaled)), np.nan)
        shown = ax.imshow(image, cmap="RdBu_r", vmin=-5, vmax=5, origin="lower")
        light = (obs.render(result.scene) - obs.background[:, None, None]).sum(axis=0)
        ax.contour(light, levels=light.max() * np.array([0.05, 0.2, 0.4, 0.6, 0.8]), colors="0.4", linewidths=0.5)
        ax.set(title=title, xticks=[], yticks=[], facecolor="0.8")
    fig.colorbar(shown, ax=axes, label="HSC residual of all bands / σ", extend="both")
    return fig


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    elif os.path.isfile(os.path.join(os.environ.get("SCENEFIT_DATA", ""), "cosmos_hst_hsc.fits")):
        main("cosmos")
    else:
        print("The COSMOS file isn't in the folder SCENEFIT_DATA: this run uses the packaged demo field.")
        main("demo")
