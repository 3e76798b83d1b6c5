import gzip
import json
import warnings

import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.wcs import WCS

from scenefit.app import io
from scenefit.app.io import (
    catalog_in,
    output_folder,
    prepare_output,
    read_catalog,
    read_observations,
    write_images,
    write_json,
)
from scenefit.data.observation import Observation
from scenefit.model.morphology import GaussianMorphology
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame

RNG = np.random.default_rng(11)
WCS_CARDS = {
    **{
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CRVAL1": 150.1,
        "CRVAL2": 2.2,
        "CRPIX1": 10.0,
        "CRPIX2": 9.0,
    },
    **{"CD1_1": -1e-5, "CD1_2": 2e-6, "CD2_1": 2e-6, "CD2_2": 1e-5},
}
SIP_CARDS = {
    **{**WCS_CARDS, "CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP"},
    **{"A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-4, "B_0_2": 2e-4},
}
DATA = RNG.normal(size=(3, 18, 20)).astype(np.float32)
WEIGHTS = RNG.uniform(1, 2, size=DATA.shape).astype(np.float32)


def gaussian(size, center, sigma=1.5):
    y, x = np.mgrid[: size[0], : size[1]]
    return np.exp(-0.5 * ((y - center[0]) ** 2 + (x - center[1]) ** 2) / sigma**2)


PSF = gaussian((11, 11), (5, 5))


def make_hdus(name="CAM", *, data=DATA, weights=WEIGHTS, psf=PSF, header=None, psf_header=None):
    """Return the three HDUs of an observation; those whose content is None are left out."""
    contents = {"OBS": (data, header), "WEIGHTS": (weights, None), "PSF": (psf, psf_header)}
    hdus = []
    for kind, (array, cards) in contents.items():
        if array is not None:
            cards = WCS_CARDS if cards is None and kind == "OBS" else cards
            hdus.append(fits.ImageHDU(array, fits.Header(cards or {}), f"{name}_{kind}"))
    return hdus


def write(path, *hdus, **primary):
    fits.HDUList([fits.PrimaryHDU(header=fits.Header(primary)), *hdus]).writeto(path, overwrite=True)
    return path


def read_one(path, **options) -> Observation:
    (observation,) = read_observations(path, **options)
    return observation


@pytest.fixture
def path(tmp_path):
    return tmp_path / "field.fits"


class TestReadObservations:
    def test_arrays_order_and_defaults(self, path):
        single = make_hdus("ZED", data=DATA[0], weights=WEIGHTS[0])
        write(path, *single, *make_hdus("CAM"))
        zed, cam = read_observations(path)
        assert [zed.name, cam.name] == ["ZED", "CAM"]
        np.testing.assert_array_equal(cam.data, DATA)
        np.testing.assert_array_equal(cam.noise.weights, WEIGHTS)
        np.testing.assert_array_equal(zed.data, DATA[:1])
        assert (zed.channels, cam.channels) == (("ZED",), ("CAM_0", "CAM_1", "CAM_2"))
        assert cam.flux_unit == "data units"
        # float32 PSF samples, normalised in float64
        np.testing.assert_allclose(cam.psf.image[0], PSF / PSF.sum(), rtol=1e-6)

    def test_names_choose_and_order(self, path):
        write(path, *make_hdus("A"), *make_hdus("B"), *make_hdus("C"))
        assert [obs.name for obs in read_observations(path, names=["C", "A"])] == ["C", "A"]
        assert [obs.name for obs in read_observations(path, names="B")] == ["B"]
        with pytest.raises(ValueError, match=r"field\.fits: no observation is named 'D'; it holds \['A', 'B', 'C'\]"):
            read_observations(path, names=["D"])

    @pytest.mark.parametrize("dtype", [">f4", "<f8", ">i2", "u2", "u1"])
    def test_any_number_type(self, path, dtype):
        data = np.arange(360).reshape(18, 20).astype(dtype)
        observation = read_one(write(path, *make_hdus(data=data, weights=np.ones_like(data))))
        np.testing.assert_array_equal(observation.data[0], data)
        assert observation.data.dtype == np.dtype("=f8")
        assert observation.psf.image.dtype.isnative

    def test_gzipped(self, tmp_path):
        observation = read_one(write(tmp_path / "field.fits.gz", *make_hdus()))
        np.testing.assert_array_equal(observation.data, DATA)

    def test_tile_compressed(self, path):
        image, *others = make_hdus(data=np.arange(360, dtype=np.int16).reshape(18, 20), weights=WEIGHTS[0])
        compressed = fits.CompImageHDU(image.data, image.header, name="CAM_OBS")
        np.testing.assert_array_equal(read_one(write(path, compressed, *others)).data[0], image.data)

    def test_mask_and_nan(self, path):
        data = DATA.copy()
        data[1, 2, 3] = np.nan
        mask = np.zeros(DATA.shape[1:], np.float32)
        mask[4, 5], mask[6, 7] = 2, np.nan
        hdus = [*make_hdus(data=data), fits.ImageHDU(mask, name="CAM_MASK")]
        valid = read_one(write(path, *hdus)).noise.valid
        expected = np.ones(DATA.shape, bool)
        expected[1, 2, 3] = False
        expected[:, [4, 6], [5, 7]] = False
        np.testing.assert_array_equal(valid, expected)

    @pytest.mark.parametrize("cards", [WCS_CARDS, SIP_CARDS, {**WCS_CARDS, "CTYPE3": "WAVE", "CRVAL3": 5e-7}])
    def test_wcs_of_a_cube_is_that_of_its_planes(self, path, cards):
        observation = read_one(write(path, *make_hdus(header={**cards, "RADECSYS": "FK5"})))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plane = WCS(fits.Header({**cards, "RADESYS": "FK5"}), naxis=2)
        there, expected = observation.wcs.pixel_to_world(3.0, 15.0), plane.pixel_to_world(3.0, 15.0)
        assert there.frame.name == "fk5"
        # the astropy transformation of both is good to some 1e-12
        assert there.separation(expected).arcsec < 1e-9
        assert observation.wcs.array_shape == (18, 20)
        assert (observation.wcs.sip is not None) == (cards is SIP_CARDS)

    def test_axes_may_be_swapped(self, path):
        cards = {**WCS_CARDS, "CTYPE1": "DEC--TAN", "CTYPE2": "RA---TAN", "CRVAL1": 2.2, "CRVAL2": 150.1}
        position = read_one(write(path, *make_hdus(header=cards))).wcs.pixel_to_world(9.0, 8.0)
        # the reference pixel, counted from 0
        assert position.separation(SkyCoord(150.1, 2.2, unit="deg")).arcsec < 1e-9

    def test_without_wcs(self, path):
        assert read_one(write(path, *make_hdus(header={"OBJECT": "x"}))).wcs is None


class TestChannels:
    @pytest.mark.parametrize(
        "cards",
        [
            {"CHANNELS": "g, r,i"},
            {"CHANNEL1": "g", "CHANNEL2": "r", "CHANNEL3": "i"},
            {"FILTER": "g,r,i"},
            {"BAND": "g,r,i"},
            {"CHANNELS": "g,r,i", "FILTER": "z"},
        ],
    )
    def test_from_the_header(self, path, cards):
        assert read_one(write(path, *make_hdus(header=cards))).channels == ("g", "r", "i")

    @pytest.mark.parametrize("key", ["FILTER", "BAND", "CHANNELS", "CHANNEL1"])
    def test_single_plane(self, path, key):
        hdus = make_hdus(data=DATA[0], weights=WEIGHTS[0], header={key: "F814W"})
        assert read_one(write(path, *hdus)).channels == ("F814W",)

    def test_from_a_table(self, path):
        bands = Table({"number": [1, 2, 3], "Channel": ["g", "r", "i"]})
        table = fits.BinTableHDU(bands, name="CAM_CHANNELS")
        assert read_one(write(path, *make_hdus(), table)).channels == ("g", "r", "i")
        bands["epoch"] = [1, 1, 2]
        table = fits.BinTableHDU(bands, name="CAM_CHANNELS")
        assert read_one(write(path, *make_hdus(), table)).channels == (("g", 1), ("r", 1), ("i", 2))
        table = fits.BinTableHDU(Table({"name": ["u", "v", "w"]}), name="CAM_CHANNELS")
        assert read_one(write(path, *make_hdus(), table)).channels == ("u", "v", "w")

    def test_of_well_known_images(self, path):
        five = np.concatenate([DATA, DATA[:2]])
        hsc = make_hdus("HSC", data=five, weights=np.ones_like(five))
        write(path, *hsc, *make_hdus("HST", data=DATA[0], weights=WEIGHTS[0]))
        assert [obs.channels for obs in read_observations(path)] == [("g", "r", "i", "z", "y"), ("F814W",)]

    def test_wrong_number(self, path):
        write(path, *make_hdus(header={"CHANNELS": "g,r"}))
        message = r"field\.fits: CAM: its data have 3 plane\(s\); the file names 2 channel\(s\): \['g', 'r'\]"
        with pytest.raises(ValueError, match=message):
            read_observations(path)

    def test_repeated(self, path):
        write(path, *make_hdus(header={"CHANNELS": "g,r,g"}))
        with pytest.raises(ValueError, match=r"field\.fits: CAM: Channel names must be distinct"):
            read_observations(path)


def nanojansky(zeropoint):
    return 10 ** (-0.4 * (np.asarray(zeropoint) - 31.4))


class TestUnits:
    @pytest.mark.parametrize("key", ["MAGZERO", "PHOTZP", "ZEROPT", "ZP", "MAGZPT"])
    def test_zeropoint_from_the_header(self, path, key):
        observation = read_one(write(path, *make_hdus(header={key: 27.0, "BUNIT": "Jy"})))
        np.testing.assert_allclose(observation.nanojansky, nanojansky([27.0] * 3), rtol=1e-14)
        assert observation.flux_unit == "nJy"

    def test_zeropoint_of_each_plane(self, path):
        cards = {"MAGZERO1": 27.0, "MAGZERO2": 26, "MAGZERO3": 25.5}
        observation = read_one(write(path, *make_hdus(header=cards)))
        np.testing.assert_allclose(observation.nanojansky, nanojansky([27.0, 26.0, 25.5]), rtol=1e-14)

    def test_zeropoint_in_the_primary_header(self, path):
        observation = read_one(write(path, *make_hdus("HST"), ZP_HST=25.94))
        np.testing.assert_allclose(observation.nanojansky, nanojansky(25.94), rtol=1e-14)

    def test_zeropoint_from_photflam(self, path):
        # ACS/WFC F814W: 25.95 AB (ACS Zeropoints Calculator, 2004)
        cards = {"PHOTFLAM": 7.0724e-20, "PHOTPLAM": 8045.0}
        observation = read_one(write(path, *make_hdus(header=cards)))
        np.testing.assert_allclose(-2.5 * np.log10(observation.nanojansky) + 31.4, 25.94, atol=0.02)
        flux = (cards["PHOTFLAM"] * u.erg / u.s / u.cm**2 / u.AA).to(
            u.nJy, u.spectral_density(cards["PHOTPLAM"] * u.AA)
        )
        # 48.6 stands for 3631 Jy, here and in 31.4 for 1 nJy, to a thousandth
        np.testing.assert_allclose(observation.nanojansky, flux.value, rtol=1e-3)

    def test_given_zeropoints_come_first(self, path):
        write(path, *make_hdus("A", header={"MAGZERO": 20.0}), *make_hdus("B", header={"MAGZERO": 21.0}))
        first, second = read_observations(path, zeropoints={"A": [27.0, 26.0, 25.0]})
        np.testing.assert_allclose(first.nanojansky, nanojansky([27.0, 26.0, 25.0]), rtol=1e-14)
        np.testing.assert_allclose(second.nanojansky, nanojansky(21.0), rtol=1e-14)
        with pytest.raises(ValueError, match=r"no observation is named 'HST'; it holds \['A', 'B'\]"):
            read_observations(path, zeropoints={"HST": 25.94})

    @pytest.mark.parametrize(
        ("unit", "factor"), [("nJy", 1.0), ("uJy", 1e3), ("Jy/pixel", 1e9), ("nanomaggy", nanojansky(22.5))]
    )
    def test_bunit(self, path, unit, factor):
        observation = read_one(write(path, *make_hdus(header={"BUNIT": unit})))
        np.testing.assert_allclose(observation.data, DATA.astype(float) * factor, rtol=1e-12)
        assert observation.flux_unit == "nJy"

    @pytest.mark.parametrize("unit", ["ELECTRONS/S", "counts", "MJy/sr", "", "no unit at all"])
    def test_other_bunit(self, path, unit):
        assert read_one(write(path, *make_hdus(header={"BUNIT": unit}))).flux_unit == "data units"

    def test_not_a_number(self, path):
        write(path, *make_hdus(header={"MAGZERO": "unknown"}))
        with pytest.raises(
            ValueError, match=r"field\.fits: CAM: expected a number in header keyword MAGZERO; got 'unknown'"
        ):
            read_observations(path)


class TestPSF:
    @pytest.mark.parametrize("size", [(10, 10), (11, 10), (12, 11)])
    def test_even_stamps_are_recentred(self, path, size):
        center = (5.0, 4.75)
        psf = gaussian(size, center, sigma=3.0)
        # The parabola finds a peak between samples to a few hundredths at this width.
        np.testing.assert_allclose(read_one(write(path, *make_hdus(psf=psf))).psf.center[0], center, atol=0.02)

    def test_off_centre_stamps_are_recentred(self, path):
        psf = gaussian((11, 11), (7.0, 3.0))
        center = read_one(write(path, *make_hdus(psf=psf))).psf.center[0]
        np.testing.assert_allclose(center, (7.0, 3.0), atol=1e-6)

    def test_centred_stamps_stay(self, path):
        psf = gaussian((11, 11), (5.1, 4.8))
        np.testing.assert_array_equal(read_one(write(path, *make_hdus(psf=psf))).psf.center[0], (5.0, 5.0))

    def test_one_per_channel(self, path):
        psf = np.stack([gaussian((11, 11), (5, 5), sigma) for sigma in (1.0, 1.5, 2.0)])
        assert read_one(write(path, *make_hdus(psf=psf))).psf.num_channels == 3

    def test_oversampling(self, path):
        observation = read_one(write(path, *make_hdus(psf=gaussian((21, 21), (10, 10)), psf_header={"OVERSAMP": 3})))
        assert observation.psf.oversampling == 3

    @pytest.mark.parametrize(
        ("psf", "message"),
        [
            (gaussian((31, 31), (15, 15)), "more than the data of 18 x 20 pixels"),
            (np.full((11, 11), np.nan), "must be finite"),
            (-PSF, "positive sum"),
            (np.stack([PSF] * 2), "the PSF has 2 channels, the data 3"),
            (PSF[0], r"expected shape \(y, x\) or \(channel, y, x\) in HDU CAM_PSF; got \(11,\)"),
        ],
    )
    def test_bad_stamps(self, path, psf, message):
        write(path, *make_hdus(psf=psf))
        with pytest.raises(ValueError, match=rf"field\.fits: .*{message}"):
            read_observations(path)


class TestBadFiles:
    def test_missing(self, path):
        with pytest.raises(FileNotFoundError, match=r"field\.fits: expected a file; there is no such file"):
            read_observations(path)
        with pytest.raises(FileNotFoundError, match="there is a folder"):
            read_observations(path.parent)

    @pytest.mark.parametrize("content", [b"", b"hello, world", b"\x89PNG\r\n"])
    def test_not_fits(self, path, content):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"field\.fits: expected a FITS file, .* this one starts with b'"):
            read_observations(path)

    @pytest.mark.parametrize("kind", ["OBS", "WEIGHTS", "PSF"])
    def test_missing_hdu(self, path, kind):
        write(path, *make_hdus("ZED"), *(hdu for hdu in make_hdus() if hdu.name != f"CAM_{kind}"))
        left = ", ".join(f"'CAM_{other}'" for other in ("OBS", "WEIGHTS", "PSF") if other != kind)
        message = rf"field\.fits: expected an image HDU CAM_{kind}; found HDUs \['PRIMARY', 'ZED_OBS', .*, {left}\]"
        with pytest.raises(ValueError, match=message):
            read_observations(path)

    @pytest.mark.parametrize("kind", ["OBS", "WEIGHTS", "PSF"])
    def test_an_hdu_twice(self, path, kind):
        write(path, *make_hdus(), *(hdu for hdu in make_hdus("cam") if hdu.name == f"CAM_{kind}"))
        message = rf"field\.fits: expected one HDU CAM_{kind}; found HDUs \['PRIMARY', 'CAM_OBS'"
        with pytest.raises(ValueError, match=message):
            read_observations(path)

    def test_wcs_that_makes_no_sense(self, path):
        write(path, *make_hdus(header={**WCS_CARDS, "CTYPE1": "FOO--TAN"}))
        message = r"field\.fits: CAM: The WCS can't be understood: Unrecognized celestial type"
        with pytest.raises(ValueError, match=message):
            read_observations(path)

    def test_no_observation(self, path):
        write(path, fits.ImageHDU(DATA, name="SCI"))
        message = r"field\.fits: expected image HDUs NAME_OBS, .*; found HDUs \['PRIMARY', 'SCI'\]"
        with pytest.raises(ValueError, match=message):
            read_observations(path)

    def test_table_instead_of_image(self, path):
        table = fits.BinTableHDU(Table({"a": [1, 2]}), name="CAM_WEIGHTS")
        write(path, *make_hdus(weights=None), table)
        with pytest.raises(ValueError, match=r"field\.fits: expected an image in HDU CAM_WEIGHTS; it holds a table"):
            read_observations(path)

    def test_no_data(self, path):
        write(path, *make_hdus(weights=None), fits.ImageHDU(name="CAM_WEIGHTS"))
        with pytest.raises(ValueError, match=r"field\.fits: expected an image in HDU CAM_WEIGHTS; it holds no data"):
            read_observations(path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"weights": WEIGHTS[:, :-1]},
                r"weights of shape \(3, 17, 20\) doesn't match data of shape \(3, 18, 20\)",
            ),
            ({"weights": -WEIGHTS}, "Weights .* must be finite and >= 0; got 1080 negative"),
            ({"weights": WEIGHTS * np.nan}, "got 1080 NaN"),
            ({"data": DATA * np.nan}, "no pixel has a positive weight, finite data"),
        ],
    )
    def test_bad_arrays(self, path, changes, message):
        write(path, *make_hdus(**changes))
        with pytest.raises(ValueError, match=rf"field\.fits: .*{message}"):
            read_observations(path)

    def test_mask_of_another_shape(self, path):
        write(path, *make_hdus(), fits.ImageHDU(np.zeros((4, 4)), name="CAM_MASK"))
        with pytest.raises(ValueError, match=r"field\.fits: CAM: mask of shape \(4, 4\) doesn't match"):
            read_observations(path)

    def test_truncated_anywhere(self, path):
        content = write(path, *make_hdus()).read_bytes()
        # Headers and data of all HDUs; the last 2880 bytes hold padding, which nobody misses.
        for size in [*range(1000, len(content) - 2880, 1700), 2880]:
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match=r"field\.fits: .*(cut short|image HDU)"):
                read_observations(path)

    def test_truncated_padding_is_harmless(self, path):
        content = write(path, *make_hdus()).read_bytes()
        path.write_bytes(content.rstrip(b"\0"))
        np.testing.assert_array_equal(read_one(path).data, DATA)

    @pytest.mark.parametrize("fraction", [0.001, 0.3, 0.9, 0.999])
    def test_truncated_gzip(self, tmp_path, fraction):
        path = write(tmp_path / "field.fits.gz", *make_hdus())
        content = path.read_bytes()
        path.write_bytes(content[: int(fraction * len(content))])
        with pytest.raises(ValueError, match=r"field\.fits\.gz: the gzipped file is cut short or damaged"):
            read_observations(path)

    def test_damaged_gzip(self, tmp_path):
        path = write(tmp_path / "field.fits.gz", *make_hdus())
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"field\.fits\.gz: the gzipped file is cut short or damaged"):
            read_observations(path)

    def test_cut_short_before_it_was_gzipped(self, path):
        content = write(path, *make_hdus()).read_bytes()
        path.write_bytes(gzip.compress(content[: content.index(b"CAM_PSF") - 3000]))
        with pytest.raises(ValueError, match=r"field\.fits: the file is cut short: HDU CAM_WEIGHTS ends at byte"):
            read_observations(path)


class TestCatalog:
    ra, dec = np.array([150.1, 150.2, 150.3]), np.array([2.1, 2.2, -2.3])

    def check(self, positions, frame="icrs"):
        assert positions.frame.name == frame
        np.testing.assert_allclose(positions.ra.deg, self.ra, rtol=1e-14)
        np.testing.assert_allclose(positions.dec.deg, self.dec, rtol=1e-14)

    @pytest.mark.parametrize(
        "names",
        [
            *[("RA", "DEC"), ("ra", "dec"), ("Ra", "Dec"), ("ra_deg", "dec_deg"), ("RAJ2000", "DEJ2000")],
            *[("ALPHA_J2000", "DELTA_J2000"), ("RA_ICRS", "DE_ICRS"), ("_RAJ2000", "_DEJ2000")],
            *[("alpha_j2000", "delta_j2000"), ("ra_icrs", "dec_icrs"), ("RAdeg", "DEdeg"), ("X_WORLD", "Y_WORLD")],
        ],
    )
    def test_column_names(self, names):
        table = Table([[1, 2, 3], self.ra, self.dec], names=["id", *names])
        positions, rows = read_catalog(table)
        self.check(positions)
        assert rows is table

    def test_units(self):
        self.check(read_catalog(Table({"ra": (self.ra * u.deg).to(u.hourangle), "dec": self.dec * u.deg}))[0])
        self.check(read_catalog(QTable({"ra": (self.ra * u.deg).to(u.rad), "dec": self.dec * u.deg}))[0])

    @pytest.mark.parametrize("system", ["icrs", "galactic"])
    def test_a_column_of_sky_coordinates(self, tmp_path, system):
        sky = SkyCoord(self.ra, self.dec, unit="deg")
        path = tmp_path / "catalog.ecsv"
        QTable({"id": [1, 2, 3], "sky_centroid": sky.transform_to(system)}).write(path)
        # 1e-9 arcsec: rounding of degrees, there and back.
        assert read_catalog(path)[0].icrs.separation(sky).arcsec.max() < 1e-9
        with pytest.raises(ValueError, match=r"needs columns RA and DEC \(deg\); found \['first', 'second'\]"):
            read_catalog(QTable({"first": sky, "second": sky}))
        with pytest.raises(ValueError, match=r"1 of 3 rows have none: 2"):
            read_catalog(QTable({"sky": SkyCoord([1, 2, np.nan], self.dec, unit="deg")}))

    @pytest.mark.parametrize("suffix", ["ecsv", "csv", "xml", "fits", "fits.gz", "txt"])
    def test_files(self, tmp_path, suffix):
        path = tmp_path / f"catalog.{suffix}"
        formats = {"ecsv": "ascii.ecsv", "csv": "ascii.csv", "xml": "votable", "txt": "ascii"}
        table = Table({"id": [1, 2, 3], "RA": self.ra, "DEC": self.dec})
        table.write(path, format=formats.get(suffix, "fits"))
        positions, rows = read_catalog(path)
        self.check(positions)
        assert list(rows["id"]) == [1, 2, 3]

    @pytest.mark.parametrize(
        ("cards", "frame"),
        [({"RADECSYS": "FK5", "EQUINOX": 2000.0}, "fk5"), ({"RADESYS": "ICRS"}, "icrs"), ({}, "icrs")],
    )
    def test_reference_system(self, path, cards, frame):
        table = fits.BinTableHDU(Table({"RA": self.ra, "DEC": self.dec}), name="CATALOG")
        table.header.update(cards)
        truth = fits.BinTableHDU(Table({"ra": [0.0], "dec": [0.0]}), name="TRUTH")
        write(path, *make_hdus(), truth, table)
        self.check(read_catalog(path)[0], frame)
        positions, _ = catalog_in(path)
        self.check(positions, frame)

    def test_unknown_reference_system(self):
        table = Table({"RA": self.ra, "DEC": self.dec}, meta={"RADESYS": "GALACTIC"})
        with pytest.raises(ValueError, match="needs RADESYS ICRS, FK5 or FK4; got 'GALACTIC'"):
            read_catalog(table)

    def test_no_catalog(self, path):
        write(path, *make_hdus())
        assert catalog_in(path) is None
        with pytest.raises(ValueError, match=r"expected a table HDU CATALOG, or one table; found HDUs \['PRIMARY'"):
            read_catalog(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            read_catalog(tmp_path / "none.csv")

    def test_missing_column(self):
        with pytest.raises(ValueError, match=r"needs columns RA and DEC \(deg\); found \['ra', 'y'\]"):
            read_catalog(Table({"ra": self.ra, "y": self.dec}))

    def test_missing_positions(self, tmp_path):
        path = tmp_path / "catalog.csv"
        path.write_text("ra,dec\n150.1,2.1\n,2.2\n150.3,nan\n150.4,91\n")
        with pytest.raises(ValueError, match=r"catalog\.csv: .* 3 of 4 rows have none: 1, 2, 3 \(counted from 0\)"):
            read_catalog(path)

    def test_sexagesimal_text(self):
        with pytest.raises(ValueError, match="needs angles as numbers in column ra"):
            read_catalog(Table({"ra": ["10:00:24"], "dec": ["02:12:00"]}))

    def test_wrong_unit(self):
        with pytest.raises(ValueError, match="needs angles as numbers in column ra"):
            read_catalog(Table({"ra": self.ra * u.m, "dec": self.dec}))

    @pytest.mark.parametrize("suffix", ["ecsv", "csv", "xml", "txt"])
    def test_unreadable(self, tmp_path, suffix):
        path = tmp_path / f"catalog.{suffix}"
        path.write_bytes(b"\x00\x01\x02\xff")
        with pytest.raises(ValueError, match=r"catalog\.\w+: "):
            read_catalog(path)


@pytest.fixture
def fitted(path):
    """Return a scene and observations of one field."""
    write(path, *make_hdus(header={**WCS_CARDS, "MAGZERO": 27.0, "CHANNELS": "g,r,i"}))
    observations = read_observations(path)
    frame = Frame.from_observations(observations)
    sources = {
        name: Source(position, [100.0, 200.0, 300.0], GaussianMorphology(1.5))
        for name, position in {"host": (8.0, 9.0), "Host2": (5.0, 12.0)}.items()
    }
    return Scene(frame, sources), observations


class TestWriteImages:
    def test_content(self, tmp_path, fitted):
        scene, observations = fitted
        write_images(tmp_path / "images.fits", scene, observations)
        (observation,) = observations
        with fits.open(tmp_path / "images.fits") as hdus:
            assert [hdu.name for hdu in hdus] == [
                "PRIMARY",
                "CAM_MODEL",
                "CAM_RESIDUAL",
                "SRC_HOST",
                "SRC_HOST2",
            ]
            model, residual = hdus["CAM_MODEL"], hdus["CAM_RESIDUAL"]
            # images are stored in float32
            np.testing.assert_allclose(model.data, observation.render(scene), rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(model.data + residual.data, observation.data, rtol=1e-4, atol=1e-5)
            assert model.header["CHANNELS"] == "g,r,i"
            assert model.header["BUNIT"] == "nJy"
            there, expected = WCS(model.header, naxis=2), observation.wcs
            assert there.pixel_to_world(3, 4).separation(expected.pixel_to_world(3, 4)).arcsec < 1e-9
            sources = [hdus["SRC_HOST"], hdus["SRC_HOST2"]]
            assert [hdu.header["SOURCE"] for hdu in sources] == ["host", "Host2"]
            np.testing.assert_allclose(sum(hdu.data for hdu in sources), scene.evaluate(), rtol=1e-5, atol=1e-5)
            assert WCS(sources[0].header, naxis=2).pixel_to_world(3, 4) is not None

    def test_large_scenes_are_cut_to_their_sources(self, tmp_path, fitted, monkeypatch):
        scene, observations = fitted
        monkeypatch.setattr(io, "MAX_SOURCE_BYTES", 100)
        small = scene.with_sources(host=Source((2.0, 3.0), [1.0, 2.0, 3.0], GaussianMorphology(0.3)))
        write_images(tmp_path / "images.fits", small, observations)
        whole = small.evaluate(["host"])
        with fits.open(tmp_path / "images.fits") as hdus:
            hdu = hdus["SRC_HOST"]
            y0, x0 = hdu.header["Y0"], hdu.header["X0"]
            height, width = hdu.data.shape[1:]
            assert height * width < whole[0].size
            # float32
            np.testing.assert_allclose(hdu.data, whole[:, y0 : y0 + height, x0 : x0 + width], rtol=1e-6)
            np.testing.assert_allclose(hdu.data.sum(), whole.sum(), rtol=1e-6)
            there = WCS(hdu.header, naxis=2).pixel_to_world(2, 3)
            assert there.separation(small.frame.to_sky((3 + y0, 2 + x0))).arcsec < 1e-9

    def test_odd_units_keep_their_range(self, tmp_path, path):
        write(path, *make_hdus(data=DATA.astype(float) * 1e-40, weights=WEIGHTS.astype(float) * 1e80))
        observations = read_observations(path)
        scene = Scene(Frame.from_observations(observations), {})
        write_images(tmp_path / "images.fits.gz", scene, observations)
        with fits.open(tmp_path / "images.fits.gz") as hdus:
            np.testing.assert_allclose(hdus["CAM_RESIDUAL"].data, observations[0].data, rtol=1e-12)
            assert "BUNIT" not in hdus["CAM_RESIDUAL"].header

    def test_written_whole_or_not_at_all(self, tmp_path, fitted, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError("No space left on device")

        monkeypatch.setattr(fits.HDUList, "writeto", fail)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(OSError, match="No space left"):
            write_images(tmp_path / "images.fits", *fitted)
        assert sorted(tmp_path.iterdir()) == before


def test_json_is_plain(tmp_path):
    content = {
        "a": np.float32(1.5),
        "b": np.arange(3),
        "c": {"x": np.nan, 2: np.inf},
        "d": (1, None, True, "s"),
    }
    write_json(tmp_path / "summary.json", content)
    expected = {"a": 1.5, "b": [0, 1, 2], "c": {"x": None, "2": None}, "d": [1, None, True, "s"]}
    assert json.loads((tmp_path / "summary.json").read_text()) == expected
    with pytest.raises(TypeError):
        write_json(tmp_path / "summary.json", {"a": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == expected


class TestPrepareOutput:
    def test_makes_folders(self, tmp_path):
        folder = prepare_output(tmp_path / "a" / "b")
        assert folder.is_dir()
        assert prepare_output(folder) == folder
        assert list(folder.iterdir()) == []

    def test_refuses_a_folder_with_files(self, tmp_path):
        (tmp_path / "old.txt").write_text("old")
        with pytest.raises(FileExistsError, match=r"expected a new or empty folder; it holds 1 file.*--overwrite"):
            prepare_output(tmp_path)
        assert prepare_output(tmp_path, overwrite=True) == tmp_path
        assert (tmp_path / "old.txt").read_text() == "old"

    @pytest.mark.parametrize("below", ["file", "file/run1"])
    def test_file_in_the_way(self, tmp_path, below):
        (tmp_path / "file").write_text("old")
        with pytest.raises(NotADirectoryError, match=r"expected a folder to write into; .*file is a file"):
            prepare_output(tmp_path / below, overwrite=True)

    @pytest.mark.parametrize("written", [False, True])
    def test_only_a_folder_made_for_nothing_goes_again(self, tmp_path, written):
        def work():
            with output_folder(tmp_path / "a" / "b") as folder:
                assert folder.is_dir()
                if written:
                    (folder / "catalog.ecsv").touch()
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            work()
        assert (tmp_path / "a" / "b" / "catalog.ecsv").exists() == written
        assert (tmp_path / "a").exists() == written

    def test_a_folder_that_was_there_stays(self, tmp_path):
        with output_folder(tmp_path):
            pass
        assert tmp_path.is_dir()

    @pytest.mark.parametrize("method", ["mkdir", "touch"])
    def test_no_permission(self, tmp_path, monkeypatch, method):
        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(f"pathlib.Path.{method}", refuse)
        with pytest.raises(PermissionError, match=r"run1: can't write into this folder: Permission denied"):
            prepare_output(tmp_path / "run1")
