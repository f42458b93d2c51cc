"""The loss of one batch as a pure function of the weights."""

import copy
from typing import NamedTuple

import keras
from keras import ops

from keras_sharp import engine, vectors


class Evaluation(NamedTuple):
    """What the objective answers: how high is it here, and which way is up.

    Attributes:
        loss: scalar tensor.
        gradient: list with one tensor per weight, or `None` for a weight that
            the loss does not depend on.
    """

    loss: object
    gradient: list


class Report(NamedTuple):
    """The first pass of a step over the whole batch: what the logs and the statistics are of.

    Attributes:
        w: list of tensors, the weights that it was taken at.
        loss: scalar tensor.
        gradient: list of tensors, or `None` if no log needs it.
        aux: what the loss function returned beside the loss.
        frozen: list of tensors, the gradient of the frozen weights alone.
    """

    w: list
    loss: object
    gradient: list | None
    aux: object
    frozen: list


class Record(NamedTuple):
    """What is known of the passes of a step. Tensors only, which a conditional can hand on.

    Attributes:
        report: a `Report`, or `None` before the first pass over the whole batch.
        total: scalar tensor, finite if all losses and gradients so far were.
        num_gradients: scalar, how many gradients were taken; on a part of the
            batch, that share of one.
        is_perturbed: scalar, 1 if there was a pass after the reported one.
        grad_norm: scalar tensor, the norm of the reported gradient, of what was taken of it.
        perturbed_loss: scalar tensor, the loss of the last pass.
        grad_cosine: scalar tensor, of the reported gradient and the last one;
            `None` if no log needs it.
        aux: what the last pass left for the next one, or `None`.
    """

    report: Report | None = None
    total: object = 0.0
    num_gradients: object = 0.0
    is_perturbed: object = 0.0
    grad_norm: object = None
    perturbed_loss: object = None
    grad_cosine: object = None
    aux: object = None


class _Log:
    """What an objective and its parts remember together."""

    def __init__(self):
        self.record = Record()
        # A batch, weights, whether all of the gradient was taken, and the `Evaluation` there.
        self.answers = []


class Objective:
    """Loss and gradient of one batch at any weights: `objective(w)`.

    Asking changes nothing: every call sees the same batch, the same dropout
    masks and the same state of the model, and writes to no variable. A method
    may ask as often as it likes; each call costs a forward and a backward
    pass, but to ask again for the same list of weights costs nothing.

    The first pass over the whole batch is the one that is reported: the loss
    in the logs, the metrics and the statistics of BatchNormalization are its
    own. For most methods that is the one at the weights of the model.

    Args:
        loss_fn: function of the weights, a list of tensors, that returns the
            loss, a scalar tensor.
        perturbed: list of Booleans, one per weight: `True` if the weight
            takes part in the perturbation. Defaults to all of them.
        biases: list of Booleans, one per weight: `True` for a bias, which
            ASAM does not scale. Defaults to none.
        frozen: list of Booleans, one per weight: `True` if its gradient is
            none of the method's business. Defaults to none.
        loss_scale: scalar by which the loss is multiplied before, and the
            gradient divided after, the backward pass, for float16. Defaults
            to `None`, no scaling.
        average: function that takes a list, the loss and the gradient of this
            replica, and the batch they are of, and returns their means over
            all replicas. Defaults to `None`, one replica by itself.
        step: integer tensor, the number of steps of the optimizer so far.
            Defaults to `0`; `None` if it is not known.
        seed: integer tensor, from which random numbers are drawn, together
            with `step`. Defaults to `None`: there are none.

    Example:

    >>> objective = Objective(lambda w: 0.5 * ops.sum(w[0] ** 2))
    >>> loss, gradient = objective([ops.convert_to_tensor([3.0, 4.0])])
    >>> float(loss)
    12.5
    """

    def __init__(
        self,
        loss_fn,
        perturbed=None,
        biases=None,
        frozen=None,
        loss_scale=None,
        average=None,
        step=0,
        seed=None,
    ):
        self._value = lambda w, batch: (loss_fn(w), None)
        self._perturbed = perturbed
        self.biases = biases
        self._frozen = frozen
        self._loss_scale = loss_scale
        self._average = average
        self._step = step
        self._seed, self._num_draws = seed, 0
        self._batch = None
        self._share = 1.0  # Of the batch that it sees.
        self._hand_on = self._losses = None
        self._wants_cosine = self._takes_all = False
        self._log = _Log()

    @classmethod
    def with_aux(
        cls,
        value_fn,
        batch=None,
        hand_on=None,
        losses=None,
        wants_cosine=False,
        takes_all=False,
        **kwargs,
    ):
        """An objective from a function of weights and batch that returns `(loss, aux)`.

        Args:
            value_fn: the function.
            batch: nested structure of tensors, its second argument. Defaults
                to `None`: there is none, and no part of it to be had.
            hand_on: function of `aux` that returns what is to be found in
                `record.aux` in the next pass. Defaults to `None`: nothing.
            losses: function of `aux` and the batch that returns the loss of
                each example. Defaults to `None`: there is none.
            wants_cosine: Boolean, whether to record `grad_cosine`.
            takes_all: Boolean, whether `uphill` takes all of the gradient, since
                its norm is of interest. Defaults to `False`.
            **kwargs: as the constructor.
        """
        objective = cls(None, **kwargs)
        objective._value, objective._batch = value_fn, batch
        objective._hand_on, objective._wants_cosine = hand_on, wants_cosine
        objective._losses, objective._takes_all = losses, takes_all
        return objective

    @property
    def step(self):
        """The number of steps of the optimizer so far, an integer tensor.

        Raises:
            ValueError: if nobody has told it.
        """
        if self._step is None:
            raise ValueError(
                "The method goes by the number of steps so far, which is not known. Received: "
                "step=None. Pass it to `sharpness_aware_gradient`: `step=optimizer.iterations`, "
                "say."
            )
        return self._step

    @property
    def record(self):
        """The `Record` of the passes so far."""
        return self._log.record

    def __call__(self, w):
        """Loss and gradient at the weights `w`.

        Args:
            w: list of tensors, one per weight.

        Returns:
            An `Evaluation`, the pair `(loss, gradient)`.
        """
        return self._ask(w)

    def uphill(self, w):
        """Loss and gradient at the weights `w`, by those weights alone that are perturbed.

        All that an adversary needs, for less: where some weights are not
        perturbed, their gradient is not computed. Ask for it where the gradient
        serves for nothing else.

        Args:
            w: list of tensors, one per weight.

        Returns:
            An `Evaluation`, whose gradient may be `None` for weights that are
            not perturbed.
        """
        taken = self._taken_uphill()
        return self(w) if taken is None else self._ask(w, taken)

    def _taken_uphill(self):
        """Booleans, one per weight: whose gradient to take; `None` if that is all of them."""
        if self._takes_all or self._perturbed is None or not any(self._perturbed):
            return None
        frozen = self._frozen or [False] * len(self._perturbed)
        taken = [a or b for a, b in zip(self._perturbed, frozen, strict=True)]
        return None if all(taken) else taken

    def _ask(self, w, taken=None):
        """The answer at `w`, found or computed. That of all weights is one for some of them."""
        for batch, point, is_whole, answer in self._log.answers:
            if batch is self._batch and point is w and (is_whole or taken is not None):
                return answer
        answer = self._evaluate(self._value, w, taken=taken)
        self._log.answers.append((self._batch, w, taken is None, answer))
        return answer

    def part(self, share):
        """This objective on a part of the batch only, where asking is cheaper.

        What is asked there is never the pass that is reported.

        Args:
            share: Float in (0, 1], how much of the batch. At least one
                example is taken.

        Returns:
            An `Objective`.

        Raises:
            ValueError: if `share` is no such number, or if the objective knows
                of no batch, as in `sharpness_aware_gradient`.
        """
        if not isinstance(share, float) or not 0 < share <= 1:
            raise ValueError(
                f"A part of a batch is a share of it, a float in (0, 1]. Received: share={share!r}"
            )
        if self._batch is None:
            raise ValueError(
                "This objective is a function of the weights alone: it knows of no batch that it "
                f"could take a part of. Received: share={share!r}. A method that asks for a part "
                "needs the `SharpnessAwareModel` around it."
            )
        part = copy.copy(self)
        part._batch, part._share = engine.part_of_batch(self._batch, share), share * self._share
        return part

    def losses(self, w):
        """The loss of each example at the weights `w`, without a gradient.

        Costs a forward pass; none at the weights of the reported pass.

        Args:
            w: list of tensors, one per weight.

        Returns:
            A tensor of the shape `(batch_size,)`.

        Raises:
            ValueError: if there is no loss of each example, as in
                `sharpness_aware_gradient`.
        """
        if self._losses is None:
            raise ValueError(
                "This objective is a function of the weights alone: it does not know the losses of "
                "single examples. A method that asks for them needs the `SharpnessAwareModel` "
                "around it."
            )
        report = self.record.report
        if report is not None and report.w is w and self._share == 1.0:
            aux = report.aux
        else:
            aux = self._value(w, self._batch)[1]
        return ops.stop_gradient(self._losses(aux, self._batch))

    def take_largest(self, values, share):
        """This objective on those examples of the batch that have the largest values.

        Args:
            values: tensor of the shape `(batch_size,)`.
            share: Float in (0, 1], how many of the examples. At least one is
                taken.

        Returns:
            An `Objective`. What is asked there is never the pass that is
            reported.
        """
        part = copy.copy(self)
        part._batch = engine.largest_of_batch(self._batch, values, share)
        part._share = share * self._share
        return part

    def cond(self, condition, if_true, if_false):
        """The value of one of two functions. What the other one would ask is not computed.

        `keras.ops.cond` for functions that ask the objective, whose passes it
        keeps account of. Functions may be nested.

        Args:
            condition: scalar Boolean tensor. In `"global"` scope it must be
                the same on all replicas.
            if_true: function without arguments that returns tensors in tuples,
                lists and dictionaries, with `None` for one that is not there.
            if_false: likewise; the same structure, shapes and dtypes.

        Returns:
            What one of the two returned.

        Raises:
            ValueError: if the functions return different structures.
        """
        if engine.is_known(condition):  # Then there is nothing to hand out of a conditional.
            return if_true() if condition else if_false()
        log, outcomes = self._log, []
        before, answers = log.record, log.answers

        def branch(fn):
            def run():
                log.record, log.answers = before, list(answers)
                outcome = keras.tree.map_structure(_as_list, (fn(), log.record))
                structure = keras.tree.map_structure(lambda t: t is not None, outcome)
                outcomes.append((structure, log.record.report))
                if structure != outcomes[0][0]:
                    raise ValueError(
                        "Both functions of a conditional must return the same structure, and take "
                        "gradients of the same weights. Received: one that returns "
                        f"{outcomes[0][0]}, and one that returns {structure}."
                    )
                leaves = [t for t in keras.tree.flatten(outcome) if t is not None]
                return [t if ops.is_tensor(t) else ops.convert_to_tensor(t) for t in leaves]

            return run

        try:
            choose = engine.cond if self._average is None else engine.cond_of_all
            leaves = iter(choose(condition, branch(if_true), branch(if_false)))
        finally:
            log.record, log.answers = before, answers
        structure, report = outcomes[0]
        value, record = keras.tree.map_structure(
            lambda is_there: next(leaves) if is_there else None, structure
        )
        if report is not None and all(r is not None and r.w is report.w for _, r in outcomes):
            # Both were taken at the same weights: those, and no copies.
            record = record._replace(report=record.report._replace(w=report.w))
        log.record = record
        return value

    def random(self, shape):
        """Random numbers, uniform in [0, 1): others in each step, and in each call.

        All parts of a batch and all replicas see the same ones, and training
        that is resumed goes on with those that would have come. The class of
        the method must say `draws_random_numbers = True`.

        Args:
            shape: tuple of integers.

        Returns:
            A tensor of float32.

        Raises:
            ValueError: if the method does not say so.
        """
        if self._seed is None:
            raise ValueError(
                "There is no seed to draw random numbers from. Write `draws_random_numbers = True` "
                "into the class of the method: the wrapper then keeps a seed for it."
            )
        self._num_draws += 1
        return engine.random_uniform(shape, self._seed, self.step, self._num_draws)

    def through(self, ascent, w):
        """Loss and exact gradient of `L(ascent(w))` as a function of `w`.

        `objective(ascent(w))` gives the gradient at the perturbed weights;
        here the perturbation is differentiated as well, which brings in the
        Hessian.

        Args:
            ascent: function `(objective, w) -> w_adv`. The objective that it
                receives is this one, in a form that can be differentiated.
            w: list of tensors, one per weight.

        Returns:
            An `Evaluation`.
        """
        inner = copy.copy(self)
        inner._value = lambda v, batch: (self._value(v, batch)[0], None)
        inner._log, inner._hand_on = _Log(), None
        answer = self._evaluate(
            lambda v, batch: self._value(ascent(inner, v), batch), w, averages=True
        )
        self._count(inner.record.num_gradients)
        return answer

    def perturbed(self, g):
        """`g` without the entries of weights that are not to be perturbed."""
        if self._perturbed is None:
            return g
        if all(take or t is None for t, take in zip(g, self._perturbed, strict=True)):
            return g  # With its norm, if it knows that.
        return [t if take else None for t, take in zip(g, self._perturbed, strict=True)]

    def is_finite(self, direction):
        """Scalar Boolean tensor: is a direction finite, and was all on the way to it?"""
        total = self.record.total
        if not any(direction is answer.gradient for *_, answer in self._log.answers):
            norm = vectors.norm(direction)
            total = total + ops.cast(norm, total.dtype)
        return ops.isfinite(total)

    def _evaluate(self, value_fn, w, averages=False, taken=None):
        taken = taken or [True] * len(w)

        def scaled(weights):
            weights = iter(weights)
            point = [next(weights) if t else v for v, t in zip(w, taken, strict=True)]
            loss, aux = value_fn(point, self._batch)
            if self._loss_scale is None:
                return loss, (loss, aux)
            return loss * ops.cast(self._loss_scale, loss.dtype), (loss, aux)

        by = [v for v, t in zip(w, taken, strict=True) if t]
        (_, (loss, aux)), gradient = engine.value_and_gradient(scaled, by, averages)
        entries = iter(gradient)
        gradient = [next(entries) if t else None for t in taken]
        frozen = []
        if self._frozen is not None and any(self._frozen):
            pairs = list(zip(gradient, self._frozen, strict=True))
            frozen = [g if is_frozen else None for g, is_frozen in pairs]
            gradient = [None if is_frozen else g for g, is_frozen in pairs]
        if self._loss_scale is not None:
            # Before any norm or inner product is taken.
            gradient = vectors.map_present(
                lambda g: g / ops.cast(self._loss_scale, g.dtype), gradient
            )
        if self._average is not None:
            loss, *gradient = self._average([loss, *gradient], self._batch)
        answer = Evaluation(loss, vectors.Vector(gradient))
        self._enter(w, answer, aux, frozen)
        return answer

    def _enter(self, w, answer, aux, frozen):
        """Write a pass into the record."""
        loss, gradient = answer
        record, norm = self.record, gradient.norm
        if self._share == 1.0 and record.report is None:
            kept = list(gradient) if self._wants_cosine else None
            report = Report(w, loss, kept, aux, frozen)
            cosine = ops.ones_like(norm) if self._wants_cosine else None
            record = record._replace(report=report, grad_norm=norm, grad_cosine=cosine)
        elif record.report is not None:
            record = record._replace(is_perturbed=1.0)
            if self._wants_cosine:
                cosine = vectors.cosine(record.report.gradient, gradient)
                record = record._replace(grad_cosine=ops.cast(cosine, norm.dtype))
        # A sum is finite only if all its terms are: one check for all of them.
        total = record.total + (norm + ops.cast(loss, norm.dtype))
        handed_on = record.aux if self._hand_on is None else self._hand_on(aux)
        self._log.record = record._replace(total=total, perturbed_loss=loss, aux=handed_on)
        self._count(self._share)

    def _count(self, gradients):
        record = self.record
        self._log.record = record._replace(num_gradients=record.num_gradients + gradients)


def _as_list(entry):
    """A `Vector` as the list that it is, which conditionals can take apart."""
    return list(entry) if isinstance(entry, vectors.Vector) else entry
