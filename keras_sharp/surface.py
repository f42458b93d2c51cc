"""The loss of a model over fixed data as a function of its weights."""

import keras
import numpy as np
from keras import ops

from keras_sharp import engine, rounding, vectors
from keras_sharp.batches import open_data, size_of
from keras_sharp.delegation import unwrapped
from keras_sharp.docstrings import filled_in
from keras_sharp.objective import Evaluation
from keras_sharp.training.loss import compute_loss
from keras_sharp.weights import is_overwritten


class LossSurface:
    """The compiled loss over all the data, as a pure function of the weights.

    ```
    L(w) = Σ_b n_b * L_b(w) / Σ_b n_b      # over batches b with n_b examples
    ```

    It is the loss that `model.evaluate` reports for all data in one batch: in
    inference mode, regularizers included. How the data are split makes no
    difference; a loss for which it would is refused, as far as can be seen:
    what `add_loss` or a `compute_loss` of your own adds is taken for a mean
    over the examples. No call writes to the model. The data are read anew for
    each evaluation, batch after batch.

    Args:
        model: a compiled and built `keras.Model`, wrapped or not.
        x: the inputs: an array or a nested structure of arrays; or all the
            data, as a `tf.data.Dataset`, a `keras.utils.PyDataset` or a
            `torch.utils.data.DataLoader`, which yields `(x, y)` or
            `(x, y, sample_weight)`.
        y: the targets, likewise. Defaults to `None`: none, or those in `x`.
        sample_weight: the weights of the examples, likewise.
        batch_size: Integer, how many examples of an array are evaluated at
            once. Defaults to `256`. A data set comes in batches of its own.
        variables: list of those trainable variables of the model that `w`
            stands for, such as `model.layers[0].trainable_variables`; the
            others stay as they are. Defaults to `None`, all of them.

    The data are those that the `fit` of the model takes: a task of KerasHub
    preprocesses them, each time they are read.

    Raises:
        ValueError: if the model is not compiled or not built, or has no
            trainable weights; if there are no data, or no end to them; if
            `variables` are not those of the model. Later, by an evaluation:
            if the data do not fit the model, or if the loss would depend on
            the split into batches.

    Example:

    >>> from keras_sharp.surface import LossSurface
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile("sgd", "mse")
    >>> surface = LossSurface(model, np.array([[1.0], [2.0]]), np.zeros((2, 1)))
    >>> surface.loss([ops.convert_to_tensor([[2.0]])])
    10.0
    """

    def __init__(self, model, x, y=None, sample_weight=None, *, batch_size=256, variables=None):
        # Of a SharpnessAwareModel, the model inside computes the loss.
        self.model = unwrapped(model)
        _check_model(self.model)
        #: The variables that `w` stands for.
        self.variables = _choose(self.model, variables)
        chosen = {id(v) for v in self.variables}
        self._others = [v for v in self.model.variables if id(v) not in chosen]
        self._others += engine.global_seeds()
        self._data = open_data(self.model, x, y, sample_weight, batch_size)
        #: How many batches the last evaluation took.
        self.num_batches = 0
        #: How far the last loss may be off by rounding, in the units of the loss.
        self.rounding = 0.0
        self._batch_weights = []  # Of the last evaluation.
        self._works = False  # So far, no batch has been evaluated.
        self._loss_unit = rounding.unit("float32")
        self._masked = False

        self.compiled = (lambda fn: fn) if self.model.run_eagerly else engine.compiled
        self._loss = self.compiled(self.batch_loss)
        self._loss_and_gradient = self.compiled(
            lambda w, state, batch: engine.value_and_gradient(
                lambda v: self.batch_loss(v, state, batch), w
            )
        )

    # At some weights

    @property
    def weights(self):
        """The values of the variables now, a list of tensors: where the model stands."""
        # Copies: PyTorch trains its variables in place.
        return [ops.copy(engine.read(v)) for v in self.variables]

    @property
    def state(self):
        """The values now of all that the loss depends on beside `w` and the data."""
        return [ops.copy(engine.read(v)) for v in self._others]

    def loss(self, w, state=None):
        """The loss at the weights `w`.

        Args:
            w: list of tensors, one for each of `variables`.
            state: the value of `state` at another time. Defaults to `None`,
                now.

        Returns:
            Float.
        """
        return self._loss_and_state(w, self.state if state is None else state)[0]

    @filled_in(loss)
    def loss_and_gradient(self, w, state=None):
        """Loss and gradient at the weights `w`.

        Args:
            w: see `loss`.
            state: see `loss`.

        Returns:
            An `Evaluation`, the pair `(loss, gradient)`: a float, and a list.
        """
        loss, gradient = self._loss_and_gradient_at(w, state)
        return Evaluation(loss, vectors.Vector(gradient))

    @filled_in(loss)
    def slope(self, w, direction, state=None):
        """How fast the loss rises along a direction at the weights `w`.

        Args:
            w: see `loss`.
            direction: list of tensors like `w`.
            state: see `loss`.

        Returns:
            Float, the inner product of gradient and direction.
        """
        _, gradient = self._loss_and_gradient_at(w, state)
        return float(ops.convert_to_numpy(vectors.dot(gradient, direction)))

    def _loss_and_gradient_at(self, w, state):
        state, losses = self.state if state is None else state, []

        def evaluate(batch):
            (loss, _), gradient = self._loss_and_gradient(w, state, batch)
            losses.append(loss)
            return gradient

        gradient = self.over_batches(evaluate)
        return self._total_loss(losses), gradient

    def check(self):
        """Refuse a loss that is not finite, or is another one the next time.

        Raises:
            ValueError: if it is, or if the data do not fit the model.
        """
        w = self.weights
        # The second time, layers that draw random numbers draw the next ones.
        loss, state = self._loss_and_state(w, self.state)
        again, _ = self._loss_and_state(w, state)
        if not np.isfinite(loss):
            raise ValueError(
                f"The loss of the model {self.model.name!r} on these data is not finite. Received: "
                f"loss={loss}. Look for NaN or inf in the data and in the weights, and for targets "
                "that the loss has no value for."
            )
        if abs(loss - again) > 1e-4 * abs(loss) + 1e-7:
            raise ValueError(
                "The loss is not deterministic: evaluated twice at the same weights, it was "
                f"{loss} and {again}. Look for data that change from pass to pass (augmentation, a "
                "shuffled data set with `take`), and for layers that draw random numbers even with "
                "`training=False`."
            )

    def _loss_and_state(self, w, state):
        losses, after = [], state
        for loss, after in self._each_batch(lambda batch: self._loss(w, state, batch)):  # noqa: B007
            losses.append(loss)
        return self._total_loss(losses), after

    def _total_loss(self, losses):
        """The loss of all data, a float, from those of the batches."""
        values = as_floats([[loss] for loss in losses])[:, 0]
        self.rounding = self.rounding_of(values)
        return self.total(values)

    # Over the batches

    def batch_loss(self, w, state, batch):
        """The loss of one batch, and the state after it: a pure function of tensors.

        Args:
            w: list of tensors, one for each of `variables`.
            state: list of tensors, a value of `state`.
            batch: the triple `(x, y, sample_weight)`.

        Returns:
            A pair: the loss, a scalar tensor; and a list like `state`.
        """
        x, y, sample_weight = batch
        with self.scope(w, state) as scope:
            y_pred = self.model(x, training=False)
            self._masked |= any(map(engine.has_mask, keras.tree.flatten(y_pred)))
            loss = compute_loss(self.model, x, y, y_pred, sample_weight, training=False)
        self._loss_unit = rounding.unit(loss.dtype)
        if len(loss.shape) > 0:
            raise ValueError(
                "The compiled loss must be one number. Received: a loss of the shape "
                f"{tuple(loss.shape)}. Compile with a loss that is not of reduction='none'."
            )
        if not self._is_sum:
            loss = engine.loss_of_replica(loss)
        return loss, [scope.get_current_value(v) for v in self._others]

    def scope(self, w, state):
        """Within, the model has the weights `w` and the state `state`."""
        return engine.stateless_scope(
            [*zip(self.variables, w, strict=True), *zip(self._others, state, strict=True)]
        )

    def over_batches(self, fn):
        """What `fn` gives for all data, from what it gives for each batch.

        Args:
            fn: function of a batch, the triple `(x, y, sample_weight)` of
                tensors, that returns the batch's part of a gradient or the
                like: a list of tensors.

        Returns:
            A list like those of `fn`, combined as the losses of batches are.
        """
        combined, total = None, 0.0
        for new in self._each_batch(fn):
            weight = self._batch_weights[-1]
            total += weight
            if combined is None:
                combined = new
            elif self._is_sum:
                combined = vectors.add(combined, new)
            else:
                share = weight / total if total else 0.0
                combined = vectors.add(
                    vectors.scale(1.0 - share, combined), vectors.scale(share, new)
                )
        return self.over_processes(combined, total)

    def scalars(self, fn):
        """What `fn` gives for each batch, as floats.

        Args:
            fn: function of a batch, as that of `over_batches`, that returns a
                list of scalars. They are read when all batches are through,
                which on a GPU does not make one wait for the other.

        Returns:
            An array of float64 with a row per batch.
        """
        return as_floats(list(self._each_batch(fn)))

    def total(self, values):
        """What all data have together, of an array with an entry for each batch: a float.

        Batches are combined as their losses are, in float64.
        """
        return self._of_processes(float(self._shares() @ values))

    def error_of_total(self, errors):
        """How far `total` is off where each batch is off by so much, independently."""
        # Of several processes, the mean: no less, and the same number in all of them.
        return self._of_processes(float(np.linalg.norm(self._shares() * errors)))

    def _of_processes(self, number):
        if engine.num_replicas() == 1:
            return number
        part = [ops.convert_to_tensor(np.array(number))]
        return float(as_floats([self.over_processes(part, sum(self._batch_weights))])[0, 0])

    def rounding_of(self, losses):
        """How far `total` is off by the rounding of these losses of the batches."""
        units = self._loss_unit, rounding.coarsest_unit(self.model)
        noise = rounding.of_losses(losses, self._batch_weights, *units, self._is_sum)
        return self.error_of_total(noise)

    def _shares(self):
        """How much each batch of the last evaluation counts."""
        weights = np.array(self._batch_weights, "float64")
        return np.ones_like(weights) if self._is_sum else weights / (weights.sum() or 1.0)

    def _each_batch(self, fn):
        """Yields what `fn` returns for each batch."""
        self.num_batches, self._batch_weights = 0, []
        for batch in self.batches():
            self.num_batches += 1
            result = self._try(fn, batch)
            self._batch_weights.append(self.batch_weight(batch))
            if self.num_batches > 1 or engine.num_replicas() > 1:
                self._check_split(batch)
            yield result
        if self.num_batches == 0:
            raise ValueError("There are no data: `x` yields no batch. Expected at least one.")

    def over_processes(self, part, weight):
        """What all processes of PyTorch have together, from what each has of its own data.

        Args:
            part: list of tensors, combined over the batches of this process.
            weight: the sum of the weights of these batches.

        Returns:
            A list like it, the same in all processes. One message.
        """
        if self._is_sum:
            return engine.sum_over_processes(part)
        return engine.mean_over_processes(part, weight)

    def batches(self, change=lambda arrays: arrays):
        """The data, in triples `(x, y, sample_weight)` of tensors.

        Args:
            change: function applied to each triple of arrays before. Defaults
                to nothing.
        """
        for batch in self._data.get_numpy_iterator():
            yield engine.as_tensors(change(keras.utils.unpack_x_y_sample_weight(batch)))

    @property
    def num_examples(self):
        """Integer, the number of examples. Reads the data once."""
        return sum(size_of(batch) for batch in self.batches())

    def _try(self, fn, batch):
        """`fn(batch)`; if the very first one fails, say what it was given."""
        if self._works:
            return fn(batch)
        try:
            # Metrics of the losses, which Keras makes when it first computes them.
            engine.build_symbolically(self.model, batch)
            result = fn(batch)
        except Exception as error:
            shapes = keras.tree.map_structure(lambda t: None if t is None else t.shape, batch)
            raise ValueError(
                f"The loss of the model {self.model.name!r} cannot be computed on these data. "
                f"Received: batches whose inputs, targets and sample weights have the shapes "
                f"{shapes}. Expected what `model.evaluate` takes. The cause: {error}"
            ) from error
        self._works = True
        return result

    @property
    def _reductions(self):
        """How the compiled losses make one number of a batch."""
        names = {getattr(loss, "reduction", _MEAN) for loss in keras.tree.flatten(self.model.loss)}
        return {_MEAN if name == "mean" else name for name in names}

    @property
    def _is_sum(self):
        """Whether the losses of batches add up, or else have a mean."""
        return self._reductions == {"sum"}

    def batch_weight(self, batch):
        """The weight of the loss of a batch in the mean of all."""
        sample_weight = batch[2]
        if self._reductions == {"mean_with_sample_weight"} and sample_weight is not None:
            return float(ops.sum(keras.tree.flatten(sample_weight)[0]))
        return size_of(batch)

    def _check_split(self, batch):
        """Refuse several batches, or replicas, if the loss would depend on the split."""
        reductions, (_, _, sample_weight) = self._reductions, batch
        if sample_weight is None:
            reductions = {name.replace("mean_with_sample_weight", _MEAN) for name in reductions}
        problems = {
            f"its losses have different reductions, {sorted(reductions)}": len(reductions) > 1,
            "its losses are means over sample weights, one per output": (
                reductions == {"mean_with_sample_weight"}
                and len(keras.tree.flatten(sample_weight)) > 1
            ),
            "its loss is a sum, to which each batch adds the regularizers": (
                reductions == {"sum"} and any(v.regularizer for v in self.model.trainable_variables)
            ),
            "its predictions are masked, and the loss is a mean over what is left": (
                self._masked and reductions != {"sum"}
            ),
            "an activity regularizer is a sum over the batch": any(
                layer.activity_regularizer for layer in engine.all_layers(self.model)
            ),
        }
        for problem, present in problems.items():
            if present:
                raise ValueError(
                    f"The loss of the model {self.model.name!r} depends on how the data are split "
                    f"into batches: {problem}. Received: more than one batch, or several "
                    "processes. Pass all the data as one batch; for arrays, set `batch_size` to "
                    "the number of examples. With tf.distribute, leave `strategy.scope()`."
                )


_MEAN = "sum_over_batch_size"


def as_floats(rows):
    """Lists of scalar tensors or floats as an array of float64."""
    return np.array([[float(ops.convert_to_numpy(t)) for t in row] for row in rows], "float64")


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a compiled keras.Model. Received: {model!r} (of type {type(model).__name__})"
        )
    if not model.compiled or not model.built:
        raise ValueError(
            "The loss is the compiled loss, at the weights of the model. Received: "
            f"model.compiled={model.compiled}, model.built={model.built}. Call `compile`, and "
            "`build` or `fit`, first."
        )
    if not model.trainable_variables:
        raise ValueError(
            f"The model {model.name!r} has no trainable weights, on which its loss could depend. "
            "Set `trainable = True` on some layer, and compile again."
        )
    engine.check_layers(model)


def _choose(model, variables):
    """The trainable variables that `variables` lists, in the order of the model."""
    # What float8 layers put in place of the gradient of their scales is no slope.
    possible = [v for v in model.trainable_variables if not is_overwritten(v)]
    if variables is None:
        return possible
    chosen = {id(v) for v in variables}
    unknown = [v for v in variables if id(v) not in {id(p) for p in possible}]
    if unknown or not chosen:
        raise ValueError(
            "`variables` must list trainable variables of the model. Received: "
            f"{len(chosen)} variables, {len(unknown)} of which are not: "
            f"{[getattr(v, 'path', v) for v in unknown[:5]]}. Pass for example "
            "`model.layers[0].trainable_variables`."
        )
    return [v for v in possible if id(v) in chosen]


def as_surface(model, x, y, sample_weight, batch_size):
    """The surface of a model and data, or the one given in place of a model."""
    if not isinstance(model, LossSurface):
        return LossSurface(model, x, y, sample_weight, batch_size=batch_size)
    if x is not None:
        raise ValueError(
            "A LossSurface has its data. Received: a LossSurface, and data `x`. Pass the surface "
            "alone, or a model and data."
        )
    return model
