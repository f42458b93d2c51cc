"""The CTC loss, written such that it can be differentiated twice.

TensorFlow and PyTorch compute it together with its gradient, in a kernel or as a constant.
"""

from keras import ops

#: Stands for the logarithm of 0: minus infinity has no derivative.
_NEVER = -1e30


def ctc_loss(labels, logits, label_length, logit_length, blank):
    """The negative log-probability of each sequence of labels, over all its alignments.

    ```
    a_t(s) = [a_{t-1}(s) + a_{t-1}(s-1) + a_{t-1}(s-2) if s may be reached from there] * p_t(s)
    ```

    where `s` runs over the labels with a blank before, between and after them.

    Args:
        labels: integer tensor of the shape `(batch, labels)`.
        logits: tensor of the shape `(batch, steps, classes)`.
        label_length: integer tensor of the shape `(batch,)`.
        logit_length: likewise.
        blank: Integer, the class that stands for no label; from the end if it is negative.

    Returns:
        Tensor of the shape `(batch,)`.

    References:
        - [Graves et al., 2006](https://doi.org/10.1145/1143844.1143891)
    """
    blank = blank % logits.shape[-1]
    labels = ops.cast(labels, "int32")
    label_length, logit_length = ops.cast(label_length, "int32"), ops.cast(logit_length, "int32")
    batch, count = ops.shape(labels)[0], labels.shape[1]
    between = ops.full((batch, count, 1), blank, dtype="int32")
    path = ops.reshape(ops.concatenate([between, labels[..., None]], 2), (batch, 2 * count))
    path = ops.concatenate([path, between[:, :1, 0]], 1)  # (batch, places)

    classes = ops.one_hot(path, logits.shape[-1], dtype=logits.dtype)
    log_p = ops.einsum("btc,bsc->tbs", ops.log_softmax(logits), classes)

    never = ops.full_like(log_p[0], _NEVER)
    before_last = ops.concatenate([ops.full_like(path[:, :2], -1), path[:, :-2]], 1)
    skips = ops.logical_and(path != blank, path != before_last)

    def step(alpha, given):
        t, log_p_t = given
        back = ops.concatenate([never[:, :1], alpha[:, :-1]], 1)
        skip = ops.concatenate([never[:, :2], alpha[:, :-2]], 1)
        ways = ops.stack([alpha, back, ops.where(skips, skip, never)], 2)
        moved = ops.logsumexp(ways, 2) + log_p_t
        return ops.where(t < logit_length[:, None], moved, alpha), None

    start = ops.concatenate([log_p[0, :, :2], never[:, 2:]], 1)
    times = ops.arange(1, ops.shape(logits)[1], dtype="int32")
    alpha, _ = ops.scan(step, start, (times, log_p[1:]))
    # At the end stands the last label or the blank behind it; without labels, only that.
    last = ops.one_hot(2 * label_length, 2 * count + 1, dtype="bool")
    label = ops.one_hot(2 * label_length - 1, 2 * count + 1, dtype="bool")
    return -ops.logsumexp(ops.where(ops.logical_or(last, label), alpha, never), 1)
