"""Callbacks that steer a sharpness-aware training, or watch it."""

from keras_sharp.callbacks.atomic_backup import AtomicBackupAndRestore
from keras_sharp.callbacks.hessian_probe import HessianProbe
from keras_sharp.callbacks.rho_scheduler import RhoScheduler
from keras_sharp.callbacks.sharpness_probe import SharpnessProbe
from keras_sharp.callbacks.switch_method import SwitchMethod
from keras_sharp.callbacks.weight_path import WeightPath

__all__ = [
    "AtomicBackupAndRestore",
    "HessianProbe",
    "RhoScheduler",
    "SharpnessProbe",
    "SwitchMethod",
    "WeightPath",
]
