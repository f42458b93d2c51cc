"""How sharp the loss is around the weights of a model, on given data."""

from keras import ops

from keras_sharp import neighborhoods, vectors
from keras_sharp.surface import LossSurface


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
    surface = LossSurface(model, x, y, sample_weight, batch_size=batch_size)
    w = surface.weights
    loss, g = surface.loss_and_gradient(w)
    e = neighborhoods.get(neighborhood).perturbation(g, w, float(rho))
    return surface.loss(vectors.add(w, e)) - float(ops.convert_to_numpy(loss))
