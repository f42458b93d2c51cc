"""Sharpness-aware training for any Keras 3 model, on TensorFlow, JAX and PyTorch."""

from keras_sharp import (
    callbacks,
    curvature,
    landscape,
    methods,
    neighborhoods,
    plots,
    policies,
    schedules,
    sharpness,
    vectors,
)
from keras_sharp.gradient import sharpness_aware_gradient
from keras_sharp.model import SharpnessAwareModel
from keras_sharp.objective import Objective
from keras_sharp.rho_range import RhoRange, rho_range_test

__version__ = "0.1.0"

__all__ = [
    "Objective",
    "RhoRange",
    "SharpnessAwareModel",
    "__version__",
    "callbacks",
    "curvature",
    "landscape",
    "methods",
    "neighborhoods",
    "plots",
    "policies",
    "rho_range_test",
    "schedules",
    "sharpness",
    "sharpness_aware_gradient",
    "vectors",
]
