"""Fitting the latency model: once from a profile, then step by step while serving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from conserve.core.latency import NUM_FEATURES, Features, LatencyModel, StepShape

KNEES = (0.0, 32.0, 64.0, 128.0, 192.0, 256.0, 384.0, 512.0)
"""Where the roofline may bend, in tokens."""
WORTH_A_KNEE = 0.95
"""A later knee has to lower the mean error to this share: noise alone finds one anywhere."""
HUBER_ROUNDS = 5
TYPICAL_FEATURES: Features = (1.0, 512.0, 512.0 * 512.0, 64.0, 64.0 * 1024.0, 512.0)
"""A mixed step of 512 tokens: sets the order of magnitude of coefficients never seen."""
HILDRETH_SWEEPS = 30
MIN_MARGIN = 0.02
MAX_MARGIN = 0.5


class CalibrationError(ValueError):
    """Too few samples, or samples no step-time model can be fitted to."""


def fit(samples: Sequence[tuple[StepShape, float]]) -> LatencyModel:
    """The model with the least mean squared *relative* error over (shape, seconds) samples.

    Non-negative least squares for each candidate knee, with Huber weights against steps that
    something else on the machine disturbed; the best knee wins, the earliest of about equal ones.
    Raises CalibrationError on fewer than 2 * NUM_FEATURES samples, or a time that is not positive
    and finite.
    """
    if len(samples) < 2 * NUM_FEATURES:
        raise CalibrationError(f"{len(samples)} samples; {2 * NUM_FEATURES} are needed")
    for _, seconds in samples:
        if not 0 < seconds < float("inf"):
            raise CalibrationError(f"{seconds} seconds is not a step's time")
    best: tuple[float, LatencyModel] | None = None
    for knee in KNEES:
        frame = LatencyModel(fixed=0.0, per_token=0.0, knee=knee)
        rows = [_relative(_told_apart(frame, shape), seconds) for shape, seconds in samples]
        model = LatencyModel.of(_robust_least_squares(rows), knee)
        error = mean_relative_error(model, samples)
        if best is None or error < WORTH_A_KNEE * best[0] - 1e-9:
            best = (error, model)
    assert best is not None
    error, model = best
    return replace(model, margin=_margin(error))


def scaled(model: LatencyModel, samples: Sequence[tuple[StepShape, float]]) -> LatencyModel:
    """The model as many times as slow as the median sample says, with the widest margin: what
    few samples can tell. Raises CalibrationError without any."""
    if not samples:
        raise CalibrationError("no samples")
    ratios = sorted(seconds / model.predict_s(shape) for shape, seconds in samples)
    ratio = ratios[len(ratios) // 2]
    coefficients = [ratio * value for value in model.coefficients]
    return LatencyModel.of(coefficients, model.knee, MAX_MARGIN)


def mean_relative_error(model: LatencyModel, samples: Iterable[tuple[StepShape, float]]) -> float:
    """Mean of |predicted - actual| / actual."""
    errors = [abs(model.predict_s(shape) - seconds) / seconds for shape, seconds in samples]
    return sum(errors) / len(errors) if errors else 0.0


def _margin(mean_error: float) -> float:
    """Two mean absolute errors: about 90 % of normally distributed residuals lie below."""
    return min(MAX_MARGIN, max(MIN_MARGIN, 2.0 * mean_error))


def _told_apart(frame: LatencyModel, shape: StepShape) -> Features:
    """Without a knee nothing tells a token's activations from the rest of it."""
    features = frame.features(shape)
    return features if frame.knee else (*features[:-1], 0.0)


def _relative(features: Features, seconds: float) -> list[float]:
    """A row whose right-hand side is 1, so that every sample weighs by its relative error."""
    return [value / seconds for value in features]


def _robust_least_squares(rows: Sequence[Sequence[float]]) -> list[float]:
    """Iteratively reweighted: residuals past twice their median weigh less (Huber, 1964)."""
    x = _non_negative_least_squares(rows)
    for _ in range(HUBER_ROUNDS):
        residuals = [abs(1 - sum(a * b for a, b in zip(row, x, strict=True))) for row in rows]
        bound = max(2 * sorted(residuals)[len(residuals) // 2], 1e-9)
        weights = [min(1.0, bound / r) ** 0.5 if r > 0 else 1.0 for r in residuals]
        weighted = [[w * a for a in row] for w, row in zip(weights, rows, strict=True)]
        x = _non_negative_least_squares(weighted, weights)
    return x


def _non_negative_least_squares(
    rows: Sequence[Sequence[float]], right: Sequence[float] | None = None
) -> list[float]:
    """x >= 0 that minimises |rows @ x - right|^2 (right = 1 by default): coordinate descent on the
    normal equations finds which are above 0, elimination what they are."""
    n = NUM_FEATURES
    right = right if right is not None else [1.0] * len(rows)
    scale = [max((row[i] for row in rows), default=0.0) or 1.0 for i in range(n)]
    gram = [
        [sum(row[i] * row[j] for row in rows) / (scale[i] * scale[j]) for j in range(n)]
        for i in range(n)
    ]
    target = [
        sum(row[i] * b for row, b in zip(rows, right, strict=True)) / scale[i] for i in range(n)
    ]
    x = [0.0] * n
    for _ in range(5000):
        moved = 0.0
        for i in range(n):
            if gram[i][i] <= 1e-12:
                continue
            gradient = target[i] - sum(gram[i][j] * x[j] for j in range(n))
            new = max(0.0, x[i] + gradient / gram[i][i])
            moved = max(moved, abs(new - x[i]))
            x[i] = new
        if moved < 1e-12:
            break
    support = [i for i in range(n) if x[i] > 0.0]
    exact = _solved([[gram[i][j] for j in support] + [target[i]] for i in support])
    if min(exact, default=-1.0) >= 0.0:
        x = [0.0] * n
        for i, value in zip(support, exact, strict=True):
            x[i] = value
    return [value / scale[i] for i, value in enumerate(x)]


def _solved(rows: list[list[float]]) -> list[float]:
    """x of these linear equations, each with its right side last, by Gauss's elimination with
    pivoting; nothing where they leave x open."""
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) <= 1e-12:
            return []
        for k in range(n):
            if k != i:
                factor = rows[k][i] / rows[i][i]
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [row[n] / row[i] for i, row in enumerate(rows)]


def _nearest_non_negative(x: Sequence[float], p: Sequence[Sequence[float]]) -> list[float]:
    """y >= 0 with the least (y - x)' P^-1 (y - x), by Hildreth's procedure (1957).

    Cutting negative ones off would leave the others with what those cannot go down any more: each
    step would push them up, without end.
    """
    y, dual = list(x), [0.0] * len(x)
    for _ in range(HILDRETH_SWEEPS):
        largest = 0.0
        for i, line in enumerate(p):
            change = min(-dual[i], y[i] / line[i])
            if change:
                dual[i] += change
                y = [each - change * column for each, column in zip(y, line, strict=True)]
                largest = max(largest, abs(change) * line[i])
        if largest < 1e-9:
            break
    return [max(0.0, each) for each in y]


class Recalibrator:
    """Recursive least squares with forgetting, around a fitted model.

    Ljung and Soederstroem, "Theory and Practice of Recursive Identification" (1983),
    section 2.6. Coefficients are kept relative to their start, so that one covariance
    scale suits all; they never become negative (`_nearest_non_negative`), and the covariance never
    grows past where it began, so directions that traffic does not excite stay as profiled.
    """

    FORGETTING = 0.995
    SPREAD = 0.1
    """Variance of a coefficient relative to its profiled value, at the start."""
    OUTLIER = 0.5
    """A step further off than this (relative) was disturbed: only its sign is believed."""
    UNSEEN = 0.2
    """Unit of a coefficient profiled as zero, as a share of a typical step."""
    ERROR_MEMORY = 0.98

    def __init__(self, model: LatencyModel, mean_error: float = 0.05) -> None:
        self.model = model
        self.mean_error = mean_error
        """Recent mean of |predicted - actual| / actual."""
        # A term that the profile found to be zero may still appear in traffic: its unit
        # is what makes it a share of a typical step.
        typical_s = sum(c * f for c, f in zip(model.coefficients, TYPICAL_FEATURES, strict=True))
        unseen = [self.UNSEEN * max(typical_s, 1e-6) / f for f in TYPICAL_FEATURES]
        self._scale = [c if c > 0 else u for c, u in zip(model.coefficients, unseen, strict=True)]
        self._x = [c / s for c, s in zip(model.coefficients, self._scale, strict=True)]
        self._p = [
            [self.SPREAD if i == j else 0.0 for j in range(NUM_FEATURES)]
            for i in range(NUM_FEATURES)
        ]

    def observe(self, shape: StepShape, actual_s: float) -> float:
        """Learn from one whole step; returns its relative error before learning."""
        if actual_s <= 0 or not shape.num_tokens:
            return 0.0
        error = (actual_s - self.model.predict_s(shape)) / actual_s
        self.mean_error += (1 - self.ERROR_MEMORY) * (min(abs(error), 1.0) - self.mean_error)
        self._update(self.model.features(shape), actual_s, error)
        coefficients = [x * s for x, s in zip(self._x, self._scale, strict=True)]
        self.model = LatencyModel.of(coefficients, self.model.knee, _margin(self.mean_error))
        return error

    def _update(self, features: Features, actual_s: float, error: float) -> None:
        """One step of recursive least squares on the row features * scale / actual = 1."""
        # Huber's weight. Scaling only the error would let one absurdly short time, whose
        # row is absurdly long, spend the covariance and with it all later learning.
        weight = min(1.0, self.OUTLIER / abs(error)) if error else 1.0
        row = [f * s * weight / actual_s for f, s in zip(features, self._scale, strict=True)]
        p_row = [sum(p * r for p, r in zip(line, row, strict=True)) for line in self._p]
        divisor = self.FORGETTING + sum(r * q for r, q in zip(row, p_row, strict=True))
        step = error * weight / divisor
        self._x = [x + q * step for x, q in zip(self._x, p_row, strict=True)]
        for i, line in enumerate(self._p):
            for j in range(NUM_FEATURES):
                line[j] = (line[j] - p_row[i] * p_row[j] / divisor) / self.FORGETTING
        self._bound_covariance()
        if min(self._x) < 0:
            self._x = _nearest_non_negative(self._x, self._p)

    def _bound_covariance(self) -> None:
        """Scale rows and columns down where forgetting has blown their variance up."""
        for i in range(NUM_FEATURES):
            if self._p[i][i] > self.SPREAD:
                shrink = (self.SPREAD / self._p[i][i]) ** 0.5
                for j in range(NUM_FEATURES):
                    self._p[i][j] *= shrink
                    self._p[j][i] *= shrink
