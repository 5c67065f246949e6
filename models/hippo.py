"""HiPPO-LegS, the memory that S4 and S5 start from (Gu, Dao et al. 2020; normal part: S4D 2022)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def normal_legs(size: int) -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
    """Eigenvalues (size / 2), imaginary parts positive, rising; eigenvectors (size, size / 2).

    Of the normal matrix that is HiPPO-LegS plus a matrix of rank one; conjugates are left out.
    """
    n = np.arange(size)
    root = np.sqrt(2 * n + 1)
    legs = -np.tril(np.outer(root, root), -1) - np.diag(n + 1)
    p = np.sqrt(n + 0.5)
    normal = legs + np.outer(p, p)
    # -1/2 on the diagonal, skew-symmetric beside it: the eigenvalues are -1/2 + i (real numbers).
    skew = normal - np.diag(np.diagonal(normal))
    frequency, vectors = np.linalg.eigh(-1j * skew)
    upper = np.argsort(frequency)[size - size // 2 :]
    return -0.5 + 1j * frequency[upper], vectors[:, upper]
