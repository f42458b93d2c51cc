"""What callbacks that steer a method have in common."""

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


def begin(model, what):
    """Forget for which epoch the method or a number was set: a new training begins.

    Callbacks do so in `set_model`, before `on_train_begin`, where a checkpoint
    may be restored that knows better.
    """
    if isinstance(model, SharpnessAwareModel):
        model.progress.epochs.pop(what, None)


def is_done(model, what, epoch):
    """Whether the method or a number was set for this epoch already; from now on it is.

    It was if the epoch was broken off after that, and begins again from a
    checkpoint that was saved in its middle.
    """
    epochs = model.progress.epochs
    done = epochs.get(what) == epoch
    epochs[what] = epoch
    return done
