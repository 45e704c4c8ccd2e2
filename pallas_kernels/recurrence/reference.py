"""The definitions of the kernels, one token after another, in NumPy and float64."""

from __future__ import annotations

import numpy as np


def convolved(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """sum_j kernel[W - 1 - j] x[position - j] of a whole sequence x [tokens, C]."""
    padded = np.pad(x.astype(np.float64), ((len(kernel) - 1, 0), (0, 0)))
    return np.sum([padded[j : j + len(x)] * kernel[j][None, :] for j in range(len(kernel))], axis=0)


def recurred(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, gain: np.ndarray, *, delta: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The results [tokens, H, Dv] of a whole sequence, and its state [H, D, Dv] after the last token."""
    share = v.shape[1] // k.shape[1]
    q, k = (np.repeat(x.astype(np.float64), share, axis=1) for x in (q, k))
    state, out = np.zeros((v.shape[1], k.shape[2], v.shape[2])), []
    for t in range(len(q)):
        state = np.exp(decay[t].astype(np.float64))[:, None, None] * state
        u = v[t].astype(np.float64)
        if delta:
            u = u - np.einsum("hde,hd->he", state, k[t])
        state = state + k[t][:, :, None] * (gain[t][:, None] * u)[:, None, :]
        out.append(np.einsum("hde,hd->he", state, q[t]))
    return np.stack(out), state
