"""The check that callbacks which steer a method have in common."""

from keras_sharp.model import SharpnessAwareModel


def check_wrapped(callback):
    """Refuse a model that is trained without a method."""
    if not isinstance(callback.model, SharpnessAwareModel):
        raise ValueError(
            f"{type(callback).__name__} steers the method of a "
            "keras_sharp.SharpnessAwareModel. Received: a model of the class "
            f"{type(callback.model).__name__}. Wrap the model first: "
            "SharpnessAwareModel(model, method)."
        )
