"""From blended images to a catalogue: nothing is given but the images of two cameras.

A space camera sees a field sharply in one band, a camera on the ground in three, everything blurred together. The steps are
those of a real field: find the sources in all images together, choose what each is made of, fit all with the offset of the
ground camera free, measure. As this field is simulated, the catalogue can then be compared with the truth. In real images it
can't be; what one can look at in any case, residuals and flags, is looked at first.

    python 09_blend_to_catalogue.py

simulates the images with scenefit's renderer from true profiles, writes figures 09_*.png and the catalogue 09_catalog.ecsv into
the current folder, and takes about a minute.
"""

import astropy.units as u
import numpy as np
from astropy.table import QTable
from astropy.wcs import WCS
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure

import scenefit as sf
from scenefit.survey.flags import Flag
from scenefit.survey.inject import inject
from scenefit.survey.validate import Validation, validate

FIELD_DEG = (150.1, 2.2)
SPACE_SHAPE, SPACE_ARCSEC, SPACE_PSF, SPACE_SIGMA = (140, 140), 0.06, 1.1, 1.2  # pixels, arcsec, pixels, nJy in a pixel
GROUND_SHAPE, GROUND_ARCSEC, GROUND_ANGLE_DEG = (42, 42), 0.18, 14.0
GROUND_PSF = {"g": 1.9, "r": 1.7, "i": 1.5}  # pixels
GROUND_SIGMA = {"g": 4.0, "r": 5.0, "i": 7.0}  # nJy in a pixel
OFFSET_ARCSEC = (0.035, -0.022)  # east, north, of the ground camera
TRAIL = ("i", 9, 13)  # band and rows of the ground image that a satellite crossed
SHIFT = "observations.ground.astrometry.shift"
CLUMPS = [(8.5, 6.0), (-9.5, 4.5), (1.0, -10.5)]  # (y, x) from the middle of the spiral, pixels
# Position (y, x) on the space image, fluxes [nJy] in F814W, g, r, i, and shape.
DISKS = {
    "spiral": (
        (72.4, 58.7),
        (6500, 2900, 5000, 6600),
        sf.ClumpyMorphology(9.5, 1.0, (0.25, 0.2), CLUMPS, (0.04, 0.04, 0.04)),
    ),
    "companion": ((60.2, 81.5), (1800, 650, 1250, 1850), sf.SersicMorphology(5.0, 1.1, (-0.3, 0.1))),
    "edge-on": ((101.3, 77.8), (1300, 420, 860, 1320), sf.SersicMorphology(6.5, 1.0, (0.1, -0.5))),
    "blue": ((88.0, 34.6), (700, 620, 680, 700), sf.SersicMorphology(4.0, 0.9, (0.1, 0.2))),
    "faint": ((34.8, 98.2), (320, 110, 230, 330), sf.SersicMorphology(4.0, 1.0, (0.0, 0.2))),
    "small": ((30.5, 45.3), (420, 260, 350, 430), sf.SersicMorphology(2.8, 1.2, (0.2, 0.0))),
}
BULGE = ("companion", (700, 130, 400, 750), sf.SersicMorphology(2.2, 2.7, (-0.1, 0.0)))
STARS = {
    "star": ((49.6, 63.1), (1600, 900, 1300, 1650)),
    "red star": ((84.7, 96.4), (900, 90, 350, 950)),
}


def main():
    observations, truth = simulate(np.random.default_rng(2026))
    frame = sf.Frame.from_observations(observations, coverage="union")

    # Sources are what all images show together, each filtered with its own PSF in its own pixels.
    detections = sf.detect(observations, frame)
    shown = detections.table["id", "y", "x", "significance", "half_light_radius", "is_compact"].copy()
    print(f"{len(detections)} detections, {len(detections.clumps)} clumps")
    show(shown, {"y": ".1f", "x": ".1f", "significance": ".0f", "half_light_radius": ".2f"})
    plot_detections(observations[0], detections).savefig("09_detections.png", dpi=150)

    # What each is made of is decided on the sharpest image. Without positions, `initialize` would detect by itself.
    # Galaxies too faint to tell get a typical bulge.
    scene = sf.initialize(frame, observations, detections.positions)
    print("\n".join(["\nfamilies", *(f"  {name}: {family(source)}" for name, source in scene.sources.items())]))

    # The space image says where things are. The ground image is off by an unknown offset, which is fitted along.
    parameters = sf.Parameters.default(scene, observations).free(SHIFT)
    result = sf.fit(scene, observations, parameters)
    assert result.is_converged
    print(f"\nfit: {result.status.name} after {result.num_steps} steps")
    check_offset(result)

    table = sf.catalog(result)
    table.write("09_catalog.ecsv", overwrite=True)
    columns = ["id", "mag_F814W", "mag_err_F814W", "mag_g", "mag_i", "half_light_radius", "blendedness_i", "star_score"]
    formats = dict.fromkeys(columns[1:], ".2f") | {"mag_err_F814W": ".3f"}
    show(table[[*columns, "flags"]].copy(), formats)

    # Before any truth: is the model right, and which rows need a second look?
    check_residuals(result)
    check_flags(table)
    # Whatever is found beside the fitted sources would be added to them, for another fit.
    left = sf.detect(observations, frame, scene=result.scene, progress=False)
    print(f"beside the fitted sources, {len(left)} more are detected")
    assert len(left) == 0
    sf.plot.scene(result.scene, result.observations).savefig("09_scene.png", dpi=150)
    # Each source on its own: what the camera would have seen, and the data with all others subtracted.
    names = ["0", "1", "3", "6"]
    sf.plot.sources(result.scene, result.observations, names).savefig("09_sources.png", dpi=120)

    # The truth: matched by position and flux, one to one.
    comparison = validate(table, truth, channel="F814W", radius=0.2 * u.arcsec, isolation=1.5 * u.arcsec)
    check_truth(comparison, table, truth)
    sf.plot.validation(comparison, ["mag_F814W", "mag_i", "g-r", "log_size"]).savefig("09_validation.png", dpi=150)
    print("written: 09_detections.png 09_scene.png 09_sources.png 09_validation.png 09_catalog.ecsv")


def simulate(rng) -> tuple[list[sf.Observation], QTable]:
    """Return the images of both cameras and the true catalogue."""
    space = blank(rng, "space", ["F814W"], SPACE_SHAPE, SPACE_ARCSEC, 0.0, [SPACE_PSF], [SPACE_SIGMA])
    psf, sigma = list(GROUND_PSF.values()), list(GROUND_SIGMA.values())
    ground = blank(rng, "ground", list(GROUND_PSF), GROUND_SHAPE, GROUND_ARCSEC, GROUND_ANGLE_DEG, psf, sigma)
    frame = sf.Frame(SPACE_SHAPE, channels=["F814W", *GROUND_PSF], wcs=space.wcs, padding=64)
    sources = {name: sf.Source(*each) for name, each in DISKS.items()}
    name, fluxes, shape = BULGE
    bulge = sf.Source(sources[name].center, fluxes, shape)
    sources[name] = sf.CompositeSource({"disk": sources[name], "bulge": bulge}, concentric=True)
    sources |= {name: sf.Source(*each, sf.PointMorphology()) for name, each in STARS.items()}
    # The light falls where the offset puts it, which the header of the image doesn't know.
    images, truth = inject([space, ground.with_shift(OFFSET_ARCSEC)], sf.Scene(frame, sources))
    return [images[0], images[1].with_shift((0.0, 0.0))], truth


def blank(rng, name, channels, shape, pixel_arcsec, angle_deg, psf_sigma, sigma) -> sf.Observation:
    """Return an image of noise in nJy, with Gaussian PSFs, turned on the sky by an angle."""
    angle, wcs = np.deg2rad(angle_deg), WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], FIELD_DEG
    wcs.wcs.crpix = [(shape[1] + 1) / 2, (shape[0] + 1) / 2]
    wcs.wcs.cd = pixel_arcsec / 3600 * np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mask = np.zeros((len(channels), *shape), bool)
    band, first, last = TRAIL
    if band in channels:
        mask[channels.index(band), first : last + 1] = True
    noise = np.array(sigma)[:, None, None] * rng.standard_normal(mask.shape)
    known = {"psf": sf.GaussianPSF(psf_sigma), "wcs": wcs, "channels": channels, "name": name, "unit": "nJy"}
    return sf.Observation(noise, sigma=sigma, mask=mask, **known)


def family(source) -> str:
    """Say what a source is made of."""
    if isinstance(source, sf.CompositeSource):
        return f"{family(source.parts['disk'])} and bulge"
    if isinstance(source.morphology, sf.ClumpyMorphology):
        return f"disk with {len(source.morphology.fractions)} clumps"
    return "point" if isinstance(source.morphology, sf.PointMorphology) else "disk"


def show(table: QTable, formats: dict[str, str]):
    """Print a table."""
    for column, text in formats.items():
        table[column].info.format = text
    print("\n".join(table.pformat(max_lines=-1, max_width=-1)))


def check_offset(result: sf.FitResult):
    """Compare the fitted offset with the true one."""
    shift, errors = result.observations[1].astrometry.shift, sf.offset_errors(result)["ground"]
    for direction, *values in zip(("east", "north"), shift, errors, OFFSET_ARCSEC, strict=True):
        value, error, true = (1e3 * each for each in values)
        print(f"  the ground camera is off {direction} by {value:.1f} +- {error:.1f} mas; true: {true:.1f}")
    # Two normal numbers are beyond 4 standard errors once in eight thousand fields.
    assert np.all(np.abs(shift - OFFSET_ARCSEC) < 4 * errors)


def check_residuals(result: sf.FitResult):
    """Print the chi-square per pixel of each image: 1 where the model leaves noise alone."""
    for obs in result.observations:
        number = obs.noise.valid.sum(axis=(1, 2))
        per_pixel = obs.chi_square(result.scene) / number
        text = ", ".join(f"{channel} {value:.3f}" for channel, value in zip(obs.channels, per_pixel, strict=True))
        print(f"chi-square per pixel of {obs.name}: {text} (scatter {np.sqrt(2 / number[0]):.3f})")
        # It scatters by sqrt(2 / N); families are an approximation of the true profiles, which may add a few per cent.
        assert np.all(np.abs(per_pixel - 1) < 5 * np.sqrt(2 / number) + 0.03)


def check_flags(table: QTable):
    """Print what the catalogue warns of."""
    for row in table[table["flags"] > 0]:
        print(f"source {row['id']}, with {row['masked_fraction']:.0%} of its light masked in some band:")
        for flag in Flag(int(row["flags"])):
            print(f"  {flag.name}: {flag.__doc__}")
    # Chi-square on the brightest pixels of each source finds those that aren't what they are modelled as.
    for channel in ("F814W", "i"):
        excess = (table[f"chi_square_{channel}"] - 1) / np.sqrt(2 / table[f"num_pixels_{channel}"])
        print(f"chi-square of each source in {channel}, in standard deviations from 1: {np.round(excess, 1)}")
        # Standard deviations, of which 5 are as many as eight sources won't show if they are what they are modelled as.
        assert np.all(np.abs(excess) < 5)
    usable = table[(table["flags"] & (Flag.MASKED | Flag.BLENDED | Flag.NOT_CONVERGED)) == 0]
    print(f"{len(usable)} of {len(table)} rows without warning")


def check_truth(comparison: Validation, table: QTable, truth: QTable):
    """Print how far the catalogue is from the truth."""
    print(f"\ncompleteness {comparison.completeness:.2f}, purity {comparison.purity:.2f}")
    statistics = comparison.statistics()
    columns = ["quantity", "number", "median", "median_absolute", "mad_sigma", "pull_median", "pull_mad_sigma"]
    show(statistics[columns], dict.fromkeys(columns[2:], ".3f"))
    for pair in comparison.pairs:
        row, true = table[pair["catalog_row"]], truth[pair["truth_row"]]
        magnitudes = ", ".join(f"{name} {pair[f'residual_mag_{name}']:+.3f}" for name in ("F814W", "g", "r", "i"))
        print(f"  {true['id']} is {row['id']}, off by {magnitudes} mag")
    # Sources are more significant than 20 in the space image and further apart than its PSF.
    assert comparison.completeness == comparison.purity == 1
    for name in ("F814W", "g", "r", "i"):
        pulls = comparison.pairs[f"pull_mag_{name}"]
        # 32 normal numbers are beyond 4 once in five hundred fields.
        assert np.all(np.abs(pulls) < 4), pulls
    # The deviation of 32 pulls from unit width: 3.5 times 1 / sqrt(2 n).
    pulls = np.concatenate([comparison.pairs[f"pull_mag_{name}"] for name in ("F814W", "g", "r", "i")])
    print(f"width of {len(pulls)} pulls of fluxes: {np.sqrt(np.mean(pulls**2)):.2f}")
    assert abs(np.sqrt(np.mean(pulls**2)) - 1) < 3.5 / np.sqrt(2 * len(pulls))


def plot_detections(space: sf.Observation, detections: sf.Detections) -> Figure:
    """Show the sharp image and the significance of point sources in all images together, with what was found."""
    fig = Figure(figsize=(9, 4.6), layout="constrained")
    axes = fig.subplots(1, 2)
    to_space = space.wcs.world_to_pixel(detections.skycoord)
    axes[0].imshow(space.data[0] / SPACE_SIGMA, norm=AsinhNorm(2, -3, 60), cmap="gray", origin="lower")
    axes[0].plot(*to_space, "+", color="#D55E00")
    axes[0].set(title="space, in standard deviations")
    shown = axes[1].imshow(detections.significance, norm=AsinhNorm(5, -5, 300), cmap="magma", origin="lower")
    axes[1].contour(detections.segmentation > 0, levels=[0.5], colors="w", linewidths=0.6)
    for number, (y, x) in enumerate(detections.positions):
        axes[1].annotate(str(number), (x, y), xytext=(4, 4), textcoords="offset points", color="w", size="small")
    axes[1].set(title="significance of both cameras")
    fig.colorbar(shown, ax=axes[1])
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    return fig


if __name__ == "__main__":
    main()
