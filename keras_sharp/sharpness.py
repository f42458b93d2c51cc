"""How sharp the loss is around the weights of a model, on given data."""

import keras
from keras import ops

from keras_sharp import engine, neighborhoods, vectors
from keras_sharp.objective import Objective


def max_sharpness(
    model, x, y, sample_weight=None, *, rho=0.05, neighborhood="euclidean", batch_size=256
):
    """How much the loss rises when the weights take SAM's step of size rho.

    ```
    g = ∇L(w)
    max_sharpness = L(w + e(g)) - L(w)      # Euclidean ball: e = rho * g / ‖g‖
    ```

    `L` is the compiled loss of the model over all the data, as `evaluate`
    computes it: in inference mode, regularizers included. It is the quantity
    that SAM holds down, measured in one ascent step. The model is left as it is.

    Args:
        model: a compiled and built `keras.Model`, wrapped or not.
        x: NumPy array or nested structure of arrays, the inputs.
        y: the targets, likewise.
        sample_weight: NumPy array of weights of the examples. Defaults to
            `None`.
        rho: Float >= 0, the radius of the neighborhood. Defaults to `0.05`.
        neighborhood: a `keras_sharp.neighborhoods.Neighborhood` or its name.
            Defaults to `"euclidean"`.
        batch_size: Integer, how many examples are in memory at once. The
            result does not depend on it. Defaults to `256`.

    Returns:
        Float, in the units of the loss.

    Raises:
        ValueError: if the model is not compiled or not built, has no
            trainable weights, or if there are no data.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> keras_sharp.sharpness.max_sharpness(model, np.ones((8, 4)), np.zeros((8, 1))) > 0
    True

    Reference:
        - [Foret et al., 2021](https://arxiv.org/abs/2010.01412), equation 1.
    """
    model = getattr(model, "model", model)
    if not model.compiled or not model.built:
        raise ValueError(
            "The sharpness is that of the compiled loss at the weights of the model. Received: "
            f"model.compiled={model.compiled}, model.built={model.built}. Call `compile`, and "
            "`build` or `fit`, first."
        )
    if not model.trainable_variables:
        raise ValueError(f"The model {model.name!r} has no trainable weights to perturb.")
    size = len(keras.tree.flatten(x)[0])
    if size == 0:
        raise ValueError("There are no data: `x` is empty. Expected at least one example.")

    def loss(w, batch):
        mapping = zip(model.trainable_variables, w, strict=True)
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
            x, y, sample_weight = batch
            y_pred = model(x, training=False)
            return model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)

    @engine.compiled
    def evaluate(w, batch):
        value, gradient = Objective(lambda v: loss(v, batch))(w)
        return value, list(gradient)

    def over_all_data(w):
        total_loss, total_gradient = 0.0, [None] * len(w)
        for start in range(0, size, batch_size):
            part = slice(start, start + batch_size)
            batch = keras.tree.map_structure(
                lambda a, part=part: None if a is None else ops.convert_to_tensor(a[part]),
                (x, y, sample_weight),
            )
            share = min(batch_size, size - start) / size
            value, gradient = evaluate(w, batch)
            total_loss += share * float(ops.convert_to_numpy(value))
            total_gradient = vectors.add(total_gradient, vectors.scale(share, gradient))
        return total_loss, total_gradient

    w = [engine.read(v) for v in model.trainable_variables]
    clean_loss, g = over_all_data(w)
    e = neighborhoods.get(neighborhood).perturbation(g, w, float(rho))
    return over_all_data(vectors.add(w, e))[0] - clean_loss
