"""A training that does not get off the ground: recognized in its logs, with what to do."""

import warnings

#: In as many epochs a network that learns anything has begun to.
EPOCHS = 4

ADVICE = (
    "a rho that is too large for random weights may do well after a warm-up: "
    "`method.rho = keras_sharp.schedules.WarmUp({rho:g}, steps=...)`, over a third of the "
    "training, say"
)


def warn_of_logs(history, stacklevel=3):
    """Say so if a network has learned nothing from its first epochs on, with an adversary.

    The first epoch is left out: in it, the loss of random weights falls to that
    of one constant answer to everything, where such a training stays. A loss
    that has fallen far in the first epoch, and then stays, has converged.

    Args:
        history: dictionary of the logs of a training from its first step on,
            each a list with an entry per epoch.
        stacklevel: Integer, that of `warnings.warn`.
    """
    losses, rhos = history.get("loss", []), history.get("rho", [])
    if len(losses) < EPOCHS or not rhos or not rhos[-1] > 0:
        return
    first, second, *later = losses
    if not (second > 0.5 * first > 0 and min(later) > 0.99 * second):
        return
    rho = float(rhos[-1])
    if rho > next(before for before in rhos if before > 0):  # Plain epochs have none.
        advice = f"rho, which has risen to {rho:g}, is too large"
    else:
        advice = ADVICE.format(rho=rho)
    warnings.warn(
        f"The model does not seem to learn: after {len(losses)} epochs its training loss is "
        f"{losses[-1]:.4g}, after two it was {second:.4g}. If it learns without the adversary "
        f"(`method=None`), {advice}. `keras_sharp.rho_range_test` looks for a smaller "
        "one.",
        stacklevel=stacklevel,
    )
