"""Descent on all data at once: tens of thousands of steps with a method, in one compiled loop."""

from common import compiled
from keras import ops

import keras_sharp


def make_descent(losses, method):
    """A function that descends with a method.

    Args:
        losses: functions of the weights, a list of tensors, that return a
            scalar. Each has an adversary of its own, and the directions are
            averaged: one loss of all examples is n-SAM, one for each example
            1-SAM.
        method: a `keras_sharp.methods.Method` with a rho.

    Returns:
        A function of the weights, rho and a vector with the learning rate of
        each step, which returns the new weights. A rho of 0 is plain gradient
        descent. A fourth argument multiplies the learning rate of each weight,
        a list of Floats.
    """

    def descend(w, rho, learning_rates, factors):
        def step(i, w):
            directions = [
                keras_sharp.sharpness_aware_gradient(loss, w, method, rho=rho).direction
                for loss in losses
            ]
            return [
                v - learning_rates[i] * factor * sum(parts) / len(losses)
                for v, factor, *parts in zip(w, factors, *directions, strict=True)
            ]

        return ops.fori_loop(0, len(learning_rates), step, w)

    run = compiled(descend)

    def tensors(values):
        return [ops.convert_to_tensor(v, "float32") for v in values]

    return lambda w, rho, learning_rates, factors=None: run(
        tensors(w), *tensors([rho, learning_rates]), tensors(factors or [1.0] * len(w))
    )
