"""From OpenAI's hyperparameters to a `Training`, and back: every default of a job stands here. No torch.

    hyperparameter            "auto"                        the field of `Training`
    n_epochs                  3                             epochs
    batch_size                8                             batch_size; told times `accumulation`
    learning_rate_multiplier  1                             learning_rate, by LEARNING_RATE of the method
    beta (dpo)                0.1                           dpo_beta

What else a job may set, it sets by the fields of `Training`: in `training`, or for the adapter in `adapter`.
Fields that nobody sets have the defaults of `Training`, but the loss of a supervised job is on all answers of
a conversation, as OpenAI has it, and plain text has neither prompt nor answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from veneer.errors import InvalidRequest
from veneer.training.recipe import Training, faults

Method = Literal["supervised", "dpo", "self_supervised"]
METHODS: tuple[Method, ...] = ("supervised", "dpo", "self_supervised")
EPOCHS = 3
BATCH_SIZE = 8
BETA = 0.1
# Of adapters, with the multiplier 1. A preference moves a model by far less than its answers' text does.
LEARNING_RATE: Mapping[Method, float] = {"supervised": 1e-3, "dpo": 5e-5, "self_supervised": 1e-3}
_FIELDS = {
    "n_epochs": ("epochs", "steps"),
    "batch_size": ("batch_size",),
    "learning_rate_multiplier": ("learning_rate",),
    "beta": ("dpo_beta",),
}
_ELSEWHERE = {"method": "method.type", "adapter": "adapter", "seed": "seed"}
_BY_METHOD: Mapping[Method, Mapping[str, Any]] = {
    "supervised": {"loss_on": "assistant"},
    "dpo": {},
    "self_supervised": {"loss_on": "all", "template": "none"},
}


def resolve(
    method: Method,
    hyperparameters: Mapping[str, Any],
    *,
    adapter: Mapping[str, Any],
    training: Mapping[str, Any],
    seed: int,
    has_validation: bool,
) -> Training:
    """The `Training` of a job. `hyperparameters` has those that are not "auto".

    Raises `InvalidRequest` for what is set twice, for unknown fields and for wrong values.
    """
    for name, place in _ELSEWHERE.items():
        if name in training:
            raise InvalidRequest(f"training.{name} is set by {place}; leave it out", param=f"training.{name}")
    for name in hyperparameters:
        for field in _FIELDS[name]:
            if field in training:
                raise InvalidRequest(
                    f"training.{field} and the hyperparameter {name} set the same; send one of them",
                    param=f"training.{field}",
                )
    if has_validation and training.get("validation_fraction") is not None:
        raise InvalidRequest(
            "training.validation_fraction splits the rows of the training file, and there is a validation_file; "
            "send one of them",
            param="training.validation_fraction",
        )
    evaluation = training.get("evaluation")
    gate = evaluation.get("gate") if isinstance(evaluation, Mapping) else None
    if gate is not None and not has_validation and training.get("validation_fraction") is None:
        raise InvalidRequest(
            "training.evaluation.gate is measured on validation rows, and there are none; send a "
            "validation_file or training.validation_fraction",
            param="training.evaluation.gate",
        )
    fields = _defaults(method, hyperparameters, training)
    fields |= {"method": method, "adapter": adapter, "seed": seed, **training}
    try:
        return Training.model_validate(fields)
    except ValidationError as error:
        location = error.errors()[0]["loc"]
        place = ".".join(map(str, location))
        param = place if location[:1] == ("adapter",) else f"training.{place}".rstrip(".")
        raise InvalidRequest(f"training: {faults(Training, error)}", param=param) from None


def _defaults(
    method: Method, hyperparameters: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    fields: dict[str, Any] = dict(_BY_METHOD[method])
    if "steps" not in training:
        fields["epochs"] = hyperparameters.get("n_epochs", EPOCHS)
    fields["batch_size"] = hyperparameters.get("batch_size", BATCH_SIZE)
    fields["learning_rate"] = LEARNING_RATE[method] * hyperparameters.get("learning_rate_multiplier", 1)
    fields["dpo_beta"] = hyperparameters.get("beta", BETA)
    return fields


def described(training: Training) -> dict[str, Any]:
    """OpenAI's `method` of the job object, with the values that are used.

    `n_epochs` is missing when the job has a number of steps instead.
    """
    shown: dict[str, Any] = {"batch_size": training.batch_size * training.accumulation}
    if training.epochs is not None:
        whole = training.epochs.is_integer()
        shown["n_epochs"] = int(training.epochs) if whole else training.epochs
    multiplier = training.learning_rate / LEARNING_RATE[training.method]
    shown["learning_rate_multiplier"] = float(f"{multiplier:.12g}")
    if training.method == "dpo":
        shown["beta"] = training.dpo_beta
    return {"type": training.method, training.method: {"hyperparameters": shown}}
