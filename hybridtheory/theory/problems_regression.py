"""Test problems with the structure of fine-tuning: logistic and softmax regression, and a LoRA-shaped bilinear problem."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import count, nonnegative, positive
from hybridtheory.theory.problems import Array, Law, Problem
from hybridtheory.theory.step_sizes import couple


@dataclass
class Regression(Problem):
    """What every regression with a ridge knows of itself once it is made; ``_fit`` finds its minimiser."""

    n: int = field(init=False)
    d_y: int = field(init=False)
    f_star: float = field(init=False)
    minimiser: Array = field(init=False)
    L_x: float = field(init=False)
    L_y: float = field(init=False)
    l_x: Law = field(init=False)
    l_y: Law = field(init=False)
    noise_sup: tuple[float, float] = field(init=False)

    def _fit(self, d: int) -> None:
        """Newton's method to the precision of the sum."""
        self.minimiser = np.zeros(d)
        for _ in range(100):
            g = self.gradient(self.minimiser)
            step = np.linalg.solve(self.hessian(self.minimiser), g)
            # Damped: the pure step diverges from far away; 1/(1+sqrt(g's)) is the self-concordant choice.
            self.minimiser = self.minimiser - step / (1 + math.sqrt(float(g @ step)))
            if float(g @ step) < 1e-28:
                break
        self.f_star = float(self.value(self.minimiser))


@dataclass
class Softmax(Regression):
    """f_i(w) = logsumexp(W X_i) - (W X_i)_{y_i} + (ridge/2)‖w‖², W = w reshaped to [classes, p]; two classes are logistic.

    Assumptions: ridge > 0, so that a minimiser exists; the blocks are the first d_x entries of w and the rest.
    Known: the Hessian of logsumexp is <= ½ I (and <= diag of the probabilities), so Hess f_i <= ½ ‖X_i‖² + ridge; f* by Newton's
    method to the precision of the sum; variances at most 2 max ‖X_i‖² (each gradient is (p - e_y) X_i').
    """

    X: Array  # [n, p]
    y: np.ndarray  # [n]
    classes: int
    d_x: int
    ridge: float

    def __post_init__(self) -> None:
        positive("softmax regression", ridge=self.ridge)
        self.n, p = self.X.shape
        self.d_y = self.classes * p - self.d_x
        if not 0 <= self.d_x <= self.classes * p:
            raise UserError(f"softmax regression has {self.classes * p} parameters, got d_x = {self.d_x}")
        # Jointly for every row: the bound of the whole Hessian serves both blocks (a tighter pair would need the coupling).
        L = 0.5 * float((self.X**2).sum(1).max()) + self.ridge
        self.L_x = self.L_y = L
        self.l_x = self.l_y = lambda u: L
        sup = 2 * float((self.X**2).sum(1).max())
        self.noise_sup = (sup, sup)
        self._fit(self.classes * p)

    def _logits(self, w: Array) -> Array:
        W = w.reshape(*w.shape[:-1], self.classes, -1)
        z: Array = np.einsum("np,...cp->...nc", self.X, W)
        return z

    def _probabilities(self, z: Array) -> Array:
        e = np.exp(z - z.max(-1, keepdims=True))
        out: Array = e / e.sum(-1, keepdims=True)
        return out

    def values(self, w: Array) -> Array:
        z = self._logits(w)
        top = z.max(-1)
        total = top + np.log(np.exp(z - top[..., None]).sum(-1))
        out: Array = total - z[..., np.arange(self.n), self.y] + self.ridge / 2 * (w**2).sum(-1)[..., None]
        return out

    def gradients(self, w: Array) -> Array:
        residual = self._probabilities(self._logits(w)) - np.eye(self.classes)[self.y]
        g = np.einsum("...nc,np->...ncp", residual, self.X)
        out: Array = g.reshape(*g.shape[:-2], -1) + self.ridge * w[..., None, :]
        return out

    def hessian(self, w: Array) -> Array:
        prob = self._probabilities(self._logits(w))  # [n, c]
        inner = np.einsum("nc,ce->nce", prob, np.eye(self.classes)) - np.einsum("nc,ne->nce", prob, prob)
        h = np.einsum("nce,np,nr->cper", inner, self.X, self.X) / self.n
        d = self.classes * self.X.shape[1]
        out: Array = h.reshape(d, d) + self.ridge * np.eye(d)
        return out


def softmax(
    n: int = 40, p: int = 5, classes: int = 3, d_x: int | None = None, ridge: float = 1e-2, seed: int = 0
) -> Softmax:
    """Small softmax regression on Gaussian features with labels from a random linear teacher with noise."""
    count("softmax", n=n, p=p, classes=classes)
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p)) / math.sqrt(p)
    scores = X @ rng.standard_normal((p, classes)) * 3 + rng.gumbel(size=(n, classes))
    return Softmax(X, scores.argmax(1), classes, classes * p // 2 if d_x is None else d_x, ridge)


@dataclass
class Logistic(Regression):
    """f_i(w) = log(1 + exp(-s_i a_i'w)) + (ridge/2)‖w‖², s_i = ±1: Hess f_i <= ‖a_i‖²/4 + ridge.

    L_x, L_y use the blocks' own row norms and the coupling correction (A = max‖a_ix‖²/4, B, C = max‖a_ix‖‖a_iy‖/4), so that
    they hold jointly and for every row. Variances at most the mean of ‖a_ix‖² (each derivative lies in [-1, 0]).
    """

    A: Array  # [n, d]
    s: Array  # [n], +-1
    d_x: int
    ridge: float

    def __post_init__(self) -> None:
        positive("logistic regression", ridge=self.ridge)
        self.n, d = self.A.shape
        self.d_y = d - self.d_x
        if not 0 <= self.d_x <= d:
            raise UserError(f"logistic regression has {d} parameters, got d_x = {self.d_x}")
        x, y = (self.A[:, : self.d_x] ** 2).sum(1), (self.A[:, self.d_x :] ** 2).sum(1)
        c = couple(float(x.max()) / 4, float(y.max()) / 4, float(np.sqrt(x * y).max()) / 4)
        L_x, L_y = c.L_x + self.ridge, c.L_y + self.ridge
        self.L_x, self.L_y = L_x, L_y
        self.l_x, self.l_y = lambda u: L_x, lambda u: L_y
        self.noise_sup = (float(x.mean()), float(y.mean()))
        self._fit(d)

    def values(self, w: Array) -> Array:
        out: Array = np.logaddexp(0.0, -self.s * (w @ self.A.T)) + self.ridge / 2 * (w**2).sum(-1)[..., None]
        return out

    def gradients(self, w: Array) -> Array:
        slope = -self.s * _sigmoid(-self.s * (w @ self.A.T))
        out: Array = slope[..., None] * self.A + self.ridge * w[..., None, :]
        return out

    def gradient(self, w: Array) -> Array:
        slope = -self.s * _sigmoid(-self.s * (w @ self.A.T))
        out: Array = slope @ self.A / self.n + self.ridge * w
        return out

    def hessian(self, w: Array) -> Array:
        prob = _sigmoid(w @ self.A.T)
        return (self.A.T * (prob * (1 - prob))) @ self.A / self.n + self.ridge * np.eye(self.d)


def _sigmoid(t: Array) -> Array:
    out: Array = 0.5 * (1 + np.tanh(t / 2))  # never overflows
    return out


def logistic(
    n: int = 50, d_x: int = 6, d_y: int = 3, scale: float = 2.0, ridge: float = 1e-2, seed: int = 0
) -> Logistic:
    """Logistic regression on Gaussian rows (the x block `scale` times larger), labels from a noisy linear teacher."""
    count("logistic", n=n)
    nonnegative("logistic", scale=scale)
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, d_x + d_y)) / math.sqrt(d_x + d_y)
    A[:, :d_x] *= scale
    s = np.where(A @ rng.standard_normal(d_x + d_y) + 0.5 * rng.standard_normal(n) > 0, 1.0, -1.0)
    return Logistic(A, s, d_x, ridge)


@dataclass
class Bilinear(Problem):
    """LoRA on least squares: f_i = ½‖(W + s B A) X_i - Y_i‖², x = W (m n entries), y = (A, B) (r n + m r entries).

    No joint global constant exists (the loss is quartic in y; H_xx alone is <= L_W). With curvature L_W = λ_max(mean X X') and G = ∇_W f:
    ‖Hess_{(A,B)} f‖ <= s² L_W (‖A‖₂² + ‖B‖₂²) + s‖G‖₂, and G is the gradient of the x block: an affine law in the gradient norm
    from bilinearity alone. f* is the least-squares residual, which the free W reaches.
    """

    X: Array  # [N, n_in]
    Y: Array  # [N, m]
    r: int
    s: float
    n: int = field(init=False)
    d_x: int = field(init=False)
    d_y: int = field(init=False)
    f_star: float = field(init=False)
    L_W: float = field(init=False)
    L_x: float = math.nan
    L_y: float = math.nan

    def __post_init__(self) -> None:
        self.n, n_in = self.X.shape
        m = self.Y.shape[1]
        self.shape = (m, n_in)
        self.d_x, self.d_y = m * n_in, self.r * (n_in + m)
        best = np.linalg.lstsq(self.X, self.Y, rcond=None)[0]
        self.f_star = 0.5 * float(((self.X @ best - self.Y) ** 2).sum(1).mean())
        self.L_W = float(np.linalg.eigvalsh(self.X.T @ self.X / self.n)[-1])
        self.noise_sup = (math.inf, math.inf)

    def split(self, w: Array) -> tuple[Array, Array, Array]:
        """w [..., d] -> W [..., m, n_in], A [..., r, n_in], B [..., m, r]."""
        m, k = self.shape
        lead = w.shape[:-1]
        a = self.d_x + self.r * k
        return (
            w[..., : self.d_x].reshape(*lead, m, k),
            w[..., self.d_x : a].reshape(*lead, self.r, k),
            w[..., a:].reshape(*lead, m, self.r),
        )

    def start(self, seed: int = 0) -> Array:
        """W random, A random, B = 0: the usual initialisation, at which ∇_A f = 0."""
        rng = np.random.default_rng(seed)
        m, k = self.shape
        A = rng.standard_normal(self.r * k) / math.sqrt(k)
        return np.r_[rng.standard_normal(self.d_x) * 0.3, A, np.zeros(m * self.r)]

    def l_y_at(self, A: ArrayLike, B: ArrayLike) -> Law:
        """u -> s² L_W (‖A‖₂² + ‖B‖₂²) + s u: the law of the adapter block for adapters no larger than these."""
        size = float(np.linalg.norm(np.asarray(A), 2) ** 2 + np.linalg.norm(np.asarray(B), 2) ** 2)
        return lambda u: self.s**2 * self.L_W * size + self.s * u

    def _residual(self, w: Array) -> Array:
        W, A, B = self.split(w)
        out: Array = self.X @ np.swapaxes(W + self.s * B @ A, -1, -2) - self.Y  # [..., N, m]
        return out

    def values(self, w: Array) -> Array:
        out: Array = 0.5 * (self._residual(w) ** 2).sum(-1)
        return out

    def gradients(self, w: Array) -> Array:
        _, A, B = self.split(w)
        G = np.einsum("...nm,nk->...nmk", self._residual(w), self.X)
        gA = self.s * np.swapaxes(B, -1, -2)[..., None, :, :] @ G
        gB = self.s * G @ np.swapaxes(A, -1, -2)[..., None, :, :]
        lead = G.shape[:-2]
        return np.concatenate([G.reshape(*lead, -1), gA.reshape(*lead, -1), gB.reshape(*lead, -1)], -1)

    def hessian(self, w: Array) -> Array:
        """Jacobian of the residual by its bilinear form, plus the residual times the second derivative of BA."""
        _, A, B = self.split(w)
        m, k = self.shape
        eye = np.eye(m)
        J = np.concatenate(
            [
                np.einsum("ma,nk->nmak", eye, self.X).reshape(self.n, m, -1),
                self.s * np.einsum("mr,nk->nmrk", B, self.X).reshape(self.n, m, -1),
                self.s * np.einsum("ma,nr->nmar", eye, self.X @ A.T).reshape(self.n, m, -1),
            ],
            -1,
        )
        H: Array = np.einsum("nmi,nmj->ij", J, J) / self.n
        G = np.einsum("nm,nk->mk", self._residual(w), self.X) / self.n
        # d²/dA_{rk} dB_{mr'} of <G, s B A> is s G_{mk} where r = r'.
        cross = self.s * np.einsum("mk,rq->rkmq", G, np.eye(self.r)).reshape(self.r * k, m * self.r)
        a = self.d_x + self.r * k
        H[self.d_x : a, a:] += cross
        H[a:, self.d_x : a] += cross.T
        return H


def bilinear(
    m: int = 4, n_in: int = 5, r: int = 2, s: float = 2.0, n: int = 30, noise: float = 0.1, seed: int = 0
) -> Bilinear:
    """A random realisable regression Y = W* X + noise, seen through W + sBA."""
    count("bilinear", m=m, n_in=n_in, r=r, n=n)
    positive("bilinear", s=s)
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, n_in))
    return Bilinear(X, X @ rng.standard_normal((n_in, m)) + noise * rng.standard_normal((n, m)), r, s)
