"""The model of a case. Two models that are made of one case have equal weights and seeds."""

import keras
import numpy as np
from keras import layers, ops

from tests.fuzz.cases import INPUTS, Case
from tests.models import assign, values

FEATURES, UNITS, STEPS, WORDS, CLASSES, EXTRA = 3, 4, 4, 6, 3, 2
SHAPES = {
    "vector": (FEATURES,),
    "image": (5, 5, 2),
    "sequence": (STEPS, FEATURES),
    "tokens": (STEPS,),
}


def custom(cls):
    """A layer that files can hold."""
    return keras.saving.register_keras_serializable(package="tests.fuzz")(cls)


@custom
class Residual(layers.Wrapper):
    """`x + layer(x)`."""

    def __init__(self, layer, **kwargs):
        super().__init__(layer, **kwargs)
        self.supports_masking = True

    def call(self, x):
        return layers.Add()([x, self.layer(x)])


@custom
class Shared(layers.Wrapper):
    """`layer(layer(x))`."""

    def call(self, x):
        return self.layer(self.layer(x))


@custom
class SelfAttention(layers.Layer):
    """`x + attention(x, x)`, in which a mask takes part."""

    def __init__(self, grouped=False, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.grouped, self.seed = grouped, seed
        self.supports_masking = True
        if grouped:
            self.attention = layers.GroupQueryAttention(2, 2, 1)
        else:
            self.attention = layers.MultiHeadAttention(2, 2, dropout=0.2, seed=seed)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return x + self.attention(x, x)

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return {**super().get_config(), "grouped": self.grouped, "seed": self.seed}


@custom
class Penalty(layers.Layer):
    """A loss on the activations by `add_loss`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, x):
        # In float16, Keras could not add it to the rest of the loss on TensorFlow.
        self.add_loss(0.1 * ops.mean(ops.square(ops.cast(x, "float32"))))
        return x


@custom
class Unused(layers.Layer):
    """Has a weight that the loss does not depend on."""

    def build(self, shape):
        self.idle = self.add_weight(shape=(2,), initializer="ones", name="idle")

    def call(self, x):
        return x


@custom
class Counter(layers.Layer):
    """Counts its calls in training, in an integer."""

    def build(self, shape):
        self.count = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="count"
        )

    def call(self, x, training=None):
        if training:
            self.count.assign_add(1)
        return x


@custom
class MovingAverage(layers.Layer):
    """Subtracts a moving mean, which it moves in training."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, shape):
        self.mean = self.add_weight(
            shape=(shape[-1],), initializer="zeros", trainable=False, name="mean"
        )

    def call(self, x, training=None):
        if training:
            batch = ops.mean(x, axis=tuple(range(len(x.shape) - 1)))
            self.mean.assign(0.8 * self.mean + 0.2 * ops.cast(batch, self.mean.dtype))
        return x - ops.cast(self.mean, x.dtype)


def trunk(case):
    """The layers between the input and the heads, each with what it takes from the case."""
    made = [_embedding(case)] if case.inputs == "tokens" else []
    for i, block in enumerate(case.blocks):
        made.append(_block(case, block, seed=case.seed % 1000 + i if case.seeded else None))
    if case.frozen and made:
        made[0].trainable = False
    return made


def _embedding(case):
    return layers.Embedding(
        WORDS, UNITS, mask_zero=True, name="embedding", **_penalties(case, "embeddings")
    )


def _penalties(case, name="kernel"):
    regularizer = {
        None: None,
        "l1": keras.regularizers.L1(0.01),
        "l2": keras.regularizers.L2(0.05),
        "l1l2": keras.regularizers.L1L2(0.01, 0.05),
        "orthogonal": keras.regularizers.OrthogonalRegularizer(0.05),
    }[case.regularizer]
    constraint = {
        None: None,
        "max_norm": keras.constraints.MaxNorm(0.8),
        "unit_norm": keras.constraints.UnitNorm(),
        "non_neg": keras.constraints.NonNeg(),
    }[case.constraint]
    return {f"{name}_regularizer": regularizer, f"{name}_constraint": constraint}


def _block(case, block, seed):
    kernel = _penalties(case)
    if "dense" not in block and case.regularizer == "orthogonal":
        kernel = {}  # For matrices only.
    same = {"padding": "same", "activation": "tanh"}
    return {
        "dense": lambda: layers.Dense(UNITS, "tanh", **kernel),
        "dense_gelu": lambda: layers.Dense(UNITS, "gelu", **kernel),
        "steps_dense": lambda: layers.Dense(UNITS, "tanh", **kernel),
        "prelu": lambda: layers.PReLU(alpha_initializer="random_normal"),
        "einsum_dense": lambda: layers.EinsumDense("ab,bc->ac", UNITS, bias_axes="c"),
        "shared": lambda: Shared(Square("tanh")),
        "residual": lambda: Residual(Square("tanh")),
        "spectral": lambda: layers.SpectralNormalization(layers.Dense(UNITS)),
        "lora": lambda: layers.Dense(UNITS, lora_rank=2),
        "batchnorm": lambda: layers.BatchNormalization(momentum=0.7),
        "layernorm": layers.LayerNormalization,
        "groupnorm": lambda: layers.GroupNormalization(groups=1),
        "rmsnorm": layers.RMSNormalization,
        "unitnorm": layers.UnitNormalization,
        "dropout": lambda: layers.Dropout(0.3, seed=seed),
        "alpha_dropout": lambda: layers.AlphaDropout(0.3, seed=seed),
        "spatial_dropout": lambda: layers.SpatialDropout2D(0.3, seed=seed),
        "spatial_dropout1d": lambda: layers.SpatialDropout1D(0.3, seed=seed),
        "gaussian_noise": lambda: layers.GaussianNoise(0.2, seed=seed),
        "gaussian_dropout": lambda: layers.GaussianDropout(0.2, seed=seed),
        "add_loss": Penalty,
        "activity": lambda: layers.Dense(UNITS, "tanh", activity_regularizer="l2"),
        "unused": Unused,
        "counter": Counter,
        "moving_average": MovingAverage,
        "conv": lambda: layers.Conv2D(2, 3, **same, **kernel),
        "depthwise": lambda: layers.DepthwiseConv2D(3, **same),
        "separable": lambda: layers.SeparableConv2D(2, 3, **same),
        "transpose": lambda: layers.Conv2DTranspose(2, 3, **same, **kernel),
        "residual_conv": lambda: Residual(layers.Conv2D(2, 3, **same, **kernel)),
        "spectral_conv": lambda: layers.SpectralNormalization(layers.Conv2D(2, 3, padding="same")),
        "lora_conv": lambda: layers.Conv2D(2, 3, **same, lora_rank=2),
        "maxpool": lambda: layers.MaxPooling2D(2, strides=1, padding="same"),
        "avgpool": lambda: layers.AveragePooling2D(2, strides=1, padding="same"),
        "upsample": lambda: layers.UpSampling2D(2, interpolation="bilinear"),
        "conv1d": lambda: layers.Conv1D(UNITS, 3, **same, **kernel),
        "separable1d": lambda: layers.SeparableConv1D(UNITS, 3, **same),
        "time_distributed": lambda: layers.TimeDistributed(layers.Dense(UNITS, "tanh", **kernel)),
        "lstm": lambda: layers.LSTM(UNITS, return_sequences=True, **kernel),
        "gru": lambda: layers.GRU(UNITS, return_sequences=True, **kernel),
        "rnn": lambda: layers.SimpleRNN(UNITS, return_sequences=True, **kernel),
        "rnn_dropout": lambda: layers.GRU(
            UNITS, return_sequences=True, dropout=0.2, recurrent_dropout=0.2, seed=seed
        ),
        "bidirectional": lambda: layers.Bidirectional(layers.SimpleRNN(2, return_sequences=True)),
        "attention": lambda: SelfAttention(seed=seed),
        "grouped_attention": lambda: SelfAttention(grouped=True),
    }[block]()  # fmt: skip


@custom
class Square(layers.Dense):
    """A Dense layer with as many units as inputs."""

    def __init__(self, activation=None, **kwargs):
        kwargs.pop("units", None)
        super().__init__(1, activation, **kwargs)

    def build(self, shape):
        self.units = shape[-1]
        super().build(shape)


def heads(case):
    """The layers that make predictions, by the names of the outputs."""
    made = {}
    for i, head in enumerate(case.heads):
        units = CLASSES if "classes" in head else 1 if head == "binary" else 2
        activation = {"binary": "sigmoid", "classes": "softmax", "steps_classes": "softmax"}.get(
            head
        )
        dtype = "float64" if case.dtype == "float64" else "float32"
        layer = layers.Dense(units, activation, name=f"out_{i}", dtype=dtype)
        made[f"out_{i}"] = layer
    return made


def _pool(case):
    kind = INPUTS[case.inputs]
    if kind == "image":
        return layers.GlobalAveragePooling2D(name="pool")
    if kind == "sequence":
        return layers.GlobalAveragePooling1D(name="pool")
    return None


@custom
class Subclassed(keras.Model):
    """The network of a case, as a subclass of `keras.Model`."""

    def __init__(self, case, **kwargs):
        super().__init__(**kwargs)
        self.case_json = case if isinstance(case, str) else case.to_json()
        self.case = case = Case.from_json(self.case_json)
        self.trunk, self.pool, self.heads = trunk(case), _pool(case), list(heads(case).values())

    def call(self, x, training=None):
        if self.case.extra_input:
            x, extra = x["main"], x["extra"]
        for layer in self.trunk:
            x = layer(x, training=training) if _takes_training(layer) else layer(x)
        pooled = x if self.pool is None else self.pool(x)
        if self.case.extra_input:
            pooled = ops.concatenate([pooled, ops.cast(extra, pooled.dtype)], axis=-1)
        out = [
            layer(x if "steps" in head else pooled)
            for layer, head in zip(self.heads, self.case.heads, strict=True)
        ]
        return _structure(self.case, out)

    def get_config(self):
        return {**super().get_config(), "case": self.case_json}


def _takes_training(layer):
    return layer._call_has_training_arg


def _structure(case, outputs):
    if len(outputs) == 1:
        return outputs[0]
    if case.named_outputs:
        return {f"out_{i}": t for i, t in enumerate(outputs)}
    return outputs


def build(case):
    """The model of a case."""
    keras.utils.set_random_seed(case.seed % 2**31)
    model = _build(case)
    if case.built and not model.built:
        model(example(case))
    return model


def _build(case):
    if case.topology == "subclassed":
        return Subclassed(case, name="net")
    layers_ = trunk(case)
    dtype = "int32" if case.inputs == "tokens" else None
    main = keras.Input(SHAPES[case.inputs], dtype=dtype, name="main")
    if case.topology == "sequential":
        pool = [] if "steps" in case.heads[0] or _pool(case) is None else [_pool(case)]
        given = [main] if case.built else []
        return keras.Sequential([*given, *layers_, *pool, *heads(case).values()], name="net")
    x = main
    if case.topology == "nested":
        x = keras.Sequential(layers_, name="trunk")(x) if layers_ else x
    else:
        for layer in layers_:
            # The inner layers of these become layers of the graph.
            inlined = isinstance(layer, Residual | Shared)
            x = layer.call(x) if inlined else layer(x)
    pool = _pool(case)
    pooled = x if pool is None else pool(x)
    inputs = main
    if case.extra_input:
        extra = keras.Input((EXTRA,), name="extra")
        inputs = {"main": main, "extra": extra}
        pooled = layers.Concatenate()([pooled, extra])
    out = [
        layer(x if "steps" in head else pooled)
        for layer, head in zip(heads(case).values(), case.heads, strict=True)
    ]
    return keras.Model(inputs, _structure(case, out), name="net")


def example(case):
    """An input of two zeros, to build with."""
    dtype = "int32" if case.inputs == "tokens" else "float32"
    main = np.ones((2, *SHAPES[case.inputs]), dtype)
    return {"main": main, "extra": np.ones((2, EXTRA), "float32")} if case.extra_input else main


def move_off_the_start(model, seed):
    """Give zeros (biases, the second factor of LoRA) values: zero gradients test little."""
    rng = np.random.default_rng(seed)
    for v in model.trainable_variables:
        old = values([v])[0]
        if old.size and not np.any(old):
            assign([v], [(0.3 * rng.normal(size=old.shape)).astype(old.dtype)])
