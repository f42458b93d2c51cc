"""What a wrapper and the model inside owe each other.

The wrapper is used in place of the model: scripts, callbacks and tools that
ask for layers, shapes or parameters want those of the wrapped model. Every
public member of `keras.Model` is one of three kinds, and
`tests/test_members.py` has the list: those here, which answer as the wrapped
model does; those that Keras' own code answers rightly for the wrapper; and
those of the wrapper itself, such as `fit`, `save` and `weights`.
"""

import warnings

import keras


def _of_model(name, can_be_set=False):
    """A property whose value is that of the wrapped model."""

    def read(wrapper):
        return getattr(wrapper.model, name)

    def write(wrapper, value):
        setattr(wrapper.model, name, value)

    return property(read, write if can_be_set else None, doc=f"`{name}` of the wrapped model.")


class Delegation:
    """The members of a wrapper that answer as the wrapped model does."""

    model: keras.Model
    name: str

    input = _of_model("input")
    inputs = _of_model("inputs")
    input_shape = _of_model("input_shape")
    input_spec = _of_model("input_spec", can_be_set=True)
    output = _of_model("output")
    outputs = _of_model("outputs")
    output_names = _of_model("output_names")
    output_shape = _of_model("output_shape")
    metrics_names = _of_model("metrics_names")
    trainable = _of_model("trainable", can_be_set=True)
    supports_masking = _of_model("supports_masking", can_be_set=True)
    dtype_policy = _of_model("dtype_policy", can_be_set=True)
    compute_dtype = _of_model("compute_dtype")
    variable_dtype = _of_model("variable_dtype")
    input_dtype = _of_model("input_dtype")

    def get_layer(self, name=None, index=None):
        """A layer of the wrapped model, by its name or its index."""
        return self.model.get_layer(name, index)

    def summary(self, *args, **kwargs):
        """Print the summary of the wrapped model, as `keras.Model.summary` does."""
        self.model.summary(*args, **kwargs)

    def add_loss(self, loss):
        """Add a loss to the wrapped model, which computes the losses."""
        self.model.add_loss(loss)

    def compute_mask(self, inputs, previous_mask):
        """The mask that the wrapped model computes."""
        return self.model.compute_mask(inputs, previous_mask)

    def compute_output_shape(self, *args, **kwargs):
        """The shape of the outputs of the wrapped model."""
        return self.model.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        """Shape and dtype of the outputs of the wrapped model."""
        return self.model.compute_output_spec(*args, **kwargs)

    def get_quantization_layer_structure(self, mode=None):
        """What the wrapped model says of its structure. It needs Keras 3.13 or newer."""
        return self.model.get_quantization_layer_structure(mode)

    def quantize(self, mode=None, config=None, **kwargs):
        """Quantize the wrapped model, as `keras.Model.quantize` does.

        It takes `config` with Keras 3.12 or newer.
        """
        if config is not None:  # Older versions of Keras refuse even `config=None`.
            kwargs["config"] = config
        self.model.quantize(mode, **kwargs)
        # They were made for other variables.
        self.train_function = self.test_function = self.predict_function = None


def unwrapped(model):
    """The model inside of a wrapper; any other model itself."""
    return model.model if isinstance(model, Delegation) else model


def warn_of_plain_training(model, name):
    """Let a model that is compiled along with its wrapper warn, once, if it is trained by itself.

    Until the model is trained or compiled by itself, this function stands in
    for its training function: `evaluate`, `predict`, files and copies of the
    model do not meet it.

    Args:
        model: the wrapped model, compiled.
        name: String, the name of its wrapper.
    """

    def train_function(*args):
        warnings.warn(
            f"The model {model.name!r} is trained by itself, without an adversary, though it was "
            f"compiled along with the SharpnessAwareModel {name!r} around it. Write "
            "`wrapper.fit(...)`, with the SharpnessAwareModel as `wrapper`, to train it with its "
            "method. If plain training is meant, compile the model by itself first: "
            "`model.compile(...)`.",
            stacklevel=2,
        )
        model.train_function = None
        model.make_train_function()
        return model.train_function(*args)

    model.train_function = train_function
