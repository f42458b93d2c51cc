"""The step of each method by hand: the papers' formulas, and the backend's own autodiff.

Nothing here imports keras_sharp. A plain, compiled Keras model is trained: perturbed weights
are assigned to its variables, the gradient is taken there, and everything is put back. All
weights with a gradient stand in one long vector.
"""

import copy
import importlib

import keras
import numpy as np
from keras import ops

from keras_sharp.engine._keras import get_keras_mask, set_keras_mask
from tests import models
from tests.fuzz.cases import AHEAD
from tests.fuzz.programs import Schedule
from tests.models import BACKEND, assign, values

#: Arguments of the methods, beside rho.
NUMBERS = {
    "looksam": {"k": 2, "alpha": 0.7},
    "momentum_sam": {"momentum": 0.8},
    "friendly_sam": {"sigma": 0.9, "decay": 0.7},
    "wsam": {"gamma": 0.6},
    "ascent_share": {"ascent_share": 0.5},
}

adapter = importlib.import_module(f"tests.fuzz._{BACKEND}")


def train(model, case, data, validation=None):
    """Train a compiled model by hand, as `programs.train` lets `fit` do it: the logs."""
    hand = _Hand(model, case)
    logs = []
    for _ in range(case.epochs):
        if case.call == "fit":
            hand.reset()
        for batch in data.batches(case.batch_size):
            if case.call == "train_on_batch":  # It reports on this batch alone.
                hand.reset()
            hand.step(batch)
            if case.call == "train_on_batch":
                logs.append(hand.logs())
        if case.call == "fit":
            logs.append(hand.logs())
            if case.validation:
                x, y, weight = validation.part(0, len(validation))
                found = model.evaluate(
                    x, y, case.batch_size, sample_weight=weight, verbose=0, return_dict=True
                )
                logs[-1].update({f"val_{k}": np.array(v) for k, v in found.items()})
    if case.call == "fit":
        model.optimizer.finalize_variable_values(model.trainable_variables)
    return logs


class _Hand:
    def __init__(self, model, case):
        self.model, self.case = model, case
        self.highest_learning_rate = 0.0
        self.memory = None  # What the method remembers, one long vector.
        self.reset()

    def reset(self):
        self.model.reset_metrics()
        self.extra = {}

    def logs(self):
        logs = {
            k: np.array(ops.convert_to_numpy(v)) for k, v in self.model.get_metrics_result().items()
        }
        if self.case.extra_logs:
            for name in ("perturbed_loss", "sharpness", "grad_norm", "grad_cosine"):
                # Where no step has asked an adversary, there is nothing to tell of one.
                total, size = self.extra.get(name, (np.nan, 1))
                logs[name] = np.array(total / size)
        if self.case.method is not None:
            logs["rho"] = np.array(self.rho)
        return logs

    def hyperparameters(self):
        case, optimizer = self.case, self.model.optimizer
        rate = float(ops.convert_to_numpy(optimizer.learning_rate))
        self.highest_learning_rate = max(self.highest_learning_rate, rate)
        self.rho, self.now = case.rho, int(ops.convert_to_numpy(optimizer.iterations))
        if case.scheduled:
            self.rho = float(Schedule(case.rho)(self.now))
        self.asks = (
            case.method is not None
            and {
                None: True,
                "every_2": self.now % 2 == 0,
                "from_1": self.now >= 1,
                "until_1": self.now < 1,
                "from_every": self.now >= 1 and self.now % 2 == 0,
            }[case.policy]
        )
        self.rho_min = self.rho_max() * rate / self.highest_learning_rate

    def rho_max(self):
        """BSAM's lower radius follows its upper one, where nothing else is said."""
        return self.rho

    def step(self, batch):
        """One step of training."""
        case, model = self.case, self.model
        self.hyperparameters()
        size = len(keras.tree.flatten(batch[0])[0])
        variables = [*model.trainable_variables, *model.non_trainable_variables]
        floats = [keras.backend.is_float_dtype(v.dtype) for v in variables]
        before, parts = values(variables), []
        trackers = values(model.metrics_variables)
        for part in _split(batch, case.micro_batches, size):
            # Each part starts from the same weights and statistics; seeds and counters go on.
            for variable, value, is_float in zip(variables, before, floats, strict=True):
                if is_float:
                    variable.assign(value)
            parts.append(self.part(part))
        finite = all(p["finite"] for p in parts)

        def mean(arrays):
            if arrays[0] is None:
                return None
            pairs = zip(parts, arrays, strict=True)
            return sum(p["size"] / size * np.asarray(a, "float64") for p, a in pairs)

        lasting = zip(*(p["variables"] for p in parts), strict=True)
        for variable, old, is_float, new in zip(variables, before, floats, lasting, strict=True):
            left = old if not finite else mean(new) if is_float else new[-1]
            variable.assign(np.asarray(left).astype(old.dtype))
        if finite:
            self.memory = mean([p["memory"] for p in parts])
        self.apply([mean(d) for d in zip(*(p["direction"] for p in parts), strict=True)], finite)
        if case.micro_batches > 1:
            assign(model.metrics_variables, trackers)
        self.report(batch, parts, mean([p["loss"] for p in parts]), size)

    def apply(self, direction, finite):
        optimizer, variables = self.model.optimizer, self.model.trainable_variables
        dynamic = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if not finite and not dynamic:
            return
        scale = self.scale() * (1.0 if finite else float("nan"))
        adapter.apply(
            self.model,
            [
                None if d is None else (scale * d).astype(v.dtype)
                for d, v in zip(direction, variables, strict=True)
            ],
        )

    def report(self, batch, parts, loss, size):
        """Move the metrics, as plain training does after the whole batch."""
        model = self.model
        y_pred = keras.tree.map_structure(_concatenate, *(p["y_pred"] for p in parts))
        masks = [get_keras_mask(t) for t in keras.tree.flatten(y_pred)]
        tracker = next(m for m in model.metrics if m.name == "loss")

        def update(x, y, again, weight, y_pred, masks, loss):
            for t, mask in zip(keras.tree.flatten(y_pred), masks, strict=True):
                if mask is not None:
                    set_keras_mask(t, mask)
            if self.case.micro_batches > 1:  # The losses of each output are of the whole batch.
                model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=again)
            tracker.update_state(loss, sample_weight=size)
            model.compute_metrics(x, y, y_pred, weight)

        x, y, weight = models.tensors(copy.deepcopy(batch))
        again = models.tensors(copy.deepcopy(batch[2]))
        loss = ops.convert_to_tensor(loss, "float32")
        adapter.update_metrics(model, update, (x, y, again, weight, y_pred, masks, loss))
        for name in parts[0]["extra"]:
            value = sum(p["size"] * p["extra"][name] for p in parts)
            total, seen = self.extra.get(name, (0.0, 0))
            self.extra[name] = total + value, seen + size

    def scale(self):
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return float(ops.convert_to_numpy(optimizer.scale_loss(1.0)))
        return 1.0

    def part(self, batch):
        """Loss, predictions, direction and state of one part of the batch."""
        model, case, scale = self.model, self.case, self.scale()
        variables = model.trainable_variables
        before, noise = values(model.non_trainable_variables), adapter.noise()

        def tensors():  # Anew: Keras writes into the weights of masked examples on PyTorch.
            return models.tensors(copy.deepcopy(batch))

        lead = self.lead(batch) if self.asks and case.method in AHEAD else None
        loss, y_pred, g = adapter.forward_and_gradient(model, tensors(), scale)
        if lead is not None:
            assign(variables, lead)
        after, noise_after = values(model.non_trainable_variables), adapter.noise()
        trackers = values(model.metrics_variables)
        start = values(variables)

        used = [i for i, t in enumerate(g) if t is not None]
        shapes = [start[i].shape for i in used]
        w = models.flat([start[i] for i in used])
        g = _flat([g[i] for i in used])
        seen = {}

        def rewind():
            assign(model.non_trainable_variables, before)
            adapter.set_noise(noise)

        def gradient_at(v):
            rewind()
            for i, t in zip(used, models.like(v, [start[i] for i in used]), strict=True):
                variables[i].assign(t.astype(start[i].dtype))
            seen["loss"], _, at = adapter.forward_and_gradient(model, tensors(), scale)
            assign(variables, start)
            seen["gradient"] = _flat([at[i] for i in used])
            return seen["gradient"]

        def loss_at(v):
            ends = np.cumsum([0, *(int(np.prod(s)) for s in shapes)])
            mapping = [
                (variables[i], ops.cast(ops.reshape(v[a:b], shape), variables[i].dtype))
                for i, a, b, shape in zip(used, ends[:-1], ends[1:], shapes, strict=True)
            ]
            with _Scope(state_mapping=mapping, collect_losses=True):
                x, y, weight = tensors()
                out = model(x, training=True)
                return model.compute_loss(x=x, y=y, y_pred=out, sample_weight=weight)

        region = _Region(case, [variables[i] for i in used])
        memory = np.zeros_like(w) if self.memory is None else self.memory

        def adversary(rho, less=None):
            """The gradient at the adversary, who climbs along the gradient less a vector."""
            less = np.zeros_like(w) if less is None else less.astype(w.dtype)
            if not case.second_order:
                return gradient_at(w + region.ascend(gradient_at, w, g, rho, np, less))
            rewind()
            inner = adapter.differentiable_gradient(loss_at)
            left_out = ops.convert_to_tensor(less.astype(start[used[0]].dtype))

            def adversarial_loss(v):
                return loss_at(v + region.ascend(inner, v, inner(v), rho, ops, left_out))

            loss, at = adapter.value_and_gradient(adversarial_loss, w.astype(start[used[0]].dtype))
            seen.update(loss=loss, gradient=_flat([at]))
            return seen["gradient"]

        direction, memory = self.direction(adversary, g, memory) if self.asks else (g, memory)
        assign(model.non_trainable_variables, after)
        assign(model.metrics_variables, trackers)
        adapter.set_noise(noise_after)

        loss, seen = float(ops.convert_to_numpy(loss)), dict(seen)
        if "loss" in seen:
            seen["loss"] = float(ops.convert_to_numpy(seen["loss"]))
        finite = all(np.all(np.isfinite(t)) for t in (loss, g, direction, *seen.values()))
        whole = [None] * len(variables)
        for i, t in zip(used, models.like(direction, [start[i] for i in used]), strict=True):
            whole[i] = t
        return {
            "size": len(keras.tree.flatten(batch[0])[0]),
            "loss": loss,
            "y_pred": y_pred,
            "direction": whole,
            "memory": memory,
            "variables": [*start, *after],
            "finite": finite,
            "extra": self.extra_logs(loss, g, seen) if case.extra_logs else {},
        }

    def extra_logs(self, loss, g, seen):
        if not self.has_adversary():
            return {"grad_norm": np.linalg.norm(g)}
        perturbed, g_adv = seen.get("loss", loss), seen.get("gradient", g)
        lengths = np.linalg.norm(g) * np.linalg.norm(g_adv)
        return {
            "perturbed_loss": perturbed,
            "sharpness": perturbed - loss,
            "grad_norm": np.linalg.norm(g),
            "grad_cosine": g @ g_adv / lengths if lengths else 0.0,
        }

    def has_adversary(self):
        """Whether this step has a second pass over the whole batch."""
        if not self.asks or self.case.method in AHEAD:
            return False
        return self.case.method != "looksam" or self.now % NUMBERS["looksam"]["k"] == 0

    def lead(self, batch):
        """Perturb the weights before the pass that is reported: what they were."""
        model, case = self.model, self.case
        variables = model.trainable_variables
        before = values(variables)
        state, noise = values(model.non_trainable_variables), adapter.noise()
        trackers = values(model.metrics_variables)
        if case.method == "ascent_share":
            size = len(keras.tree.flatten(batch[0])[0])
            count = max(1, int(NUMBERS["ascent_share"]["ascent_share"] * size))
            part = keras.tree.map_structure(lambda a: None if a is None else a[:count], batch)
        else:
            part = batch  # For the weights that have a gradient.
        _, _, g = adapter.forward_and_gradient(
            model, models.tensors(copy.deepcopy(part)), self.scale()
        )
        assign(variables, before)
        assign(model.non_trainable_variables, state)
        assign(model.metrics_variables, trackers)
        adapter.set_noise(noise)
        used = [i for i, t in enumerate(g) if t is not None]
        w = models.flat([before[i] for i in used])
        along = _flat([g[i] for i in used])
        if case.method != "ascent_share":
            along = np.zeros_like(w) if self.memory is None else self.memory
        rho = -self.rho if case.method == "momentum_sam" else self.rho
        region = _Region(case, [variables[i] for i in used])
        ahead = w + region.climb(along, w, rho, np)
        for i, t in zip(used, models.like(ahead, [before[i] for i in used]), strict=True):
            variables[i].assign(t.astype(before[i].dtype))
        return before

    def direction(self, adversary, g, memory):
        """The rule of the method: what stands in place of the gradient; and what it remembers."""
        method, numbers = self.case.method, NUMBERS.get(self.case.method, {})
        if method in ("sam", "asam"):
            return adversary(self.rho), memory
        if method == "bsam":
            down = adversary(-self.rho_min)
            up = adversary(self.rho)
            ratio = _quotient(np.linalg.norm(up), np.linalg.norm(down))
            return up + g - ratio * down, memory
        if method == "ascent_share":
            return g, memory
        if method == "async_sam":
            return g, g
        if method == "momentum_sam":
            return g, numbers["momentum"] * memory + g
        if method == "looksam" and self.now % numbers["k"] > 0:
            ratio = _quotient(np.linalg.norm(g), np.linalg.norm(memory))
            return g + numbers["alpha"] * ratio * memory, memory
        if method == "friendly_sam":
            average = numbers["decay"] * memory + (1 - numbers["decay"]) * g
            return adversary(self.rho, numbers["sigma"] * memory), average
        g_adv = adversary(self.rho)
        if method == "looksam":
            return g_adv, g_adv - _quotient(g @ g_adv, g @ g) * g
        if method == "wsam":
            return g + numbers["gamma"] / (1 - numbers["gamma"]) * (g_adv - g), memory
        parallel = _quotient(g @ g_adv, g_adv @ g_adv) * g_adv  # gsam, adaptive_gsam
        return g_adv - 0.4 * (g - parallel), memory


class _Region:
    """Where the adversary may go, and how it climbs; `xp` is NumPy or `keras.ops`."""

    def __init__(self, case, variables):
        name = {"asam": "adaptive", "adaptive_gsam": "weight_scaled"}.get(case.method)
        self.name, self.steps = name or case.neighborhood, case.ascent_steps
        bias = [v.name in ("bias", "beta") or v.name.endswith("_bias") for v in variables]
        part = [_takes_part(case.perturb, v) for v in variables]
        sizes = [int(np.prod(v.shape)) for v in variables]
        dtype = keras.backend.standardize_dtype(variables[0].dtype)
        self.bias, self.part = (np.repeat(flags, sizes).astype(dtype) for flags in (bias, part))
        self.p = {"ball_3": 3.0, "adaptive_3": 3.0, "ball_inf": np.inf}.get(self.name, 2.0)

    def ascend(self, gradient_at, w, g, rho, xp, less):
        """The perturbation; `less` is taken out of each gradient."""
        e = self.climb(g - less, w, rho, xp)
        for _ in range(self.steps - 1):
            g = gradient_at(w + e) - less
            e = self.project(e + self.climb(g, w, rho, xp), w, abs(rho), xp)
        return e

    def climb(self, g, w, rho, xp):
        """One step to the border of the region."""
        part = self.part if xp is np else ops.convert_to_tensor(self.part)
        g, scale = g * part, self.scale(w, xp)
        if self.name == "unnormalized":
            return rho * g
        if self.name == "weight_scaled":
            return rho * scale * _steepest(g, 2.0, xp)
        return rho * scale * _steepest(scale * g, self.p, xp)

    def project(self, e, w, rho, xp):
        """The point of the region that is nearest to `e`."""
        if self.name == "unnormalized":
            return e
        scale = self.scale(w, xp)
        if np.isinf(self.p):
            return scale * xp.minimum(xp.maximum(e / scale, -rho), rho)
        size = (xp.sum(xp.abs(e / scale) ** self.p) + 1e-30) ** (1.0 / self.p)
        return e * xp.where(size > rho, rho / size, xp.ones_like(size))

    def scale(self, w, xp):
        """What counts as a change of 1."""
        bias = self.bias if xp is np else ops.convert_to_tensor(self.bias)
        if self.name.startswith("adaptive"):
            return bias + (1.0 - bias) * (xp.abs(w) + 0.01)
        if self.name == "weight_scaled":
            return xp.abs(w) + 0.01
        return xp.ones_like(w)


def _steepest(g, p, xp):
    """The vector of p-norm 1 along which a function with the gradient `g` rises most."""
    if p == 2.0:
        return g / xp.sqrt(xp.sum(g * g) + 1e-30)
    if np.isinf(p):
        return xp.sign(g)
    q = p / (p - 1.0)
    size = xp.abs(g) + 1e-30
    return xp.sign(g) * size ** (q - 1.0) / xp.sum(size**q) ** (1.0 / p)


def _quotient(a, b):
    return a / b if b else 0.0


def _takes_part(perturb, variable):
    """Whether a weight is perturbed, by what the documentation says."""
    in_norm = "norm" in variable.path.split("/")[-2]
    is_bias = variable.name == "bias" or variable.name.endswith("_bias")
    return {
        "all": True,
        "norm_only": in_norm,
        "no_bias_no_norm": not (in_norm or is_bias),
        "function": "bias" not in variable.name,
    }[perturb]


def _flat(tensors):
    return models.flat([ops.convert_to_numpy(t) for t in tensors])


def _split(batch, number, size):
    """The parts of a batch."""
    start = 0
    for i in range(min(number, size)):
        end = start + size // number + (i < size % number)
        yield keras.tree.map_structure(
            lambda a, s=start, e=end: None if a is None else a[s:e], batch
        )
        start = end


class _Scope(keras.StatelessScope):
    """A pass in which an assignment means what it means in plain training."""

    def add_update(self, update):
        variable, value = update
        trained = self.get_current_value(variable) if variable.trainable else None
        super().add_update((variable, adapter.assigned(value, trained)))


def _concatenate(*tensors):
    """Predictions of the parts put together, with their masks."""
    whole = ops.concatenate(tensors)
    masks = [get_keras_mask(t) for t in tensors]
    if masks[0] is not None:
        set_keras_mask(whole, ops.concatenate(masks))
    return whole
