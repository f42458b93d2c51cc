"""Matrices of second derivatives of the loss, seen through their products with vectors."""

import functools
import itertools

import keras
import numpy as np
from keras import ops

from keras_sharp import engine, vectors
from keras_sharp.curvature.certificate import certify as certify_product
from keras_sharp.curvature.certificate import few_examples
from keras_sharp.docstrings import filled_in
from keras_sharp.identifiers import check_boolean
from keras_sharp.surface import LossSurface


class _Operator:
    """What the two operators have in common: all but the matrix."""

    #: The step of the differences of gradients, see `certify`.
    _step: float

    def __init__(
        self,
        model,
        x,
        y=None,
        sample_weight=None,
        *,
        batch_size=256,
        variables=None,
        certify=True,
    ):
        check_boolean("certify", certify)
        self._surface = LossSurface(
            model, x, y, sample_weight, batch_size=batch_size, variables=variables
        )
        #: The model whose loss it is, without a wrapper.
        self.model = self._surface.model
        #: The variables of the model that the rows and columns stand for, in this order.
        self.variables = self._surface.variables
        #: How many products have been taken so far.
        self.products = 0
        #: The `Certificate` of the last `refresh`; `None` with `certify=False`.
        self.certificate = None
        self._certify = certify
        shapes = [tuple(v.shape) for v in self.variables]
        sizes = [int(np.prod(shape)) for shape in shapes]
        self._shapes, self._ends = shapes, list(itertools.accumulate(sizes))
        #: The number of rows and of columns.
        self.size = self._ends[-1]
        self.shape = (self.size, self.size)
        names = {keras.backend.standardize_dtype(v.dtype) for v in self.variables}
        #: The dtype of the vectors.
        self.dtype = np.dtype("float64" if "float64" in names else "float32")

        matrix, fns, gradient = self._matrix()
        self._linearized = engine.linearized(matrix, *fns)
        self._anew = self._surface.compiled(lambda w, v, *args: matrix(*fns, w, *args)(v))
        self._gradient = self._surface.compiled(gradient)
        self._response = self._surface.compiled(self._gradient_of_outputs)
        self.refresh()

    def _matrix(self):
        """What makes the product: a function of the engine, those that it takes; and a gradient.

        The product is the derivative of `gradient(u, w, state, batch)` by `u`, at `u = w`.
        """
        raise NotImplementedError

    def refresh(self):
        """Move to the weights that the model has now. Nothing is compiled again.

        Raises:
            ValueError: if the loss is not finite, or not deterministic; if the
                data do not fit the model; if a product is wrong.
        """
        self._surface.check()
        self._weights, self._state = self._surface.weights, self._surface.state
        self._product = None  # Frees the memory of the last one.
        once = self._surface.num_batches == 1 and not self._surface.model.run_eagerly
        if self._certify:
            self.certificate = self._check_product(once)
        if once:
            (batch,) = self._surface.batches()
            self._weight = self._surface.batch_weight(batch)
            self._product = self._linearized(self._weights, self._state, batch)

    def _check_product(self, once):
        """The `Certificate` of the product at the weights of now.

        With each refresh, since weights may hide a mistake: nothing is seen of what comes before
        a layer whose weights are zero, as some are when training begins.
        """
        surface, w, state = self._surface, self._weights, self._state
        batch = next(iter(surface.batches(few_examples)))
        if once:
            multiply = self._linearized(w, state, batch)
        else:
            multiply = functools.partial(self._multiply_anew, batch)

        def flat(tensors):
            present = [
                ops.zeros_like(b) if a is None else a for a, b in zip(tensors, w, strict=True)
            ]
            # All processes must come to the same verdict.
            return self._flat(surface.over_processes(present, 1.0)).astype("float64")

        def gradient(v):
            u = vectors.add_scaled(w, 1.0, self.as_weights(v))
            return flat(self._gradient(u, w, state, batch))

        return certify_product(
            lambda v: flat(multiply(self.as_weights(v))),
            gradient,
            lambda: flat(self._response(w, state, batch)),
            np.concatenate([np.ravel(ops.convert_to_numpy(t)) for t in w]),
            self.variables,
            surface.model,
            self._step,
        )

    def _gradient_of_outputs(self, w, state, batch):
        """What the outputs do, if they are pulled by 1 up or down, on average over the examples."""

        def pulled(w):
            with self._surface.scope(w, state):
                outputs = self.model(batch[0], training=False)
            total = 0.0
            for z in keras.tree.flatten(outputs):
                if keras.backend.is_float_dtype(z.dtype):
                    units = z.shape[-1] if len(z.shape) > 1 else None
                    signs = np.random.default_rng(0).choice([-1.0, 1.0], units or 1)
                    total += ops.sum(ops.mean(z * ops.cast(signs, z.dtype), axis=0))
            return total, None

        return engine.value_and_gradient(pulled, w)[1]

    def matvec(self, v):
        """The product with one vector.

        Args:
            v: array of the shape `(size,)`.

        Returns:
            A NumPy array of that shape.
        """
        v = np.asarray(v)
        if v.shape != (self.size,):
            raise ValueError(
                f"Expected a vector with one entry per weight, of the shape ({self.size},). "
                f"Received: an array of the shape {v.shape}"
            )
        self.products += 1
        v = self.as_weights(v)
        if self._product is not None:
            product = self._surface.over_processes(list(self._product(v)), self._weight)
        else:
            product = self._surface.over_batches(lambda batch: self._multiply_anew(batch, v))
        return self._flat(product)

    def _multiply_anew(self, batch, v):
        """The product with a list of tensors, for one batch, with a forward pass of its own."""
        return list(self._anew(self._weights, v, self._state, batch))

    def _flat(self, tensors):
        """A list of tensors, one per variable, as a vector."""
        arrays = [np.ravel(ops.convert_to_numpy(t)) for t in tensors]
        return np.concatenate(arrays).astype(self.dtype, copy=False)

    def __matmul__(self, other):
        """`operator @ v` for a vector, or a matrix of columns, which are taken one by one."""
        other = np.asarray(other)
        if other.ndim == 2:
            # Measured on a CPU: with `jax.vmap`, five at once cost as much as five products.
            return np.stack([self.matvec(column) for column in other.T], axis=1)
        return self.matvec(other)

    def as_weights(self, v):
        """A vector as a list of tensors, one per variable, in their shapes and dtypes.

        Args:
            v: array of the shape `(size,)`, such as an eigenvector.

        Returns:
            A list of tensors.
        """
        parts = np.split(v, self._ends[:-1])
        return [
            ops.convert_to_tensor(part.reshape(shape), dtype=variable.dtype)
            for part, shape, variable in zip(parts, self._shapes, self.variables, strict=True)
        ]


class HessianOperator(_Operator):
    """The Hessian of the loss over fixed data: `operator @ v` is `∇²L(w) v`.

    ```
    L(w) = the compiled loss that model.evaluate(x, y) reports, in inference mode
    H v = d/dt ∇L(w + t v)  at t = 0
    ```

    The matrix is never formed. Its weights are those that the model has now;
    `refresh` moves on to later ones. The model is left as it is.

    With one batch of data the forward pass is done once, and each product
    costs about two gradients; what the pass computes stays in memory. With
    several batches each product repeats the pass, at close to three
    gradients, and memory holds one batch at a time. So a `batch_size` below
    the number of examples saves memory. The result is the same.

    On several devices, the data are those of all of them, with one message per
    product.

    With each `refresh`, and when it is made, the operator compares products
    with differences of gradients, see `Certificate`: the derivative of a
    custom gradient, or an operation of the backend, may be wrong without an
    error. It takes two or three gradients and two products, of one batch.

    Vectors are flat NumPy arrays. SciPy's solvers take the operator as well,
    through `scipy.sparse.linalg.aslinearoperator`.

    Args:
        model: a compiled and built `keras.Model`, wrapped or not.
        x: the inputs: an array or a nested structure of arrays; or all the
            data, as a `tf.data.Dataset`, a `keras.utils.PyDataset` or a
            `torch.utils.data.DataLoader`, which yields `(x, y)` or
            `(x, y, sample_weight)`, and is read anew for each product.
        y: the targets, likewise. Defaults to `None`: none, or those in `x`.
        sample_weight: the weights of the examples, likewise.
        batch_size: Integer, how many examples of an array are evaluated at
            once. Defaults to `256`. A data set comes in batches of its own.
        variables: list of trainable variables, the block of the Hessian to
            take, such as `model.layers[0].trainable_variables`. Defaults to
            `None`, all of them.
        certify: Boolean, whether `refresh` compares a product with a
            difference of gradients. Defaults to `True`.

    Raises:
        ValueError: if the model is not compiled or not built, or has no
            trainable weights; if there are no data, or if they do not fit the
            model; if the loss is not finite, not deterministic, or depends on
            how the data are split into batches; if a product is wrong.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile("sgd", "mse")
    >>> hessian = keras_sharp.curvature.HessianOperator(model, np.diag([1.0, 3.0]), np.ones((2, 1)))
    >>> hessian @ np.eye(2)
    array([[1., 0.],
           [0., 9.]], dtype=float32)

    References:
        - [Pearlmutter, 1994](https://doi.org/10.1162/neco.1994.6.1.147)
    """

    _step = 4.0  # The smaller, the fewer kinks.

    def _matrix(self):
        def loss(w, state, batch):
            return self._surface.batch_loss(w, state, batch)[0]

        def gradient(u, w, state, batch):
            del w
            return engine.value_and_gradient(lambda t: (loss(t, state, batch), None), u)[1]

        return engine.hessian, [loss], gradient


@filled_in(HessianOperator)
class GaussNewtonOperator(_Operator):
    """The Gauss-Newton matrix of the loss over fixed data, `J' H J`.

    ```
    J = derivative of the outputs of the model by the weights
    H = Hessian of the loss by the outputs
    L''(w) = J' H J + Σ_i (∂L/∂outputs_i) * ∂²outputs_i/∂w²      # the rest is left out
    ```

    For a loss that is convex in the outputs it has no negative eigenvalues. It
    is the Hessian of a model that is linear in its weights, and near it where
    the gradient of the loss by the outputs is small. With a cross-entropy it
    is the Fisher information if the outputs are logits (`from_logits=True`).

    Args:
        model: see `HessianOperator`. Its loss must depend on the outputs
            alone: no regularizers, no `add_loss`, no `compute_loss` of its own.
        x: see `HessianOperator`.
        y: see `HessianOperator`.
        sample_weight: see `HessianOperator`.
        batch_size: see `HessianOperator`.
        variables: see `HessianOperator`.
        certify: see `HessianOperator`.

    Raises:
        ValueError: see `HessianOperator`; and if the loss depends on more than
            the outputs.

    References:
        - [Schraudolph, 2002](https://doi.org/10.1162/08997660260028683)
        - [Martens, 2020](https://arxiv.org/abs/1412.1193)
    """

    _step = 8.0  # Kinks do less harm.

    def _matrix(self):
        model, surface = self._surface.model, self._surface
        if type(model).compute_loss is not keras.Model.compute_loss:
            raise ValueError(
                f"The class {type(model).__name__} has a `compute_loss` of its own, which may "
                "depend on more than the outputs of the model. Expected a loss that was passed to "
                "`compile`. Use HessianOperator."
            )
        structure = None

        def outputs(w, state, batch):
            nonlocal structure
            with surface.scope(w, state):
                y_pred = model(batch[0], training=False)
                z = keras.tree.flatten(y_pred)
                if model.losses or any(map(engine.has_mask, z)):
                    raise ValueError(
                        f"The loss of the model {model.name!r} depends on more than its outputs. "
                        "Expected a model without regularizers, `add_loss` and masks. Use "
                        "HessianOperator."
                    )
            structure = keras.tree.map_structure(lambda t: 0, y_pred)
            return z

        def loss(z, state, batch):
            del state
            _, y, sample_weight = batch
            y_pred = keras.tree.pack_sequence_as(structure, z)
            with engine.stateless_scope([]):  # Leaves the metrics of several losses alone.
                return model.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight)

        def gradient(u, w, state, batch):
            # J' ∇loss with J at w and the outputs at u: its derivative by u is J' H J. Nothing but
            # first derivatives, and no jumps: the outputs are continuous, unlike their J.
            z = outputs(u, state, batch)
            (_, pulled) = engine.value_and_gradient(lambda t: (loss(t, state, batch), None), z)

            def value(t):
                return vectors.dot(outputs(t, state, batch), pulled), None

            return engine.value_and_gradient(value, w)[1]

        return engine.gauss_newton, [outputs, loss], gradient
