"""One step of training: ask the method, then write the outcome, all of it or nothing."""

import keras
from keras import ops

from keras_sharp import engine, vectors
from keras_sharp.batches import size_of
from keras_sharp.objective import Objective
from keras_sharp.training.loss import State, TrainingLoss
from keras_sharp.weights import is_bias, is_overwritten


class Step:
    """One step of training of a `SharpnessAwareModel`, on any backend.

    Args:
        wrapper: the compiled `SharpnessAwareModel`.
        takes_part: function of a variable that returns whether it is perturbed.
        extra_logs: the `ExtraLogs` of the wrapper.
        check_batch_size: function of the number of examples in a batch that
            raises if there are too few for `num_micro_batches`.
    """

    def __init__(self, wrapper, takes_part, extra_logs, check_batch_size):
        self.wrapper, self.method, self.optimizer = wrapper, wrapper.method, wrapper.optimizer
        self._takes_part, self._extra_logs = takes_part, extra_logs
        self._check_batch_size = check_batch_size

    def __call__(self, data):
        """Take the step.

        Args:
            data: a batch, as Keras hands it to `train_step`.

        Returns:
            The logs, a dictionary.
        """
        wrapper = self.wrapper
        x, y, sample_weight = batch = keras.utils.unpack_x_y_sample_weight(data)
        size = size_of(x)
        hyperparameters, moved = self._hyperparameters()
        loss = TrainingLoss(wrapper)
        state = loss.current_state()

        def run(carried, batch):
            noise, trackers = carried
            before = state._replace(noise=noise, trackers=trackers)
            result, after = self._ask_method(loss, before, batch, hyperparameters)
            noise, statistics, trackers = after.state
            left = statistics, after.written
            return (noise, trackers), (result, left), (after.y_pred, after.masks)

        def run_parts(carried, batch):
            if wrapper.num_micro_batches == 1:
                return run(carried, batch)
            self._check_batch_size(size_of(batch))
            # Each part hands seeds and metrics to the next; all else is averaged.
            return engine.average_micro_batches(run, carried, batch, wrapper.num_micro_batches)

        carried = state.noise, state.trackers
        if wrapper.perturbation_scope == "replica":
            outcome = engine.average_replicas(run_parts, carried, batch)
        else:
            # The result is that of all replicas already, and the same on each.
            carried, (result, left), outputs = run_parts(carried, batch)
            outcome = carried, (result, engine.mean_over_replicas(left, size)), outputs
        (noise, trackers), (result, (statistics, written)), (y_pred, masks) = outcome
        engine.set_masks(y_pred, masks)  # Gradients, and parts put together, have lost them.
        if wrapper.num_micro_batches > 1:
            trackers = self._report_losses_of_outputs(loss, trackers, y, y_pred, sample_weight)
        self._commit(loss, State(noise, statistics, trackers), written, moved, result)

        engine.loss_tracker(wrapper).update_state(result["loss"], sample_weight=size)
        logs = dict(wrapper.compute_metrics(x, y, y_pred, sample_weight))
        logs |= self._extra_logs.update(result["extra_logs"], result["is_perturbed"], size)
        if "skipped_steps" in wrapper.extra_logs:
            logs["skipped_steps"] = engine.read(wrapper.skipped_steps)
        if "rho" in hyperparameters:
            logs["rho"] = hyperparameters["rho"]
        return logs

    def _hyperparameters(self):
        """The hyperparameters of this step.

        Returns:
            The values by name, a dictionary; and a list of variables that the
            step moves, each in a pair with its new value.
        """
        moved, highest_so_far = [], self.wrapper.highest_learning_rate

        def learning_rate():
            now = ops.cast(self.optimizer.learning_rate, highest_so_far.dtype)
            highest = ops.maximum(now, engine.read(highest_so_far))
            moved.append((highest_so_far, highest))
            return now, highest

        def read(variable):  # One may follow another, which comes first.
            return next((value for v, value in moved if v is variable), engine.read(variable))

        step = ops.convert_to_tensor(self.optimizer.iterations)
        values = {}
        for name, setting in self.method.settings.items():
            values[name] = setting.value_at(step, learning_rate, read)
            if setting.schedule is not None:
                moved.append((setting.variable, values[name]))
        return values, moved

    def _ask_method(self, loss, before, batch, hyperparameters):
        """Ask the method for the direction on one (micro-)batch. Writes to no variable.

        Returns:
            A pair: a dictionary with the direction and what else the step
            needs; and the `Pass` that is reported.
        """
        w = [engine.read(v) for v in loss.weights]
        memory = [engine.read(v) for v in self.wrapper.method_state]
        seed = memory.pop() if self.method.draws_random_numbers else None
        scale = self._loss_scale()
        objective = self._objective(loss, w, before, batch, scale, seed)
        direction, memory, *by_pass = self.method.step(objective, w, memory, **hyperparameters)
        finite, record = objective.is_finite(direction), objective.record
        for part in by_pass:
            finite = ops.logical_and(finite, objective.is_finite(part))
        report = record.report
        if report is None:
            raise ValueError(
                f"A step must take a gradient over the whole batch, whose loss the logs report. "
                f"Received: the method {type(self.method).__name__}, which took none."
            )
        if scale is not None:
            direction = vectors.scale(scale, direction)
        if report.frozen:
            direction = vectors.add(direction, report.frozen)
        after = report.aux._replace(written=_follow(w, report.w, report.aux.written, alone=True))
        if self.wrapper.fresh_noise:  # The next step must not see the masks of the last pass again.
            after = after._replace(state=after.state._replace(noise=record.aux))
        result = {
            "loss": report.loss,
            "direction": list(direction),
            "by_pass": [list(part) for part in by_pass],
            "method_state": list(memory) if seed is None else [*memory, seed],
            "finite": ops.cast(finite, "float32"),
            "is_perturbed": ops.convert_to_tensor(record.is_perturbed, "float32"),
            "extra_logs": self._extra_logs.values(record),
        }
        return result, after

    def _objective(self, loss, w, before, batch, scale, seed):
        """What the method may ask: the training loss of a batch, from the state `before`."""
        fresh_noise = self.wrapper.fresh_noise

        def value(v, batch):
            report, noise = objective.record.report, before.noise
            if fresh_noise and objective.record.aux is not None:
                noise = objective.record.aux
            point = v if report is None else _follow(v, report.w, report.aux.written)
            return loss(point, before._replace(noise=noise), batch, perturbed=v is not w)

        def average(tensors, batch):
            if engine.num_replicas() == 1:
                return tensors
            return engine.mean_over_replicas(tensors, size_of(batch))

        objective = Objective.with_aux(
            value,
            batch,
            hand_on=(lambda aux: aux.state.noise) if fresh_noise else None,
            losses=lambda aux, batch: self._losses_of_examples(aux.y_pred, batch),
            wants_cosine="grad_cosine" in self.wrapper.extra_logs,
            takes_all=self._extra_logs.are_of_the_gradient,
            perturbed=[self._takes_part(v) and not is_overwritten(v) for v in loss.weights],
            biases=[is_bias(v) for v in loss.weights],
            frozen=[is_overwritten(v) for v in loss.weights],
            loss_scale=scale,
            average=average if self.wrapper.perturbation_scope == "global" else None,
            step=ops.convert_to_tensor(self.optimizer.iterations),
            seed=seed,
        )
        return objective

    def _losses_of_examples(self, y_pred, batch):
        """The compiled loss of each example, a tensor of the shape `(batch_size,)`."""
        _, y, sample_weight = batch
        own = type(self.wrapper.model).compute_loss is not keras.Model.compute_loss
        loss = None if own else self.wrapper.loss
        single = [y, y_pred, sample_weight]
        if isinstance(loss, (dict, list, tuple, type(None))) or any(map(_is_nested, single)):
            raise ValueError(
                f"The method {type(self.method).__name__} goes by the losses of single examples, "
                "which Keras tells of a model with one output and one loss. Received: "
                f"loss={self.wrapper.loss!r}, and predictions of the structure "
                f"{keras.tree.map_structure(lambda t: '.', y_pred)!r}"
                f"{', of a model with a `compute_loss` of its own' if own else ''}. Use another "
                "method, or ESAM(gamma=1.0)."
            )
        loss = keras.losses.get(loss)
        each = _OfEach(loss.call if isinstance(loss, keras.losses.Loss) else loss)
        losses = each(y, y_pred, sample_weight)
        return ops.mean(ops.reshape(losses, (ops.shape(losses)[0], -1)), axis=1)

    def _loss_scale(self):
        """The factor that keeps float16 gradients from underflow, or `None`."""
        if scales_loss_dynamically(self.optimizer) or self.optimizer.loss_scale_factor is not None:
            return self.optimizer.scale_loss(ops.ones((), "float32"))
        return None

    def _report_losses_of_outputs(self, loss, trackers, y, y_pred, sample_weight):
        """Update the logs of losses per output. Returns `trackers` without their variables."""
        # Compiled, Keras weighs them by batches: a part would count as much as a larger one.
        model = self.wrapper.model
        of_outputs = engine.losses_of_outputs(model)
        if not of_outputs:
            return trackers
        engine.update_losses_of_outputs(model, y, y_pred, sample_weight)
        done = {id(v) for metric in of_outputs for v in metric.variables}
        return [
            None if id(v) in done else value
            for v, value in zip(loss.variables.trackers, trackers, strict=True)
        ]

    def _commit(self, loss, after, written, moved, result):
        """Write the outcome of a step into the variables, all of it or nothing."""
        wrapper, optimizer, weights = self.wrapper, self.optimizer, loss.weights
        # Here, since a conditional on JAX cannot read that of a LossScaleOptimizer.
        learning_rate = ops.convert_to_tensor(optimizer.learning_rate)
        # The mean over micro-batches of 1 for finite and 0 for not.
        finite = ops.logical_and(result["finite"] > 1 - 1e-6, ops.isfinite(learning_rate))
        direction = result["direction"]
        _assign(loss.variables.trackers, after.trackers)  # They tell of skipped steps, too.
        state = [*loss.variables.noise, *loss.variables.statistics, *wrapper.method_state]
        values = [*after.noise, *after.statistics, *result["method_state"]]
        own_skip = scales_loss_dynamically(optimizer)

        def write():
            _assign(state, values)
            _assign(weights, written)
            for variable, value in moved:
                variable.assign(value)
            if not own_skip:
                engine.apply(optimizer, direction, weights)
            for part in result["by_pass"]:
                _descend(weights, part, learning_rate)

        def skip():
            wrapper.skipped_steps.assign_add(1)

        assigned = [wrapper.skipped_steps, *state, *(variable for variable, _ in moved)]
        if own_skip:
            assigned += [v for v, value in zip(weights, written, strict=True) if value is not None]
        else:
            assigned += [*weights, *optimizer.variables]
        engine.run_either(finite, write, skip, assigned)
        if own_skip:
            # It skips the step, and lowers its scale, by itself when it sees a NaN.
            poison = ops.where(finite, 0.0, float("nan"))
            direction = vectors.map_present(lambda d: d + ops.cast(poison, d.dtype), direction)
            engine.apply(optimizer, direction, weights)


def scales_loss_dynamically(optimizer):
    """Whether an optimizer skips steps that are not finite, and scales the loss, by itself."""
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


class _OfEach(keras.losses.Loss):
    """A loss as Keras computes it, before it is averaged."""

    def __init__(self, fn):
        super().__init__(name="of_each", reduction=None)
        self.call = fn


def _descend(weights, direction, learning_rate):
    """What the step of an optimizer without memory does, constraints included."""
    for variable, d in zip(weights, direction, strict=True):
        if d is None:
            continue
        value = engine.read(variable) - ops.cast(learning_rate, d.dtype) * d
        variable.assign(value if variable.constraint is None else variable.constraint(value))


def _is_nested(structure):
    return structure is not None and keras.tree.is_nested(structure)


def _follow(v, w, written, alone=False):
    """The point `v`, moved as a pass at `w` has moved the weights that a layer has written to.

    Args:
        v: list of tensors, a point that a method asks for.
        w: list of tensors, the point of that pass.
        written: list of tensors, what the layers put in the place of `w`, with
            `None` where they put nothing.
        alone: Boolean, whether to leave out what did not move, as `None`.
    """

    def move(a, b, new):
        if new is None:
            return None if alone else a
        # Without a detour through the difference, which would round.
        return new if a is b else a + (new - b)

    return [move(*three) for three in zip(v, w, written, strict=True)]


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        if value is not None:
            variable.assign(value)
