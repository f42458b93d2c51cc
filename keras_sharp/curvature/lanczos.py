"""The Lanczos process: a small tridiagonal matrix with the extreme eigenvalues of a large one."""

import numpy as np


class Lanczos:
    """The Lanczos process with full re-orthogonalization, one product per step.

    ```
    A q_j = beta_j-1 * q_j-1 + alpha_j * q_j + beta_j * q_j+1      # the q_j are orthonormal
    T = Q' A Q = tridiagonal(beta, alpha, beta)
    ```

    The extreme eigenvalues of `T` approach those of `A`. Where the process
    breaks down, because the `q_j` span an invariant subspace, it goes on with
    a random vector perpendicular to it, and `T` falls into blocks.

    Args:
        operator: anything with `size`, `dtype` and `matvec`, symmetric.
        start: array of the shape `(size,)`, the direction of `q_1`.
        rng: a `numpy.random.Generator`, for the vectors after a breakdown.
        max_steps: Integer <= size, for how many vectors to make room.

    References:
        - Parlett, The Symmetric Eigenvalue Problem, chapter 13.
    """

    def __init__(self, operator, start, rng, max_steps):
        self._operator = operator
        self._rng = rng
        dtype = getattr(operator, "dtype", np.float64)
        self._eps = float(np.finfo(dtype).eps)
        self._basis = np.empty((max_steps, operator.size), dtype)
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._dropped = self._noise = 0.0
        self._basis[0] = start / np.linalg.norm(start)

    @property
    def steps(self):
        """Integer, how many products have been taken."""
        return len(self._alphas)

    @property
    def broke_down(self):
        """Whether the vectors so far span an invariant subspace."""
        return self._betas[-1] == 0.0

    @property
    def restarted(self):
        """Whether it has broken down and gone on, or has just broken down."""
        return 0.0 in self._betas

    @property
    def rounding(self):
        """Float, the part of all residuals that rounding makes, and no more products take away."""
        return self._rounding() + self._dropped + self._noise

    def last_block(self):
        """The eigenvalues of the block of `T` since the last breakdown but this one.

        All of them if there was none.
        """
        start = max((i + 1 for i, beta in enumerate(self._betas[:-1]) if beta == 0.0), default=0)
        return np.linalg.eigvalsh(self._tridiagonal(start))

    def step(self):
        """Take one more product."""
        j = self.steps
        q = self._basis[: j + 1]
        r = self._operator.matvec(q[j])
        if not np.all(np.isfinite(r)):
            raise ValueError(
                "A product with the matrix is not finite. Look for a loss that is not smooth at "
                "the weights, such as a square root at zero."
            )
        self._alphas.append(float(q[j] @ r))
        r, beta, parts = self._perpendicular(r, q)
        # On paper these are zero, since the matrix is symmetric: what rounding makes of them is
        # left out of `T`. Where the products are in half precision, it is far more than below.
        self._noise = max(self._noise, float(np.linalg.norm(parts[: max(j - 1, 0)])))
        if j + 1 == self._operator.size or beta <= 10 * self._rounding():
            # What rounding has left is no direction.
            self._dropped, beta = max(self._dropped, beta), 0.0
        self._betas.append(beta)
        if j + 1 < len(self._basis):
            if beta == 0.0:
                r = self._rng.standard_normal(r.size).astype(r.dtype)
                r, _, _ = self._perpendicular(r, q)
            self._basis[j + 1] = r / np.linalg.norm(r)

    def ritz(self):
        """The eigenvalues of `T`, ascending, what each lacks, and the eigenvectors.

        Returns:
            A triple: array of Ritz values; array of residual norms
            `‖A v - theta v‖`, within which of each Ritz value there is an
            eigenvalue of `A`; and the matrix whose columns are the
            eigenvectors of `T`.
        """
        values, s = np.linalg.eigh(self._tridiagonal())
        return values, self._betas[-1] * np.abs(s[-1]) + self.rounding, s

    def _tridiagonal(self, start=0):
        """The matrix `T` from some row on."""
        off = np.diag(self._betas[start:-1], 1)
        return np.diag(self._alphas[start:]) + off + off.T

    def vectors(self, s):
        """The vectors of the large space with the coordinates `s`, as columns."""
        return (s.T.astype(self._basis.dtype) @ self._basis[: self.steps]).T

    def _perpendicular(self, r, q):
        """`r` without its parts along the rows of `q`, the norm of what is left, and the parts."""
        parts = q @ r
        r = r - parts @ q
        r = r - (q @ r) @ q  # Takes what rounding left the first time.
        return r, float(np.linalg.norm(r)), parts

    def _rounding(self):
        """About how much is lost in a product: the precision times the size of the matrix."""
        return 10 * self._eps * max(map(abs, self._alphas + self._betas))
