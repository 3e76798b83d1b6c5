"""One model fitted jointly to images of different instruments, each in its own pixels."""

from scenefit.app import datasets, plot
from scenefit.app.io import read_catalog, read_observations
from scenefit.app.serialization import load, save
from scenefit.app.tablefile import write_catalog
from scenefit.data.correlated import CorrelatedNoise
from scenefit.data.noise import FloorNoise, PoissonNoise, StudentTNoise, WhiteNoise
from scenefit.data.nuisances import Astrometry, Calibration
from scenefit.data.observation import Observation
from scenefit.data.resampled import CorrelatedObservation
from scenefit.infer.batch import fit_many
from scenefit.infer.diagnostics import PosteriorStatus
from scenefit.infer.errors import ParameterCovariance, parameter_covariance, parameter_errors
from scenefit.infer.fit import FitResult, Status, fit
from scenefit.infer.rings import ring_prior
from scenefit.infer.sample import Posterior, sample
from scenefit.model import link
from scenefit.model.clumpy import ClumpyMorphology
from scenefit.model.morphology import (
    DeVaucouleursMorphology,
    ExponentialMorphology,
    GaussianMorphology,
    MultiGaussianMorphology,
    PixelMorphology,
    PointMorphology,
    SersicMorphology,
)
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import ArraySpectrum, StaticSpectrum, TransientSpectrum
from scenefit.model.starlet import StarletMorphology
from scenefit.sky.frame import Frame
from scenefit.sky.mixture import GaussianMixturePSF
from scenefit.sky.psf import GaussianPSF, ImagePSF
from scenefit.survey import priors
from scenefit.survey.average import average_profiles, evidence_weights
from scenefit.survey.catalog import CatalogCovariance, catalog, catalog_covariance, nuisance_errors, offset_errors
from scenefit.survey.deblend import Deblended, deblend
from scenefit.survey.detect import detect
from scenefit.survey.detections import Detections
from scenefit.survey.forced import ForcedPhotometry, forced_photometry
from scenefit.survey.initialize import initialize
from scenefit.survey.profile import Profile, profile

__all__ = [
    "ArraySpectrum",
    "Astrometry",
    "Calibration",
    "CatalogCovariance",
    "ClumpyMorphology",
    "CompositeSource",
    "CorrelatedNoise",
    "CorrelatedObservation",
    "DeVaucouleursMorphology",
    "Deblended",
    "Detections",
    "ExponentialMorphology",
    "FitResult",
    "FloorNoise",
    "ForcedPhotometry",
    "Frame",
    "GaussianMixturePSF",
    "GaussianMorphology",
    "GaussianPSF",
    "ImagePSF",
    "MultiGaussianMorphology",
    "Observation",
    "ParameterCovariance",
    "Parameters",
    "PixelMorphology",
    "PointMorphology",
    "PoissonNoise",
    "Posterior",
    "PosteriorStatus",
    "Profile",
    "Scene",
    "SersicMorphology",
    "Source",
    "StarletMorphology",
    "StaticSpectrum",
    "Status",
    "StudentTNoise",
    "TransientSpectrum",
    "WhiteNoise",
    "average_profiles",
    "catalog",
    "catalog_covariance",
    "datasets",
    "deblend",
    "detect",
    "evidence_weights",
    "fit",
    "fit_many",
    "forced_photometry",
    "initialize",
    "link",
    "load",
    "nuisance_errors",
    "offset_errors",
    "parameter_covariance",
    "parameter_errors",
    "plot",
    "priors",
    "profile",
    "read_catalog",
    "read_observations",
    "ring_prior",
    "sample",
    "save",
    "write_catalog",
]
