"""Fitting the latency model, once and while serving."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from conserve.core import calibration
from conserve.core.calibration import (
    KNEES,
    MAX_MARGIN,
    MIN_MARGIN,
    CalibrationError,
    Recalibrator,
    fit,
    mean_relative_error,
)
from conserve.core.latency import NUM_FEATURES, LatencyModel, StepShape

MODEL = LatencyModel(
    fixed=0.008,
    per_token=6e-5,
    per_pair=4e-9,
    per_decode=2e-5,
    per_context=2e-8,
    knee=128,
    per_activation=1e-5,
)
Samples = list[tuple[StepShape, float]]


def shapes(seed: int, max_prefills: int = 3) -> Iterator[StepShape]:
    """Mixed steps of up to three chunks and 64 decodes, without end."""
    chance = random.Random(seed)
    while True:
        shape = StepShape()
        for _ in range(chance.randint(0, max_prefills)):
            shape.add_prefill(chance.randint(1, 512), chance.randint(0, 4000))
        for _ in range(chance.randint(1, 64)):
            shape.add_decode(1, chance.randint(1, 4000))
        yield shape


def samples_of(model: LatencyModel, number: int, seed: int, noise: float = 0.0) -> Samples:
    chance = random.Random(seed)
    return [
        (shape, model.predict_s(shape) * (1 + chance.gauss(0.0, noise)))
        for shape in itertools.islice(shapes(seed), number)
    ]


def error_against(model: LatencyModel, truth: LatencyModel) -> float:
    return mean_relative_error(model, samples_of(truth, 300, seed=99))


def exact_non_negative_fit(samples: Samples, knee: float) -> float:
    """Least mean squared relative error with coefficients >= 0: the best over all supports."""
    frame = LatencyModel(0.0, 0.0, knee=knee)
    rows = np.array([[f / seconds for f in frame.features(shape)] for shape, seconds in samples])
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    ones, best = np.ones(len(rows)), float("inf")
    for kept in itertools.product([False, True], repeat=NUM_FEATURES):
        columns = [i for i in range(NUM_FEATURES) if kept[i]]
        if not columns:
            continue
        x, *_ = np.linalg.lstsq((rows / scale)[:, columns], ones, rcond=None)
        if (x >= -1e-9).all():
            residual = (rows / scale)[:, columns] @ x - ones
            best = min(best, float(residual @ residual) / len(rows))
    return best


def squared_error(model: LatencyModel, samples: Samples) -> float:
    return sum((model.predict_s(s) / seconds - 1) ** 2 for s, seconds in samples) / len(samples)


class TestFit:
    @pytest.mark.parametrize("knee", KNEES)
    def test_recovers_a_known_model(self, knee: float) -> None:
        truth = replace(MODEL, knee=knee, per_activation=MODEL.per_activation if knee else 0.0)
        fitted = fit(samples_of(truth, 200, seed=1))
        assert fitted.knee == knee
        assert fitted.coefficients == pytest.approx(truth.coefficients, rel=1e-4)
        assert fitted.margin == MIN_MARGIN

    @pytest.mark.parametrize(
        "absent", ["per_pair", "per_decode", "per_context", "fixed", "per_activation"]
    )
    def test_finds_an_absent_term_absent(self, absent: str) -> None:
        truth = replace(MODEL, **{absent: 0.0})
        fitted = fit(samples_of(truth, 200, seed=2))
        share = getattr(fitted, absent) / getattr(MODEL, absent)
        assert share == pytest.approx(0.0, abs=1e-4)
        assert error_against(fitted, truth) < 1e-4

    @pytest.mark.parametrize("seed", range(5))
    def test_under_noise_is_the_exact_non_negative_optimum(
        self, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calibration, "HUBER_ROUNDS", 0)
        samples = samples_of(MODEL, 120, seed=seed, noise=0.05)
        fitted = fit(samples)
        assert min(fitted.coefficients) >= 0.0
        exact = exact_non_negative_fit(samples, fitted.knee)
        assert squared_error(fitted, samples) == pytest.approx(exact, rel=1e-3)
        assert error_against(fitted, MODEL) < 0.04

    @pytest.mark.parametrize("seed", range(5))
    def test_disturbed_steps_hardly_move_it(
        self, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chance = random.Random(seed)
        samples = [
            (shape, seconds * (3.0 if chance.random() < 0.15 else 1.0))
            for shape, seconds in samples_of(MODEL, 120, seed=seed, noise=0.03)
        ]
        robust = error_against(fit(samples), MODEL)
        monkeypatch.setattr(calibration, "HUBER_ROUNDS", 0)
        assert robust < 0.5 * error_against(fit(samples), MODEL)

    def test_never_negative_where_plain_least_squares_is(self) -> None:
        """Larger steps that take less time: no honest slope, so none below zero."""
        samples = [(StepShape(num_tokens=n), 0.05 - 1e-5 * n) for n in range(100, 2000, 100)]
        fitted = fit(samples)
        assert min(fitted.coefficients) >= 0.0
        assert fitted.per_token == pytest.approx(0.0, abs=1e-9)

    def test_margin_is_two_mean_errors_within_bounds(self) -> None:
        noisy = samples_of(MODEL, 400, seed=3, noise=0.05)
        fitted = fit(noisy)
        assert fitted.margin == pytest.approx(2 * mean_relative_error(fitted, noisy))
        chance = random.Random(3)
        hopeless = [(s, chance.choice([0.01, 1.0])) for s in itertools.islice(shapes(4), 100)]
        assert fit(hopeless).margin == MAX_MARGIN

    def test_refuses_too_few_samples(self) -> None:
        samples = samples_of(MODEL, 2 * NUM_FEATURES, seed=4)
        fit(samples)
        with pytest.raises(CalibrationError, match="11 samples; 12 are needed"):
            fit(samples[:-1])

    @pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
    def test_refuses_times_no_step_can_take(self, seconds: float) -> None:
        samples = samples_of(MODEL, 20, seed=5)
        with pytest.raises(CalibrationError, match="not a step's time"):
            fit([*samples, (StepShape(num_tokens=1), seconds)])


def test_mean_relative_error_is_relative_to_the_measured_time() -> None:
    model = LatencyModel(fixed=0.0, per_token=0.01)
    samples = [(StepShape(num_tokens=10), 0.2), (StepShape(num_tokens=10), 0.1)]
    assert mean_relative_error(model, samples) == pytest.approx((0.5 + 0.0) / 2)
    assert mean_relative_error(model, []) == 0.0


def observe(recalibrator: Recalibrator, truth: LatencyModel, number: int, seed: int) -> None:
    for shape, seconds in samples_of(truth, number, seed):
        recalibrator.observe(shape, seconds)


def slower(factor: float) -> LatencyModel:
    return LatencyModel.of([c * factor for c in MODEL.coefficients], MODEL.knee)


class TestRecalibrator:
    def test_a_right_model_stays_as_it_is(self) -> None:
        recalibrator = Recalibrator(MODEL)
        observe(recalibrator, MODEL, 500, seed=6)
        assert recalibrator.model.coefficients == pytest.approx(MODEL.coefficients, rel=1e-9)
        assert recalibrator.model.margin == MIN_MARGIN

    @pytest.mark.parametrize("factor", [0.7, 1.3, 2.0])
    def test_follows_a_device_that_changes_speed(self, factor: float) -> None:
        recalibrator = Recalibrator(MODEL)
        observe(recalibrator, MODEL, 200, seed=7)
        before = error_against(recalibrator.model, slower(factor))
        observe(recalibrator, slower(factor), 4000, seed=8)
        after = error_against(recalibrator.model, slower(factor))
        assert before > 0.2
        assert after < 0.04

    def test_follows_a_slow_drift_closely(self) -> None:
        recalibrator, chance = Recalibrator(MODEL), random.Random(9)
        errors = []
        for i, shape in enumerate(itertools.islice(shapes(10), 6000)):
            actual_s = slower(1 + 0.5 * i / 6000).predict_s(shape) * (1 + chance.gauss(0, 0.01))
            errors.append(abs(recalibrator.observe(shape, actual_s)))
        assert sum(errors[500:]) / 5500 < 0.03

    def test_is_never_negative(self) -> None:
        recalibrator, chance = Recalibrator(MODEL), random.Random(11)
        for shape in itertools.islice(shapes(12), 3000):
            recalibrator.observe(shape, chance.choice([1e-4, 1e-3, 0.5]))
            assert min(recalibrator.model.coefficients) >= 0.0
            assert recalibrator.model.predict_s(shape) >= 0.0

    def test_stays_put_where_traffic_excites_nothing(self) -> None:
        """Decodes of one size only say nothing of attention pairs."""
        recalibrator = Recalibrator(MODEL)
        shape = StepShape()
        for _ in range(32):
            shape.add_decode(1, 1000)
        for _ in range(20_000):
            recalibrator.observe(shape, slower(1.5).predict_s(shape))
        learned = recalibrator.model
        assert learned.predict_s(shape) == pytest.approx(slower(1.5).predict_s(shape), rel=0.01)
        assert learned.per_pair == MODEL.per_pair
        for got, profiled in zip(learned.coefficients, MODEL.coefficients, strict=True):
            assert profiled <= got < 2.5 * profiled
        # No wind-up: back among mixed steps it is not thrown off by what it never saw.
        observe(recalibrator, MODEL, 3000, seed=13)
        assert error_against(recalibrator.model, MODEL) < 0.04

    @pytest.mark.parametrize(
        ("takes_s", "most"),
        [
            (slower(0.1).predict_s, 0.02),
            (slower(0.05).predict_s, 0.02),
            (lambda _: 0.02, 0.05),
            (lambda shape: max(0.005, MODEL.predict_s(shape) - 1e-4 * shape.num_decodes), 0.05),
        ],
        ids=["ten times as fast", "twenty times as fast", "all alike", "fewer tokens are dearer"],
    )
    def test_a_coefficient_at_zero_drives_no_other_up(
        self, takes_s: Callable[[StepShape], float], most: float
    ) -> None:
        """What cannot go down any more is not made up for by the others, step after step: the
        error would be tenfold by then, and grow."""
        recalibrator, chance = Recalibrator(MODEL), random.Random(3)
        for shape in itertools.islice(shapes(22), 8000):
            recalibrator.observe(shape, takes_s(shape) * chance.lognormvariate(0.0, 0.02))
        errors = [
            abs(recalibrator.model.predict_s(shape) / takes_s(shape) - 1)
            for shape in itertools.islice(shapes(23), 200)
        ]
        assert sum(errors) / len(errors) < most
        # And from there it finds back.
        observe(recalibrator, MODEL, 8000, seed=24)
        assert error_against(recalibrator.model, MODEL) < 0.06

    @pytest.mark.parametrize("actual_s", [1e-6, 1e-3, 5.0, 1e6])
    def test_survives_single_disturbed_steps(self, actual_s: float) -> None:
        recalibrator = Recalibrator(MODEL)
        observe(recalibrator, MODEL, 500, seed=14)
        recalibrator.observe(next(shapes(15)), actual_s)
        assert error_against(recalibrator.model, MODEL) < 0.01
        assert recalibrator.model.margin < 0.1

    @pytest.mark.parametrize("actual_s", [1e-6, 1e6])
    def test_learns_as_well_after_a_disturbed_step(self, actual_s: float) -> None:
        """One clock glitch does not use up what later steps could teach."""
        errors: list[float] = []
        for glitches in (0, 1):
            recalibrator = Recalibrator(MODEL)
            for shape in itertools.islice(shapes(16), glitches):
                recalibrator.observe(shape, actual_s)
            observe(recalibrator, slower(1.3), 1000, seed=17)
            errors.append(error_against(recalibrator.model, slower(1.3)))
        assert errors[0] < 0.06
        assert errors[1] < 1.2 * errors[0]

    @pytest.mark.parametrize("absent", ["per_pair", "per_context"])
    def test_learns_a_term_the_profile_lacked(self, absent: str) -> None:
        recalibrator = Recalibrator(replace(MODEL, **{absent: 0.0}))
        before = error_against(recalibrator.model, MODEL)
        observe(recalibrator, MODEL, 4000, seed=18)
        assert error_against(recalibrator.model, MODEL) < 0.1 * before
        learned = getattr(recalibrator.model, absent)
        assert learned == pytest.approx(getattr(MODEL, absent), rel=0.1)

    def test_reports_its_error_before_learning(self) -> None:
        recalibrator = Recalibrator(MODEL, mean_error=0.0)
        shape = next(shapes(19))
        predicted_s = MODEL.predict_s(shape)
        assert recalibrator.observe(shape, 1.25 * predicted_s) == pytest.approx(0.2)
        remembered = (1 - Recalibrator.ERROR_MEMORY) * 0.2
        assert recalibrator.mean_error == pytest.approx(remembered)

    def test_margin_follows_the_error(self) -> None:
        recalibrator, chance = Recalibrator(MODEL), random.Random(20)
        for shape in itertools.islice(shapes(21), 2000):
            recalibrator.observe(shape, MODEL.predict_s(shape) * (1 + chance.gauss(0.0, 0.1)))
        # The mean absolute value of a normal variable is 0.8 standard deviations.
        assert recalibrator.model.margin == pytest.approx(2 * 0.8 * 0.1, rel=0.35)

    @pytest.mark.parametrize("shape", [StepShape(), StepShape(num_tokens=5)])
    def test_steps_that_took_or_held_nothing_teach_nothing(self, shape: StepShape) -> None:
        recalibrator = Recalibrator(MODEL)
        assert recalibrator.observe(shape, 0.0 if shape.num_tokens else 1.0) == 0.0
        assert recalibrator.model is MODEL


@pytest.mark.parametrize("seed", range(20))
def test_the_nearest_point_without_a_negative_is_the_nearest(seed: int) -> None:
    """By the covariance, against every choice of which coefficients are held at zero."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(NUM_FEATURES, NUM_FEATURES)) + np.eye(NUM_FEATURES)
    covariance, x = root @ root.T, rng.normal(size=NUM_FEATURES)
    metric = np.linalg.inv(covariance)
    best, best_point = float("inf"), x
    for kept in itertools.product([False, True], repeat=NUM_FEATURES):
        held = [i for i in range(NUM_FEATURES) if not kept[i]]
        point = x.copy()
        if held:
            part = covariance[np.ix_(held, held)]
            point = x - covariance[:, held] @ np.linalg.solve(part, x[held])
            point[held] = 0.0
        distance = float((point - x) @ metric @ (point - x))
        if (point >= -1e-9).all() and distance < best:
            best, best_point = distance, point
    found = calibration._nearest_non_negative(x.tolist(), covariance.tolist())
    assert min(found) >= 0.0
    assert found == pytest.approx(best_point.tolist(), abs=0.05)


def test_the_error_measure_of_these_tests_tells_models_apart() -> None:
    assert error_against(MODEL, MODEL) == 0.0
    assert error_against(slower(1.1), MODEL) == pytest.approx(0.1)
    assert error_against(replace(MODEL, per_pair=0.0), MODEL) > 0.02
