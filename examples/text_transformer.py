"""A small transformer on text: which library was this sentence written for?

    python examples/text_transformer.py
    python examples/text_transformer.py --backend jax --epochs 10

Not only images: the text is the documentation of four packages that are installed
here anyway, cut into pieces of 24 words, with the names of the packages taken out.
The transformer reads a piece and says whose it is. Pieces of one function are all in
the training set or all in the test set. AdamW alone, with SAM, and with GSAM.
"""

from common import parse, progress, save

args = parse(__doc__, epochs=8, dim=(64, "the width of the transformer"))

import importlib  # noqa: E402
import inspect  # noqa: E402
import re  # noqa: E402
from collections import Counter  # noqa: E402

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers, ops  # noqa: E402

import keras_sharp  # noqa: E402

MODULES = {
    "numpy": ["numpy", "numpy.linalg", "numpy.random", "numpy.fft", "numpy.ma"],
    "keras": ["keras.ops", "keras.layers", "keras.losses", "keras.optimizers", "keras.callbacks"],
    "matplotlib": ["matplotlib.axes", "matplotlib.pyplot", "matplotlib.patches"],
    "sklearn": ["sklearn.linear_model", "sklearn.ensemble", "sklearn.metrics", "sklearn.cluster"],
}
NAMES = re.compile(r"\b(numpy|np|keras|tensorflow|jax|matplotlib|mpl|plt|pyplot|sklearn|scikit)\b")
LENGTH, VOCABULARY = 24, 2000
METHODS = {
    "AdamW": None,
    "SAM": keras_sharp.methods.SAM(rho=0.05),
    "GSAM": keras_sharp.methods.GSAM(rho=0.05, alpha=0.2),
}


def load_text():
    """`(tokens, labels)` for training and testing, and the words of the tokens."""
    texts = []
    for label, modules in enumerate(MODULES.values()):
        docs = {}
        for module in map(importlib.import_module, modules):
            for name in dir(module):
                thing = getattr(module, name)
                if not name.startswith("_") and (inspect.isclass(thing) or callable(thing)):
                    docs[name] = inspect.getdoc(thing) or ""
        texts += [(name, text, label) for name, text in sorted(docs.items())]
    rng = np.random.default_rng(args.seed)
    parts = [[], []]  # for training, for testing
    for _, text, label in texts:
        words = re.findall(r"\w+|[^\s\w]", NAMES.sub(" ", text.lower()))
        pieces = [words[i : i + LENGTH] for i in range(0, len(words) - LENGTH, LENGTH)]
        parts[int(rng.random() < 0.25)] += [(piece, label) for piece in pieces[:8]]
    counts = Counter(word for piece, _ in parts[0] for word in piece)
    known = ["<unknown>", *(word for word, _ in counts.most_common(VOCABULARY - 1))]
    number = {word: i for i, word in enumerate(known)}
    arrays = []
    for part, limit in zip(parts, (200, 100) if args.quick else (3000, 1500), strict=True):
        chosen = [part[i] for i in rng.permutation(len(part))[:limit]]
        tokens = np.array([[number.get(word, 0) for word in piece] for piece, _ in chosen])
        arrays.append((tokens.astype("int32"), np.array([label for _, label in chosen])))
    return *arrays, known


@keras.saving.register_keras_serializable(package="examples")
class Positions(layers.Layer):
    """Adds a learned vector for each position."""

    def build(self, shape):
        self.vectors = self.add_weight(shape=shape[1:], initializer="normal", name="vectors")

    def call(self, x):
        return x + self.vectors


def make_network():
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = Positions()(layers.Embedding(VOCABULARY, args.dim)(inputs))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, args.dim // 4, dropout=0.1)(y, y)
        y = layers.Dense(2 * args.dim, "gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dropout(0.1)(layers.Dense(args.dim)(y))
    x = ops.mean(layers.LayerNormalization()(x), axis=1)
    return keras.Model(inputs, layers.Dense(len(MODULES))(x))


def train(name, method, train_data, test_data):
    keras.utils.set_random_seed(args.seed)
    model = keras_sharp.SharpnessAwareModel(make_network(), method)
    steps = args.epochs * -(-len(train_data[0]) // 64)
    model.compile(
        keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        *train_data,
        batch_size=64,
        epochs=args.epochs,
        validation_data=test_data,
        validation_batch_size=500,
        verbose=0,
        callbacks=[progress(name)],
    )
    return model.model, history.history


def picture(histories, network, test_data):
    """Curves of accuracy and loss, and who is taken for whom."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axes, key in ((left, "val_accuracy"), (middle, "val_loss")):
        for name, history in histories.items():
            axes.plot(range(1, args.epochs + 1), history[key], "o-", ms=3, label=name)
        axes.set(xlabel="epoch", title=key.replace("val_", "test "))
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    answers = network.predict(test_data[0], batch_size=500, verbose=0).argmax(-1)
    table = np.zeros((len(MODULES), len(MODULES)))
    np.add.at(table, (test_data[1], answers), 1)
    table /= np.maximum(table.sum(1, keepdims=True), 1)
    right.imshow(table, cmap="Blues", vmin=0, vmax=1)
    for (i, j), share in np.ndenumerate(table):
        right.text(j, i, f"{share:.0%}", ha="center", va="center", color="wk"[int(share < 0.5)])
    names = list(MODULES)
    right.set_xticks(range(len(names)), names, rotation=20)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="taken for", title=f"written for ({list(histories)[-1]})")
    save(figure, args.output)


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    train_data, test_data, known = load_text()
    print(f"Data: {len(train_data[0])} pieces for training, {len(test_data[0])} for testing")
    for label, name in enumerate(MODULES):
        piece = train_data[0][np.flatnonzero(train_data[1] == label)[0]]
        print(f"  {name}: {' '.join(known[i] for i in piece)}")
    histories = {}
    for name, method in METHODS.items():
        network, histories[name] = train(name, method, train_data, test_data)
    picture(histories, network, test_data)


if __name__ == "__main__":
    main()
