"""All of Keras that a gradient goes through: each layer, activation and loss, in tiny models.

The names are those that Keras exports. Each is in a table here, or is left out with its reason:
`tests/test_zoo.py` fails for one that is in neither.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

from tests.models import KERAS

FEATURES, WORDS, STEPS = (6,), (3, 3), (5, 4)
IMAGE, VOLUME, PIXELS = (6, 6, 2), (4, 4, 4, 2), (8, 8, 3)


class Case(NamedTuple):
    """A layer in a network that trains what comes before it.

    Attributes:
        make: function without arguments that makes the layer.
        shape: the shape of what it is called with, without the batch.
        call: function `(layer, x) -> y`. Defaults to `layer(x)`.
        front: what is trained before it, function `x -> x`. Defaults to a
            `Dense` with tanh along the last axis.
    """

    make: Callable
    shape: tuple
    call: Callable = lambda layer, x: layer(x)
    front: Callable = lambda x: layers.Dense(x.shape[-1], "tanh", name="front")(x)


def _twice(layer, x):
    """Two inputs, one of which is trained otherwise than the other."""
    return layer([x, layers.Dense(x.shape[-1], "tanh", name="other")(x)])


def _as_it_is(x):
    """Nothing is trained before the layer, which has weights of its own or reads integers."""
    return x


def _between_0_and_1(x):
    return 0.1 + 0.8 * layers.Dense(x.shape[-1], "sigmoid", name="front")(x)


def _cases(name, shape, *variants, **fields):
    if KERAS < (3, 15) and not hasattr(layers, name):
        return  # It came later.
    cls = getattr(layers, name)
    for kwargs in variants or ({},):
        key = ", ".join([name, *(f"{k}={v}" for k, v in kwargs.items() if k != "seed")])
        yield key, Case(lambda kwargs=kwargs: cls(**kwargs), shape, **fields)


def _convolutions():
    for rank, shape in ((1, STEPS), (2, IMAGE), (3, VOLUME)):
        kernel = {"filters": 4, "kernel_size": 3}
        yield from _cases(
            f"Conv{rank}D",
            shape,
            kernel,
            {**kernel, "strides": 2, "padding": "same"},
            {**kernel, "dilation_rate": 2, "padding": "same"},
        )
        yield from _cases(f"Conv{rank}DTranspose", shape, kernel, {**kernel, "strides": 2})
        if rank < 3:
            yield from _cases(f"SeparableConv{rank}D", shape, {**kernel, "depth_multiplier": 2})
            wide = {"kernel_size": 3, "depth_multiplier": 2, "padding": "same"}
            yield from _cases(f"DepthwiseConv{rank}D", shape, wide, {**wide, "dilation_rate": 2})
        yield from _cases(
            f"ConvLSTM{rank}D", (2, *([4] * rank), 2), {"filters": 2, "kernel_size": 2}
        )
    yield from _cases("Conv2D", IMAGE, {"filters": 4, "kernel_size": 3, "groups": 2})


def _pools():
    for rank, shape in ((1, STEPS), (2, IMAGE), (3, VOLUME)):
        for kind in ("Max", "Average"):
            yield from _cases(
                f"{kind}Pooling{rank}D",
                shape,
                {"pool_size": 2},
                {"pool_size": 2, "strides": 1, "padding": "same"},
                {"pool_size": 3, "strides": 2, "padding": "same"},
                {"pool_size": 3, "strides": 1},
            )
            yield from _cases(f"Global{kind}Pooling{rank}D", shape)
            yield from _cases(f"Adaptive{kind}Pooling{rank}D", shape, {"output_size": 3})
        yield from _cases(f"UpSampling{rank}D", shape)
        yield from _cases(f"Cropping{rank}D", shape, {"cropping": 1})
        yield from _cases(f"ZeroPadding{rank}D", shape, {"padding": 1})
        yield from _cases(f"SpatialDropout{rank}D", shape, {"rate": 0.3, "seed": 1})
    yield from _cases(
        "UpSampling2D",
        IMAGE,
        *({"interpolation": i} for i in ("bilinear", "bicubic", "lanczos3", "lanczos5")),
    )
    yield from _cases(
        "Resizing",
        IMAGE,
        *(
            {"height": 4, "width": 9, "interpolation": i}
            for i in ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5")
        ),
        {"height": 3, "width": 4, "antialias": True},
        {"height": 4, "width": 9, "crop_to_aspect_ratio": True},
        {"height": 4, "width": 9, "pad_to_aspect_ratio": True},
    )


def _normalizations():
    for name in ("LayerNormalization", "RMSNormalization", "UnitNormalization"):
        yield from _cases(name, FEATURES)
        yield from _cases(name, IMAGE, {"axis": -1})
    yield from _cases("GroupNormalization", FEATURES, {"groups": 2})
    yield from _cases("GroupNormalization", IMAGE, {"groups": 1})
    yield from _cases("BatchNormalization", FEATURES)
    if KERAS >= (3, 14):
        yield from _cases("BatchNormalization", FEATURES, {"renorm": True})
    yield from _cases("BatchNormalization", IMAGE, {"axis": -1})
    if keras.backend.backend() == "tensorflow":
        yield from _cases("BatchNormalization", FEATURES, {"synchronized": True})
    yield from _cases("LayerNormalization", IMAGE, {"axis": (2, 3)})
    yield from _cases("BatchNormalization", IMAGE, {"axis": 1})
    yield from _cases("Normalization", FEATURES, {"mean": 0.2, "variance": 2.0})
    spectral = layers.SpectralNormalization
    yield (
        "SpectralNormalization",
        Case(lambda: spectral(layers.Dense(3), power_iterations=2), FEATURES),
    )


def _recurrent():
    for cell in ("SimpleRNN", "LSTM", "GRU"):
        yield from _cases(
            cell,
            WORDS,
            {"units": 3},
            {"units": 3, "return_sequences": True, "go_backwards": True},
            {"units": 3, "unroll": True},
            {"units": 3, "use_bias": False, "recurrent_dropout": 0.2, "dropout": 0.2, "seed": 1},
        )
    yield from _cases("GRU", WORDS, {"units": 3, "reset_after": False})
    yield "RNN", Case(lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]), WORDS)
    yield "Bidirectional", Case(lambda: layers.Bidirectional(layers.LSTM(2)), WORDS)
    yield "TimeDistributed", Case(lambda: layers.TimeDistributed(layers.Dense(2, "tanh")), WORDS)
    yield (
        "Masking",
        Case(layers.Masking, WORDS, lambda layer, x: layers.LSTM(3)(layer(x)), _as_it_is),
    )


def _attention():
    def on_itself(layer, x):
        return layer(x, x)

    yield from _cases("Attention", STEPS, {}, {"use_scale": True}, call=_twice)
    yield from _cases("Attention", STEPS, {"score_mode": "concat"}, call=_twice)
    yield from _cases("AdditiveAttention", STEPS, call=_twice)
    heads = {"num_heads": 2, "key_dim": 3}
    yield from _cases(
        "MultiHeadAttention", STEPS, heads, {**heads, "dropout": 0.2, "seed": 1}, call=on_itself
    )
    yield (
        "MultiHeadAttention, use_causal_mask=True",
        Case(
            lambda: layers.MultiHeadAttention(**heads),
            STEPS,
            lambda layer, x: layer(x, x, use_causal_mask=True),
        ),
    )
    grouped = {"head_dim": 3, "num_query_heads": 4, "num_key_value_heads": 2}
    yield from _cases("GroupQueryAttention", STEPS, grouped, call=on_itself)


def _plain():
    yield from _cases("Dense", FEATURES, {"units": 3, "activation": "tanh"})
    yield from _cases("EinsumDense", STEPS, {"equation": "abc,cd->abd", "output_shape": (5, 3)})
    words = {"input_dim": 5, "output_dim": 3}
    yield from _cases("Embedding", STEPS, words, front=_as_it_is)
    yield (
        "Embedding, mask_zero=True",
        Case(
            lambda: layers.Embedding(**words, mask_zero=True),
            (5,),
            lambda layer, x: layers.GRU(3)(layer(x)),
            _as_it_is,
        ),
    )
    yield from _cases(
        "ReversibleEmbedding",
        (5,),
        {"input_dim": 5, "output_dim": 3},
        call=lambda layer, x: layer(layers.Dense(3, "tanh")(layer(x)), reverse=True),
        front=_as_it_is,
    )
    yield from _cases("Activation", FEATURES, {"activation": "tanh"})
    for name in ("ELU", "ReLU", "LeakyReLU", "Softmax", "Identity", "PReLU"):
        yield from _cases(name, FEATURES)
    yield from _cases("ReLU", FEATURES, {"max_value": 0.4, "negative_slope": 0.1, "threshold": 0.1})
    for name in ("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract"):
        yield from _cases(name, FEATURES, call=_twice)
    yield from _cases("Dot", FEATURES, {"axes": 1}, {"axes": 1, "normalize": True}, call=_twice)
    yield from _cases("ActivityRegularization", FEATURES, {"l2": 0.1})
    yield from _cases("Flatten", IMAGE)
    yield from _cases("Permute", STEPS, {"dims": (2, 1)})
    yield from _cases("RepeatVector", FEATURES, {"n": 2})
    yield from _cases("Reshape", FEATURES, {"target_shape": (2, 3)})
    yield from _cases("Rescaling", FEATURES, {"scale": 0.5, "offset": 0.1})
    for name in ("Dropout", "GaussianDropout", "AlphaDropout"):
        yield from _cases(name, FEATURES, {"rate": 0.3, "seed": 1})
    yield from _cases("GaussianNoise", FEATURES, {"stddev": 0.3, "seed": 1})
    yield from _cases("CenterCrop", IMAGE, {"height": 3, "width": 4})


def _images():
    seeded = {"seed": 1}
    values = {**seeded, "value_range": (0, 1)}
    for name, kwargs in {
        "RandomBrightness": {**values, "factor": 0.1},
        "RandomColorDegeneration": {**values, "factor": 0.5},
        "RandomColorJitter": {**values, "brightness_factor": 0.1},
        "RandomContrast": {**values, "factor": 0.1},
        "RandomErasing": {**values, "factor": 1.0},
        "RandomFlip": seeded,
        "RandomGaussianBlur": {**values, "factor": 1.0},
        "RandomGrayscale": {**seeded, "factor": 0.5},
        "RandomInvert": {**values, "factor": 0.5},
        "RandomSharpness": {**values, "factor": 0.4},
        "Solarization": {**values, "addition_factor": 0.1},
    }.items():
        yield from _cases(name, PIXELS, kwargs, front=_between_0_and_1)
    frames = {"frame_length": 16, "frame_step": 8, "fft_length": 16}
    for mode in ("log", "magnitude", "psd", "real", "angle"):
        yield from _cases("STFTSpectrogram", (64, 1), {"mode": mode, **frames})
    sequences = {"sequence_length": 16, "sequence_stride": 8, "fft_length": 16, "num_mel_bins": 4}
    yield from _cases("MelSpectrogram", (64,), {**sequences, "sampling_rate": 100, "max_freq": 50})


LAYERS = {
    name: case
    for group in (_plain, _convolutions, _pools, _normalizations, _recurrent, _attention, _images)
    for name, case in group()
}

#: Layers that are not in `LAYERS`, and why.
LEFT_OUT = {
    **dict.fromkeys(
        ["Layer", "Wrapper", "InputLayer", "Lambda", "Pipeline"], "computes nothing of its own"
    ),
    **dict.fromkeys(
        ["FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"], "wraps what is not of Keras"
    ),
    **dict.fromkeys(
        [
            "CategoryEncoding",
            "Discretization",
            "HashedCrossing",
            "Hashing",
            "IntegerLookup",
            "MaxNumBoundingBoxes",
            "StringLookup",
            "TextVectorization",
        ],
        "takes or gives integers: no gradient goes through",
    ),
    **dict.fromkeys(
        ["ContrastLimitedAdaptiveHistogramEqualization", "Equalization", "RandomPosterization"],
        "makes steps: no gradient goes through",
    ),
    **dict.fromkeys(["CutMix", "MixUp"], "takes images together with labels, before the model"),
    **dict.fromkeys(["AugMix", "RandAugment"], "chooses among other layers with random numbers"),
    **dict.fromkeys(["RandomHue", "RandomSaturation"], "HSVToRGB of TensorFlow has no gradient"),
    **dict.fromkeys(
        [
            "RandomElasticTransform",
            "RandomPerspective",
            "RandomRotation",
            "RandomShear",
            "RandomTranslation",
            "RandomZoom",
        ],
        "moves pixels: TensorFlow's gradient of ImageProjectiveTransform is an approximation",
    ),
    **dict.fromkeys(
        ["GRUCell", "LSTMCell", "SimpleRNNCell", "StackedRNNCells"], "is run by the layers for it"
    ),
    "AutoContrast": "moves the extremes of each image onto the kinks of a clip",
    "RandomCrop": "reads the sizes of a batch: it does not take symbolic inputs",
}

#: Layers whose gradient in training mode is not that of the loss, by design.
STOPS_GRADIENTS = {
    "BatchNormalization, renorm=True": "takes the moving statistics for constants",
    "SpectralNormalization": "takes the singular vectors for constants, and moves them",
}

#: What is computed in float32 whatever comes in.
FLOAT32 = {
    "tensorflow": (
        "MaxPooling3D",
        "AveragePooling3D",
        "AdaptiveMaxPooling3D",
        "AdaptiveAveragePooling3D",
        "MelSpectrogram",
        "CTC",
    ),
    "jax": ("MultiHeadAttention", "GroupQueryAttention"),
    "torch": (),
}


def _padded_glu(x):
    """In its shape: `glu` halves the last axis, which `layers.Activation` (Keras 3.15) denies."""
    return keras.ops.concatenate([keras.activations.glu(x), x[..., ::2]], -1)


def _activations():
    for name, fn in sorted(vars(keras.activations).items()):
        if not name.startswith("_") and name not in ("deserialize", "get", "serialize"):
            yield name, _padded_glu if name == "glu" else fn
    yield "threshold", lambda x: keras.activations.threshold(x, 0.1, 0.0)
    yield "relu, all arguments", lambda x: keras.activations.relu(x, 0.1, 0.4, 0.1)
    yield "gelu, approximate", lambda x: keras.activations.gelu(x, approximate=True)


ACTIVATIONS = dict(_activations())


def network(case):
    inputs = keras.Input(case.shape)
    outputs = case.call(case.make(), case.front(inputs))
    outputs = layers.Dense(2, name="head")(layers.Flatten()(outputs))
    return keras.Model(inputs, outputs)


class LossCase(NamedTuple):
    """A loss of a small network.

    Attributes:
        make: function without arguments that makes the loss.
        activation: of the last layer.
        targets: function `rng -> y` for four examples.
        shape: the shape of the inputs, and so the rank of the outputs.
        units: how many outputs there are, along the last axis.
    """

    make: Callable
    activation: object
    targets: Callable
    shape: tuple = FEATURES
    units: int = 3


def _numbers(rng):
    return rng.normal(size=(4, 3))


def _amounts(rng):
    return rng.uniform(0.5, 3.0, (4, 3))


def _signs(rng):
    return rng.choice([-1.0, 1.0], (4, 3))


def _parts(rng):
    return rng.dirichlet(np.ones(3), 4)


def _yes_or_no(rng):
    return rng.integers(0, 2, (4, 3)).astype("float64")


def _classes(rng):
    return np.array([0, 2, 1, 0])


def _one_hot(rng):
    return np.eye(3)[_classes(rng)]


def _unit(x):
    return keras.ops.normalize(x)


def _of_loss(name, activation, targets, *variants, **fields):
    if KERAS < (3, 15) and not hasattr(keras.losses, name):
        return
    cls = getattr(keras.losses, name)
    for kwargs in variants or ({},):
        key = ", ".join([name, *(f"{k}={v}" for k, v in kwargs.items())])
        last = "linear" if kwargs.get("from_logits") else activation
        yield key, LossCase(lambda kwargs=kwargs: cls(**kwargs), last, targets, **fields)


def _losses():
    either, smooth = ({}, {"from_logits": True}), {"label_smoothing": 0.1}
    for name in ("BinaryCrossentropy", "BinaryFocalCrossentropy"):
        yield from _of_loss(name, "sigmoid", _yes_or_no, *either, smooth)
    for name in ("CategoricalCrossentropy", "CategoricalFocalCrossentropy"):
        yield from _of_loss(name, "softmax", _one_hot, *either, smooth)
    yield from _of_loss("SparseCategoricalCrossentropy", "softmax", _classes, *either)
    yield from _of_loss("CategoricalGeneralizedCrossEntropy", "softmax", _classes)
    yield from _of_loss("KLDivergence", "softmax", _parts)
    for name in ("Dice", "Tversky"):
        yield from _of_loss(name, "sigmoid", _yes_or_no)
    for name in ("Hinge", "SquaredHinge"):
        yield from _of_loss(name, "tanh", _signs)
    yield from _of_loss("CategoricalHinge", "linear", _one_hot)
    yield from _of_loss("CosineSimilarity", "linear", _numbers)
    for name in ("MeanSquaredError", "MeanAbsoluteError", "LogCosh", "Huber"):
        yield from _of_loss(name, "linear", _numbers)
    for name in ("MeanAbsolutePercentageError", "MeanSquaredLogarithmicError", "Poisson"):
        yield from _of_loss(name, "softplus", _amounts)
    yield from _of_loss("Circle", _unit, lambda rng: np.array([0, 1, 0, 1]))
    words = {"shape": (7, 4), "units": 4}
    yield from _of_loss(
        "CTC", "linear", lambda rng: np.array([[1, 2], [3, 3], [2, 0], [1, 3]]), **words
    )


LOSSES = dict(_losses())


def loss_network(case):
    return keras.Sequential(
        [
            keras.Input(case.shape),
            layers.Dense(5, "tanh"),
            layers.Dense(case.units, case.activation),
        ]
    )
