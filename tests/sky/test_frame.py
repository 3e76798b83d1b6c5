import itertools

import astropy.units as u
import galsim
import numpy as np
import pytest
from astropy.coordinates import FK5, Galactic, SkyCoord
from astropy.io import fits
from astropy.wcs import WCS

from scenefit.sky.frame import Frame, as_wcs, check_channels, is_same_frame, pixel_map, pixel_scale_of
from scenefit.sky.psf import GaussianPSF, ImagePSF
from tests.helpers import CENTER_DEG, gaussian_image, make_observation, tangent_header, tangent_wcs, with_sip, with_tpv

SHAPE = (30, 40)
FLIPS = list(itertools.product((False, True), (False, True)))
HEADERS = {
    "CD": tangent_header(SHAPE, rotation_deg=23),
    "PC": tangent_header(SHAPE, rotation_deg=23, dialect="PC"),
    "CROTA": tangent_header(SHAPE, rotation_deg=23, dialect="CROTA"),
    **{f"flip {y:d}{x:d}": tangent_header(SHAPE, rotation_deg=40, flip=(y, x)) for y, x in FLIPS[1:]},
    "SIP": with_sip(tangent_header(SHAPE, rotation_deg=23)),
    "TPV": with_tpv(tangent_header(SHAPE, rotation_deg=23)),
}


@pytest.fixture(params=HEADERS)
def header(request):
    return HEADERS[request.param]


def frame_of(header, channels="g"):
    return Frame((header["NAXIS2"], header["NAXIS1"]), channels=channels, wcs=header)


def random_positions(rng, count=20):
    return rng.uniform(0, 1, (count, 2)) * np.array(SHAPE)


def separation_arcsec(first, second):
    return first.icrs.separation(second.icrs).to_value(u.arcsec)


# ---- positions


def test_positions_make_a_round_trip(header, rng):
    frame, position = frame_of(header), random_positions(rng)
    # 1e-5 pixels: the tolerance of astropy's iterative inversion of SIP is 1e-6 in each of few iterations.
    np.testing.assert_allclose(frame.to_pixel(frame.to_sky(position)), position, atol=1e-5)


def test_to_sky_agrees_with_galsim(header, rng):
    if "CROTA2" in header:
        pytest.skip("GalSim doesn't read CROTA2")
    position = random_positions(rng)
    sky = frame_of(header).to_sky(position)
    reader = galsim.GSFitsWCS(header=header)
    for (y, x), place in zip(position, sky, strict=True):
        expected = reader.toWorld(galsim.PositionD(x + 1, y + 1))
        expected = SkyCoord(expected.ra.deg * u.deg, expected.dec.deg * u.deg)
        # 1e-7 arcsec: 1e-6 of a pixel, what the rounding of degrees in float64 leaves.
        assert separation_arcsec(place, expected) < 1e-7


def test_to_pixel_agrees_with_astropy_on_bare_numbers(header, rng):
    sky = SkyCoord(CENTER_DEG[0] * u.deg, CENTER_DEG[1] * u.deg).directional_offset_by(
        rng.uniform(0, 360, 9) * u.deg, rng.uniform(0, 1, 9) * u.arcsec
    )
    expected = WCS(header).all_world2pix(sky.ra.deg, sky.dec.deg, 0)[::-1]
    # 1e-6 pixels: the tolerance of astropy's iterative inversion.
    np.testing.assert_allclose(frame_of(header).to_pixel(sky), np.stack(expected, axis=-1), atol=1e-6)


def test_dialects_of_one_geometry_agree(rng):
    position = random_positions(rng)
    first, *others = (frame_of(HEADERS[dialect]).to_sky(position) for dialect in ("CD", "PC", "CROTA"))
    for other in others:
        # 1e-9 arcsec: rounding of degrees in float64.
        assert separation_arcsec(first, other).max() < 1e-9


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes_are_kept(shape, rng):
    frame, position = frame_of(HEADERS["CD"]), rng.uniform(0, 30, (*shape, 2))
    assert frame.to_sky(position).shape == shape
    assert frame.to_pixel(frame.to_sky(position)).shape == (*shape, 2)
    np.testing.assert_array_equal(frame.to_pixel(position), position)


def test_coordinates_of_another_frame_are_transformed(rng):
    header = HEADERS["CD"].copy()
    header["RADESYS"], header["EQUINOX"] = "FK5", 1975.0
    frame, position = frame_of(header), random_positions(rng)
    sky = frame.to_sky(position)
    assert isinstance(sky.frame, FK5)
    assert sky.equinox.jyear == pytest.approx(1975.0)
    for other in ("icrs", "galactic"):
        # 1e-6 pixels: the transformations go there and back.
        np.testing.assert_allclose(frame.to_pixel(sky.transform_to(other)), position, atol=1e-6)


def test_pixel_map_between_fk5_and_icrs_takes_the_precession_out(rng):
    old = HEADERS["CD"].copy()
    old["RADESYS"], old["EQUINOX"] = "FK5", 1975.0
    center = SkyCoord(*CENTER_DEG, unit="deg").transform_to(FK5(equinox="J1975"))
    old["CRVAL1"], old["CRVAL2"] = center.ra.deg, center.dec.deg
    position = random_positions(rng)
    mapped = pixel_map(WCS(old), WCS(HEADERS["CD"]), *position.T)
    # The poles differ: the axes are turned by sin(ra) sin(precession in declination) = 0.07 degrees, about the centre.
    turned = (mapped - position)[:, ::-1] / (position - (np.array(SHAPE) - 1) / 2) * [1, -1]
    assert np.median(turned) == pytest.approx(np.median(turned[:, 0]), rel=1e-2)
    assert 1e-4 < abs(np.median(turned)) < 3e-3
    # 1e-6 pixels: rounding of degrees.
    np.testing.assert_allclose(pixel_map(WCS(HEADERS["CD"]), WCS(old), *mapped.T), position, atol=1e-6)


def test_positions_without_wcs_are_pixels():
    frame = Frame(SHAPE, channels="g")
    np.testing.assert_array_equal(frame.to_pixel((3, 4)), [3.0, 4.0])
    assert np.isnan(frame.pixel_scale)
    # A shift (east, north) is one of (x, y) there.
    np.testing.assert_array_equal(frame.sky_jacobian() @ [3.0, 4.0], [4.0, 3.0])
    with pytest.raises(ValueError, match=r"no WCS: positions must be \(y, x\) in pixels, not SkyCoord"):
        frame.to_pixel(SkyCoord(1, 2, unit="deg"))
    with pytest.raises(ValueError, match="no WCS: it knows pixel positions only"):
        frame.to_sky((3, 4))


def test_a_position_has_two_coordinates():
    with pytest.raises(ValueError, match=r"a SkyCoord or \(y, x\) in pixels; got an array of \(3,\)"):
        Frame(SHAPE, channels="g").to_pixel([1, 2, 3])


def test_positions_are_taken_in_many_forms():
    frame = frame_of(HEADERS["CD"])
    places = [frame.to_sky((3.0, 4.0)), frame.to_sky((5.0, 6.0)).galactic]
    # 1e-6 pixels: rounding of degrees.
    np.testing.assert_allclose(frame.to_pixel([place.icrs for place in places]), [[3, 4], [5, 6]], atol=1e-6)
    np.testing.assert_array_equal(frame.to_pixel([3, 4] * u.pix), [3, 4])
    assert separation_arcsec(frame.to_sky([3, 4] * u.pix), places[0]) < 1e-9
    with pytest.raises(ValueError, match="A position that isn't a SkyCoord must be in pix"):
        frame.to_pixel([150.3, 2.05] * u.deg)


# ---- scale and directions


def test_sky_jacobian_is_the_finite_offset(header):
    frame = frame_of(header)
    jacobian, center = frame.sky_jacobian(), frame.to_sky(frame.center)
    for east, north in ((0.1, 0.0), (0.0, -0.1), (0.08, 0.03)):
        moved = frame.to_pixel(center.spherical_offsets_by(east * u.arcsec, north * u.arcsec))
        # 2e-3 of a pixel: what the distortions bend within one pixel of the centre.
        np.testing.assert_allclose(moved - frame.center, jacobian @ [east, north], atol=2e-3)


def test_sky_jacobian_is_exact_without_distortion():
    jacobian = frame_of(tangent_header(SHAPE, 0.1, rotation_deg=0)).sky_jacobian()
    # 1e-6: curvature of the sky within an arcsec and rounding; 10 pixels an arcsec, x points west.
    np.testing.assert_allclose(jacobian, [[0, 10], [-10, 0]], atol=1e-6)


def test_east_and_north_are_those_of_icrs_in_any_wcs():
    center = SkyCoord(*CENTER_DEG, unit="deg").galactic
    header = tangent_header(SHAPE, center_deg=(center.l.deg, center.b.deg))
    header["CTYPE1"], header["CTYPE2"] = "GLON-TAN", "GLAT-TAN"
    del header["RADESYS"]
    frame = frame_of(header)
    assert isinstance(frame.to_sky((0.0, 0.0)).frame, Galactic)
    moved = frame.to_pixel(frame.to_sky(frame.center).icrs.spherical_offsets_by(1 * u.arcsec, 0 * u.arcsec))
    # 1e-5 pixels: curvature of the sky and rounding of degrees.
    np.testing.assert_allclose(frame.sky_jacobian()[:, 0], moved - frame.center, atol=1e-5)


def test_pixel_scale_is_the_square_root_of_the_area():
    header = tangent_header(SHAPE, 0.1)
    header["CD1_1"] *= 4
    # 1e-9: rounding.
    assert frame_of(header).pixel_scale == pytest.approx(0.2, rel=1e-9)


# ---- construction


def test_shape_and_channels():
    frame = Frame((5, 7), channels=["g", ("r", 1), ["r", 2]])
    assert frame.shape == (3, 5, 7)
    assert frame.channels == ("g", ("r", 1), ("r", 2))
    assert frame.center == (2.0, 3.0)
    assert frame.channel_index([("r", 2), "g"]) == (2, 0)
    with pytest.raises(ValueError, match=r"has channels \['g', .*not \['z'\]"):
        frame.channel_index(["g", "z"])


def test_fft_shape_has_room_for_the_padding():
    frame = Frame((50, 61), channels="g", padding=20)
    assert all(f >= n + 20 for f, n in zip(frame.fft_shape, frame.box.shape, strict=True))


def test_frames_that_differ_by_a_few_pixels_share_a_canvas():
    frames = [Frame(shape, channels="g", padding=padding) for shape in ((100, 100), (101, 102)) for padding in (21, 24)]
    # 125 would be a fast length, too, as slow as 128.
    assert {frame.fft_shape for frame in frames} == {(128, 128)}


@pytest.mark.parametrize("channels", [["g", "r", "g"], [("g", 1), ["g", 1]]])
def test_repeated_channels_are_refused(channels):
    with pytest.raises(ValueError, match=r"must be distinct.*repeat\(s\)\. Epochs of one band are named"):
        check_channels(channels)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("channels", [None, 2, [1, 2], ("i", 1), [("i", 1, 2)], [(1, "i")], [""], {"g": 1}])
def test_channels_are_names_or_pairs(channels):
    with pytest.raises(TypeError, match=r"each a string or \(band, epoch\), such as .*; got"):
        check_channels(channels)


def test_no_channel_is_refused():
    with pytest.raises(ValueError, match=r"at least one; got \[\]"):
        check_channels([])


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("shape", [(0, 5), (5, -1), 5, (1, 5, 5), (5.5, 5)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape \(height, width\) of at least one pixel each; got"):
        Frame(shape, channels="g")


def test_one_model_psf_serves_all_channels():
    with pytest.raises(ValueError, match="one model PSF for all channels; got one of 2 channels"):
        Frame(SHAPE, channels=["g", "r"], psf=GaussianPSF([0.7, 0.8]))


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    "psf", [gaussian_image((9, 9), (4, 4), 1.0), ImagePSF(np.ones((3, 3))), GaussianPSF(0.7, integrate_pixel=True), 0.7]
)
def test_the_model_psf_is_a_gaussian(psf):
    with pytest.raises(TypeError, match=r"GaussianPSF\(sigma\) in model pixels without integrate_pixel; got"):
        Frame(SHAPE, channels="g", psf=psf)


def test_a_model_psf_much_wider_than_a_pixel_is_refused():
    assert Frame(SHAPE, channels="g", psf=GaussianPSF(5.0)).psf.effective_sigma == [5.0]
    with pytest.raises(
        ValueError, match=r"at most 5 pixels standard deviation.*got 5\.1\. Make the model's pixels larger"
    ):
        Frame(SHAPE, channels="g", psf=GaussianPSF(5.1))


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match="padding of at least 0 pixels; got -3"):
        Frame(SHAPE, channels="g", padding=-3)


@pytest.mark.parametrize("margin", [-1, 11])
def test_margins_the_padding_has_no_room_for(margin):
    with pytest.raises(ValueError, match=f"a margin of 0 pixels to half the padding of 20; got {margin}"):
        Frame(SHAPE, channels="g", padding=20, margin=margin)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("wcs", ["image.fits", {"CTYPE1": "RA---TAN"}])
def test_what_is_no_wcs(wcs):
    with pytest.raises(TypeError, match=r"an astropy\.wcs\.WCS or a FITS header; got a (str|dict)"):
        as_wcs(wcs)


@pytest.mark.parametrize(
    ("cards", "reason"),
    [({"CTYPE1": "FOO--TAN"}, "Unrecognized celestial type"), ({"CD1_1": 0.0, "CD1_2": 0.0}, "matrix is singular")],
)
def test_a_wcs_that_makes_no_sense(cards, reason):
    header = HEADERS["CD"].copy()
    header.update(cards)
    with pytest.raises(ValueError, match=f"^The WCS can't be understood: .*{reason}"):
        as_wcs(header)


def same_frame_as(changes):
    """Return the frame of a header again, with some changes."""
    options = {"wcs": tangent_header(SHAPE), "channels": "g", "padding": 5, "psf": GaussianPSF(0.7), **changes}
    return Frame(options.pop("shape", SHAPE), **options)


def test_the_same_frame_built_twice():
    first, second = same_frame_as({}), same_frame_as({})
    assert is_same_frame(first, first)
    assert is_same_frame(first, second)
    assert is_same_frame(same_frame_as({"wcs": None}), same_frame_as({"wcs": None}))
    distorted = as_wcs(HEADERS["SIP"])
    assert is_same_frame(same_frame_as({"wcs": distorted}), same_frame_as({"wcs": distorted}))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (31, 40)},
        {"channels": "r"},
        {"padding": 6},
        {"margin": 1},
        {"psf": GaussianPSF(0.8)},
        {"wcs": None},
        {"wcs": tangent_header(SHAPE, offset=(0.1, 0.0))},
        {"wcs": tangent_header(SHAPE, rotation_deg=1)},
        {"wcs": HEADERS["SIP"]},
    ],
    ids=str,
)
def test_frames_that_differ(changes):
    assert not is_same_frame(same_frame_as({}), same_frame_as(changes))


def test_wcs_must_be_celestial():
    with pytest.raises(ValueError, match="two celestial axes; got axis types"):
        as_wcs(WCS(naxis=2))


@pytest.mark.parametrize("sip", [False, True])
def test_only_the_celestial_axes_of_a_cube_count(sip):
    header = tangent_header(SHAPE)
    cube = (with_sip(header) if sip else header).copy()
    cube["NAXIS"], cube["NAXIS3"], cube["WCSAXES"] = 3, 5, 3
    cube["CTYPE3"], cube["CRVAL3"], cube["CRPIX3"], cube["CD3_3"] = "WAVE", 5e-7, 1.0, 1e-7
    wcs = as_wcs(cube)
    assert wcs.naxis == 2
    assert (wcs.sip is not None) == sip
    expected = WCS(with_sip(header) if sip else header).pixel_to_world(3.0, 5.0)
    # 1e-9 arcsec: rounding.
    assert separation_arcsec(wcs.pixel_to_world(3.0, 5.0), expected) < 1e-9


# ---- from_observations


def corners(obs, edge=0.0):
    """Positions (y, x) of an observation's corner pixels, or of their outer corners with edge=0.5."""
    height, width = obs.shape[1:]
    return np.array(list(itertools.product((-edge, height - 1 + edge), (-edge, width - 1 + edge))))


def on_frame(frame, obs, position):
    return pixel_map(obs.wcs, frame.wcs, *position.T)


def is_inside(frame, position):
    # 2e-3 pixels: the positions may be rounded by 1e-3 at the edge.
    return (position > -0.5 - 2e-3).all(axis=-1) & (position < np.array(frame.box.shape) - 0.5 + 2e-3).all(axis=-1)


@pytest.fixture
def pair():
    """Fine pixels, turned; coarse ones, wider on the sky and out of step."""
    fine = make_observation((60, 50), scale_arcsec=0.03, channels=("F814W",), rotation_deg=23, name="fine")
    coarse = make_observation((14, 16), scale_arcsec=0.168, channels=("g", "r"), offset=(0.3, -0.2), name="coarse")
    return fine, coarse


def test_union_covers_every_pixel(pair):
    frame = Frame.from_observations(pair, "union")
    for obs in pair:
        assert is_inside(frame, on_frame(frame, obs, corners(obs))).all()
    assert not is_inside(frame, on_frame(frame, pair[1], corners(pair[1], edge=1.0))).any()


def test_union_of_dithers_covers_both():
    dithers = [make_observation((9, 9), offset=offset) for offset in ((0.0, 0.0), (0.4, -0.4))]
    frame = Frame.from_observations(dithers)
    assert frame.box.shape == (10, 10)
    assert all(is_inside(frame, on_frame(frame, obs, corners(obs))).all() for obs in dithers)
    assert Frame.from_observations(dithers, "intersection").box.shape == (8, 8)


def test_frame_continues_the_finest_pixels(pair):
    for coverage in ("union", "intersection"):
        frame = Frame.from_observations(pair, coverage)
        # 1e-9: rounding.
        assert frame.pixel_scale == pytest.approx(0.03, rel=1e-9)
        position = on_frame(frame, pair[0], corners(pair[0]))
        # 1e-6 pixels: rounding of degrees.
        np.testing.assert_allclose(position, position.round(), atol=1e-6)
        np.testing.assert_allclose(position[3] - position[0], [59, 49], atol=1e-6)


def test_intersection_is_what_all_see(pair):
    fine, coarse = pair
    frame = Frame.from_observations([fine, coarse], "intersection")
    # The coarse image is wider: what both see is the fine image.
    assert frame.box.shape == fine.shape[1:]
    small = make_observation((6, 5), scale_arcsec=0.06, rotation_deg=23, channels=("i",), name="small")
    frame = Frame.from_observations([fine, coarse, small], "intersection")
    # Twice the pixels, parallel axes: 12 x 10 fine pixels lie within the outer edges.
    assert frame.box.shape == (12, 10)
    assert is_inside(frame, on_frame(frame, small, corners(small, edge=0.25))).all()


@pytest.mark.parametrize("ratio", [1, 2, 5])
def test_frame_reaches_the_outer_edges_of_coarse_pixels(ratio):
    fine = make_observation((4, 4), scale_arcsec=0.1, name="fine")
    coarse = make_observation((10, 12), scale_arcsec=0.1 * ratio, channels=("r",), name="coarse")
    assert Frame.from_observations([fine, coarse]).box.shape == (10 * ratio, 12 * ratio)


def test_channels_are_the_ordered_union():
    names = [("g", "r"), ("i", "r"), (("g", 2), "g")]
    observations = [make_observation(channels=channels, name=str(channels)) for channels in names]
    assert Frame.from_observations(observations).channels == ("g", "r", "i", ("g", 2))


def test_padding_holds_the_widest_psf(pair):
    fine, coarse = pair
    expected = int(np.ceil(max(fine.psf.extent, coarse.psf.extent * 0.168 / 0.03)))
    frame = Frame.from_observations(pair)
    # With room for the light in the margin, 1.25 widths of the PSF and up to a half more: one of few numbers.
    width = max(fine.psf.effective_sigma.max(), coarse.psf.effective_sigma.max() * 0.168 / 0.03)
    assert 1.25 * width <= frame.margin < 1.5 * np.ceil(1.25 * width)
    assert frame.margin in (4, 6, 8, 12, 16, 24, 32)
    assert frame.padding == expected + frame.margin
    assert frame.outer_box == frame.box.grow(frame.margin)
    assert all(n >= m for n, m in zip(frame.fft_shape, frame.outer_box.shape, strict=True))


def test_narrow_psf_subdivides_the_pixels():
    obs = make_observation((10, 12), psf=GaussianPSF(0.5))
    frame = Frame.from_observations([obs])
    assert frame.box.shape == (20, 24)
    # 1e-9: rounding.
    assert frame.pixel_scale == pytest.approx(0.05, rel=1e-9)
    # The corner pixels' centres lie in the middle of 2 x 2 model pixels; 1e-6: rounding of degrees.
    np.testing.assert_allclose(on_frame(frame, obs, corners(obs))[0], [0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize("dialect", ["CD", "PC", "CROTA"])
@pytest.mark.parametrize("scale", [0.05, 0.05 * u.arcsec, 50 * u.mas])
def test_pixel_scale_can_be_chosen(dialect, scale):
    wcs = tangent_wcs((10, 12), 0.1, rotation_deg=30, dialect=dialect)
    obs = make_observation((10, 12), wcs=wcs)
    frame = Frame.from_observations([obs], pixel_scale=scale)
    assert frame.pixel_scale == pytest.approx(0.05, rel=1e-9)
    assert frame.box.shape == (20, 24)
    np.testing.assert_allclose(on_frame(frame, obs, corners(obs))[0], [0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize("distort", [with_sip, with_tpv])
def test_distorted_reference_gives_an_undistorted_frame(distort, rng):
    header = distort(tangent_header(SHAPE, 0.1, rotation_deg=23, flip=(True, False), offset=(3.0, -2.0)))
    obs = make_observation(SHAPE, wcs=WCS(header))
    frame = Frame.from_observations([obs])
    assert not frame.wcs.has_distortion
    assert [ctype[5:] for ctype in frame.wcs.wcs.ctype] == ["TAN", "TAN"]
    assert is_inside(frame, on_frame(frame, obs, corners(obs))).all()
    # At the centre the grids agree in scale and direction; 1e-3: the distortion within a pixel.
    middle = (np.array(SHAPE) - 1) / 2
    steps = on_frame(frame, obs, middle + np.array([[0, 0], [1, 0], [0, 1]]))
    np.testing.assert_allclose(steps[1:] - steps[0], np.eye(2), atol=1e-3)


def test_without_wcs_all_lie_on_one_grid():
    observations = [make_observation(shape, wcs=None, name=str(shape)) for shape in ((10, 8), (7, 12))]
    assert Frame.from_observations(observations, "union").box.shape == (10, 12)
    assert Frame.from_observations(observations, "intersection").box.shape == (7, 8)


def test_observations_may_come_one_by_one(pair):
    assert Frame.from_observations(obs for obs in pair).shape == Frame.from_observations(pair).shape


@pytest.mark.parametrize("observations", [3, [None], "field.fits"])
def test_what_is_no_observation(observations):
    with pytest.raises(TypeError, match="A frame is made from Observations; got"):
        Frame.from_observations(observations)


@pytest.mark.parametrize("scale", [0.0, -0.1, np.nan, np.inf, [0.1, 0.1]])
def test_bad_pixel_scales_are_refused(scale):
    with pytest.raises(ValueError, match=r"pixel_scale must be a positive angle .*; got"):
        Frame.from_observations([make_observation()], pixel_scale=scale)


def test_a_pixel_scale_is_an_angle():
    with pytest.raises(ValueError, match="pixel_scale must be in arcsec or a unit that converts to it"):
        Frame.from_observations([make_observation()], pixel_scale=1 * u.m)


def test_a_pixel_scale_needs_a_wcs():
    with pytest.raises(ValueError, match="pixel_scale= needs observations with a WCS"):
        Frame.from_observations([make_observation(wcs=None)], pixel_scale=0.1)


def test_a_union_with_a_gap_is_warned_of():
    away = make_observation(name="away", center_deg=(150.31, 2.05), channels=("r",))
    with pytest.warns(UserWarning, match=r"away covers .* around \(150\.31.*overlaps no other observation") as caught:
        frame = Frame.from_observations([make_observation(), make_observation(name="same"), away])
    assert len(caught) == 1
    assert frame.box.shape[1] > 300


def test_a_single_observation_needs_no_list():
    assert Frame.from_observations(make_observation((9, 11))).box.shape == (9, 11)


def test_the_wcs_of_the_observations_is_left_alone(pair):
    before = [obs.wcs.to_header_string() for obs in pair]
    Frame.from_observations(pair, pixel_scale=0.02)
    assert [obs.wcs.to_header_string() for obs in pair] == before


def test_no_observation_is_refused():
    with pytest.raises(ValueError, match="at least one observation; got none"):
        Frame.from_observations([])


def test_unknown_coverage_is_refused():
    with pytest.raises(ValueError, match="coverage is 'union' or 'intersection'; got 'both'"):
        Frame.from_observations([make_observation()], "both")


def test_wcs_on_one_but_not_the_other_is_refused():
    observations = [make_observation(name="A"), make_observation(name="B", wcs=None)]
    with pytest.raises(ValueError, match=r"all observations have a WCS or none; \['A'\] have one, \['B'\] don't"):
        Frame.from_observations(observations)


def test_an_empty_intersection_says_where_they_are():
    away = make_observation(name="away", center_deg=(150.31, 2.05))
    with pytest.raises(ValueError, match=r"don't overlap.*obs covers 1.2 x 1.4 arcsec .*away covers .*150.31"):
        Frame.from_observations([make_observation(), away], "intersection")


def test_the_other_side_of_the_sky_is_refused():
    away = make_observation(name="away", center_deg=(330.3, -2.05))
    with pytest.raises(ValueError, match="'away' have no place on the model frame"):
        Frame.from_observations([make_observation(scale_arcsec=0.05), away])


def test_the_real_pair_is_covered(scenefit_data):
    with fits.open(scenefit_data / "cosmos_hst_hsc.fits") as hdus:
        observations = [
            make_observation(
                hdus[f"{name}_OBS"].data.shape[-2:], wcs=WCS(hdus[f"{name}_OBS"].header, naxis=2), name=name
            )
            for name in ("HST", "HSC")
        ]
        catalog = SkyCoord(hdus["CATALOG"].data["RA"] * u.deg, hdus["CATALOG"].data["DEC"] * u.deg, frame="fk5")
    frame = Frame.from_observations(observations)
    # 1 %: the pixel of the drizzled HST image is 0.03 arcsec.
    assert frame.pixel_scale == pytest.approx(0.03, rel=0.01)
    assert is_inside(frame, frame.to_pixel(catalog)).all()
    assert pixel_scale_of(observations[1].wcs) / frame.pixel_scale == pytest.approx(5.6, rel=0.01)
