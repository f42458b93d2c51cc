"""What keras_sharp needs of a backend. Backends appear nowhere else.

Each engine file provides the same few names:

| name | meaning |
|---|---|
| `value_and_gradient(fn, w, averages)` | `fn(w) -> (scalar, aux)`, and the gradient; nestable |
| `hessian(fn, w, ...)`, `gauss_newton(...)` | products with a matrix of second derivatives |
| `linearized(matrix, fn)` | these products, with one forward pass for all of them |
| `read(variable)` | the value of a variable, as a tensor |
| `cond(condition, if_true, if_false)` | the value of one of two functions |
| `cond_of_all(condition, if_true, if_false)` | the same, of functions that average over replicas |
| `is_known(condition)` | whether a condition has a value: nothing is traced |
| `run_either(condition, if_true, if_false, variables)` | run what assigns to variables |
| `apply(optimizer, gradients, variables)` | one optimizer step |
| `average_micro_batches(fn, ...)` | `fn` over equal parts of a batch, averaged |
| `average_replicas(fn, ...)` | `fn` on each replica's part of a batch, averaged |
| `mean_over_replicas(structure, size)` | the mean over all replicas, weighted by `size` |
| `loss_of_replica(loss)` | what Keras computed, as on a single device |
| `broadcast(variables)` | give every replica the values of the first |
| `num_replicas()` | how many replicas share what runs here; 1 where no code sees them |
| `sum_over_processes(tensors)`, `mean_over_processes(...)` | outside of a step |
| `as_tensors(batch)` | the arrays of a batch as tensors, outside of a step |
| `compiled(fn)` | a pure function of tensors, compiled where the backend can |
| `dot`, `scale`, `add`, `add_scaled` | the operations on lists of tensors that need speed |
| `quotient(a, b)` | `a / b` for scalars, and 0 where `b` is 0 |
| `part_of_batch(batch, share)` | the first examples, as many as that share of all |
| `largest_of_batch(batch, values, share)` | the examples with the largest values, likewise |
| `random_uniform(shape, *numbers)` | random numbers that these numbers determine |
| `global_seeds`, `random_state`, `set_random_state` | random numbers outside the model |
| `own_random_numbers(model)` | let a model draw from seeds that it holds |
| `check_layers(model)` | refuse layers that the engine cannot differentiate |
| `write(weight, value)` | what an assignment in a pass means |

They know tensors and variables only. Beside each is one file more, with a
`Trainer`: the glue into Keras' `train_step`, a base of `SharpnessAwareModel`.
"""

import keras

from keras_sharp.engine._keras import TrainingScope as TrainingScope
from keras_sharp.engine._keras import all_layers as all_layers
from keras_sharp.engine._keras import build_symbolically as build_symbolically
from keras_sharp.engine._keras import data_adapter as data_adapter
from keras_sharp.engine._keras import exchanging_variables as exchanging_variables
from keras_sharp.engine._keras import has_mask as has_mask
from keras_sharp.engine._keras import in_order as in_order
from keras_sharp.engine._keras import is_saving_legacy_h5 as is_saving_legacy_h5
from keras_sharp.engine._keras import is_validation_of_fit as is_validation_of_fit
from keras_sharp.engine._keras import loss_tracker as loss_tracker
from keras_sharp.engine._keras import losses_of_outputs as losses_of_outputs
from keras_sharp.engine._keras import masks_of as masks_of
from keras_sharp.engine._keras import random_uniform as random_uniform
from keras_sharp.engine._keras import set_masks as set_masks
from keras_sharp.engine._keras import share_compiled_state as share_compiled_state
from keras_sharp.engine._keras import start_at_epoch as start_at_epoch
from keras_sharp.engine._keras import stateless_scope as stateless_scope
from keras_sharp.engine._keras import update_losses_of_outputs as update_losses_of_outputs
from keras_sharp.engine._micro_batches import first_tensor as first_tensor

if keras.backend.backend() == "tensorflow":
    from keras_sharp.engine import _tensorflow as _engine
    from keras_sharp.engine import _tensorflow_trainer as _trainer
elif keras.backend.backend() == "jax":
    from keras_sharp.engine import _jax as _engine
    from keras_sharp.engine import _jax_trainer as _trainer
elif keras.backend.backend() == "torch":
    from keras_sharp.engine import _torch as _engine
    from keras_sharp.engine import _torch_trainer as _trainer
else:
    raise ImportError(
        "keras_sharp needs a backend that can train: 'tensorflow', 'jax' or 'torch'. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}. Set the environment "
        "variable KERAS_BACKEND to one of the three before Keras is imported."
    )

Trainer = _trainer.Trainer
add = _engine.add
add_scaled = _engine.add_scaled
apply = _engine.apply
as_tensors = _engine.as_tensors
average_micro_batches = _engine.average_micro_batches
average_replicas = _engine.average_replicas
broadcast = _engine.broadcast
check_layers = _engine.check_layers
compiled = _engine.compiled
cond = _engine.cond
cond_of_all = _engine.cond_of_all
dot = _engine.dot
gauss_newton = _engine.gauss_newton
global_seeds = _engine.global_seeds
hessian = _engine.hessian
is_known = _engine.is_known
largest_of_batch = _engine.largest_of_batch
linearized = _engine.linearized
loss_of_replica = _engine.loss_of_replica
mean_over_processes = _engine.mean_over_processes
mean_over_replicas = _engine.mean_over_replicas
num_replicas = _engine.num_replicas
own_random_numbers = _engine.own_random_numbers
part_of_batch = _engine.part_of_batch
quotient = _engine.quotient
random_state = _engine.random_state
read = _engine.read
run_either = _engine.run_either
scale = _engine.scale
set_random_state = _engine.set_random_state
sum_over_processes = _engine.sum_over_processes
value_and_gradient = _engine.value_and_gradient
write = _engine.write
