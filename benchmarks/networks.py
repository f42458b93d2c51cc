"""The three networks of the benchmarks, for Keras, for bare PyTorch and for bare JAX.

| name | network | input | parameters |
|---|---|---|---|
| `W1` | CNN with BatchNormalization: stem 16, residual blocks 32, 64, 96 | 32x32x3 | 218k |
| `W2` | MLP 784-512-512-10 | 784 | 670k |
| `W3` | transformer: 2 encoder layers, d=128, 4 heads, feed-forward 512 | 64x128 | 398k |

All of them classify into ten classes and return logits. The Keras form serves Keras 3 and tf_keras.
"""

from typing import NamedTuple

import numpy as np

CLASSES = 10
WIDTHS = (32, 64, 96)
STEM = 16
HIDDEN = 512
DIM, HEADS, FEED_FORWARD, ENCODERS = 128, 4, 512, 2


class Workload(NamedTuple):
    """What is trained, and how many steps make one block of the measurement."""

    title: str
    shape: tuple
    batch_size: int
    steps: int


WORKLOADS = {
    "W1": Workload("CNN with BatchNormalization", (32, 32, 3), 128, 2),
    "W2": Workload("MLP", (784,), 128, 60),
    "W3": Workload("transformer", (64, DIM), 32, 6),
}


def batches(workload, steps):
    """Random inputs and labels for `steps` batches, the same for every contestant."""
    rng = np.random.default_rng(0)
    size = steps * workload.batch_size
    x = rng.standard_normal((size, *workload.shape), dtype=np.float32)
    return x, rng.integers(0, CLASSES, size).astype("int32")


# Keras


def keras_network(name, keras):
    """A Keras model; `keras` is the module to build it with, Keras 3 or tf_keras."""
    inputs = keras.Input(WORKLOADS[name].shape)
    body = {"W1": _keras_cnn, "W2": _keras_mlp, "W3": _keras_transformer}[name]
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(body(keras.layers, inputs)))


def _keras_cnn(layers, x):
    def conv(x, width, size=3, stride=1):
        x = layers.Conv2D(width, size, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    x = layers.ReLU()(conv(x, STEM))
    for width in WIDTHS:
        y = layers.ReLU()(conv(x, width, stride=2))
        x = layers.ReLU()(layers.Add()([conv(y, width), conv(x, width, size=1, stride=2)]))
    return layers.GlobalAveragePooling2D()(x)


def _keras_mlp(layers, x):
    for _ in range(2):
        x = layers.Dense(HIDDEN, activation="relu")(x)
    return x


def _keras_transformer(layers, x):
    for _ in range(ENCODERS):
        attended = layers.MultiHeadAttention(HEADS, DIM // HEADS)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, attended]))
        y = layers.Dense(DIM)(layers.Dense(FEED_FORWARD, activation="relu")(x))
        x = layers.LayerNormalization()(layers.Add()([x, y]))
    return layers.GlobalAveragePooling1D()(x)


# PyTorch


def torch_network(name):
    """A `torch.nn.Module`; images have their channels first, as is usual there."""
    return {"W1": _torch_cnn, "W2": _torch_mlp, "W3": _torch_transformer}[name]()


def _torch_cnn():
    from torch import nn

    def conv(before, width, size=3, stride=1):
        return nn.Sequential(
            nn.Conv2d(before, width, size, stride, size // 2, bias=False), nn.BatchNorm2d(width)
        )

    class Block(nn.Module):
        def __init__(self, before, width):
            super().__init__()
            self.body = nn.Sequential(conv(before, width, 3, 2), nn.ReLU(), conv(width, width))
            self.shortcut = conv(before, width, 1, 2)

        def forward(self, x):
            return nn.functional.relu(self.body(x) + self.shortcut(x))

    blocks = [Block(a, b) for a, b in zip((STEM, *WIDTHS), WIDTHS, strict=False)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(conv(3, STEM), nn.ReLU(), *blocks, *pool, nn.Linear(WIDTHS[-1], CLASSES))


def _torch_mlp():
    from torch import nn

    hidden = [nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, CLASSES))


def _torch_transformer():
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoders = nn.Sequential(
                *(
                    nn.TransformerEncoderLayer(
                        DIM, HEADS, FEED_FORWARD, dropout=0.0, batch_first=True
                    )
                    for _ in range(ENCODERS)
                )
            )
            self.head = nn.Linear(DIM, CLASSES)

        def forward(self, x):
            return self.head(self.encoders(x).mean(1))

    return Transformer()


# JAX


def jax_network(name):
    """Weights, state and the function `apply(weights, state, x) -> (logits, state)`.

    Layers call for their weights by shape, in the order in which they run; a
    first run with random numbers collects them.
    """
    import jax.numpy as jnp

    body = {"W1": _jax_cnn, "W2": _jax_mlp, "W3": _jax_transformer}[name]

    def run(new_weight, new_state, x):
        x = body(new_weight, new_state, x)
        return x @ new_weight(x.shape[-1], CLASSES) + new_weight(CLASSES)

    rng = np.random.default_rng(0)
    weights, state = [], []

    def make_weight(*shape):
        scale = (2 / np.prod(shape[:-1])) ** 0.5 if len(shape) > 1 else 0.0
        weights.append(jnp.asarray(scale * rng.standard_normal(shape), "float32"))
        return weights[-1]

    run(make_weight, state.append, jnp.ones((2, *WORKLOADS[name].shape)))

    def apply(weights, state, x):
        queue, moved = iter(weights), []
        logits = run(lambda *shape: next(queue), moved.append, x)
        return logits, [0.99 * old + 0.01 * new for old, new in zip(state, moved, strict=True)]

    return weights, state, apply


def _jax_cnn(weight, new_state, x):
    import jax
    import jax.numpy as jnp

    def conv(x, width, size=3, stride=1):
        kernel = weight(size, size, x.shape[-1], width)
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=layout)
        mean, variance = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
        new_state(mean)
        new_state(variance)
        scale = (1 + weight(width)) * jax.lax.rsqrt(variance + 1e-3)
        return (x - mean) * scale + weight(width)

    x = jax.nn.relu(conv(x, STEM))
    for width in WIDTHS:
        y = jax.nn.relu(conv(x, width, stride=2))
        x = jax.nn.relu(conv(y, width) + conv(x, width, size=1, stride=2))
    return jnp.mean(x, (1, 2))


def _jax_mlp(weight, new_state, x):
    import jax

    for _ in range(2):
        x = jax.nn.relu(x @ weight(x.shape[-1], HIDDEN) + weight(HIDDEN))
    return x


def _jax_transformer(weight, new_state, x):
    import jax
    import jax.numpy as jnp

    def dense(x, width):
        return x @ weight(x.shape[-1], width) + weight(width)

    def layer_norm(x):
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3)
        return x * (1 + weight(DIM)) + weight(DIM)

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, DIM // HEADS)

    for _ in range(ENCODERS):
        query, key, value = (heads(dense(x, DIM)) for _ in range(3))
        attended = jax.nn.dot_product_attention(query, key, value)
        x = layer_norm(x + dense(attended.reshape(x.shape), DIM))
        x = layer_norm(x + dense(jax.nn.relu(dense(x, FEED_FORWARD)), DIM))
    return jnp.mean(x, 1)
