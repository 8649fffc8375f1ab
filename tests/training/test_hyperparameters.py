"""OpenAI's hyperparameters and the `Training` that they mean."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.errors import InvalidRequest
from veneer.training.jobs.hyperparameters import LEARNING_RATE, METHODS, Method, described, resolve
from veneer.training.recipe import Training


def resolved(
    method: Method = "supervised", given: dict[str, Any] | None = None, /, **training: Any
) -> Training:
    return resolve(method, given or {}, adapter={}, training=training, seed=3, has_validation=False)


@pytest.mark.parametrize("method", METHODS)
def test_auto(method: Method) -> None:
    training = resolved(method)
    assert (training.method, training.epochs, training.batch_size, training.seed) == (method, 3, 8, 3)
    assert training.learning_rate == LEARNING_RATE[method]
    shown = described(training)
    assert shown["type"] == method
    expected = {"batch_size": 8, "n_epochs": 3, "learning_rate_multiplier": 1.0}
    assert shown[method]["hyperparameters"] == expected | ({"beta": 0.1} if method == "dpo" else {})


def test_values_come_back() -> None:
    given = {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 0.3, "beta": 0.5}
    training = resolved("dpo", given)
    assert (training.epochs, training.dpo_beta) == (2, 0.5)
    assert training.learning_rate == pytest.approx(0.3 * LEARNING_RATE["dpo"])
    assert described(training)["dpo"]["hyperparameters"] == given


def test_fields_of_ours() -> None:
    training = resolved(steps=7, accumulation=4, learning_rate=2e-3, loss_on="all")
    assert (training.steps, training.epochs, training.loss_on) == (7, None, "all")
    shown = described(training)["supervised"]["hyperparameters"]
    assert shown == {"batch_size": 32, "learning_rate_multiplier": 2.0}


@pytest.mark.parametrize(
    ("given", "training", "named"),
    [
        ({"n_epochs": 1}, {"steps": 1}, "training.steps"),
        ({"batch_size": 1}, {"batch_size": 1}, "training.batch_size"),
        ({"learning_rate_multiplier": 1}, {"learning_rate": 0.1}, "training.learning_rate"),
        ({"beta": 1}, {"dpo_beta": 0.1}, "training.dpo_beta"),
        ({}, {"method": "dpo"}, "training.method"),
        ({}, {"epochs": -1}, "training.epochs"),
        ({}, {"evaluation": {"rows": -1}}, "training.evaluation.rows"),
        ({}, {"nothing": 1}, "training.nothing"),
    ],
)
def test_refused(given: dict[str, Any], training: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolved("dpo", given, **training)
    assert refused.value.param == named


def test_one_way_to_hold_rows_out() -> None:
    with pytest.raises(InvalidRequest, match="validation_file"):
        resolve(
            "supervised",
            {},
            adapter={},
            training={"validation_fraction": 0.1},
            seed=1,
            has_validation=True,
        )
