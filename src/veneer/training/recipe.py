"""A training recipe: one YAML file that says everything about how an adapter is made.

    base: SmolLM2-135M-Instruct        # as for `veneer serve`: default base, folder, .gguf file or hub id
    data: negate.train.jsonl           # relative paths start at the recipe's folder
    test_data: negate.test.jsonl       # or test_fraction: 0.1
    output: adapter
    steps: 60                          # or epochs: 3
    lora: {rank: 8, alpha: 16, targets: all-linear}

Fields that are not listed here are refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veneer.errors import InvalidRequest

Positive = Annotated[int, Field(gt=0)]
Dtype = Literal["float32", "bfloat16", "float16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(_Strict):
    """PEFT's LoraConfig, by the same meanings."""

    rank: Annotated[int, Field(gt=0, le=512)] = 8
    alpha: Positive = 16
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False


class Evaluation(_Strict):
    """Exact match on held-out rows by greedy generation, on the base and on the trained adapter."""

    rows: Annotated[int, Field(ge=0)] = 100  # of the held-out rows; 0 switches it off
    max_new_tokens: Positive = 64
    batch_size: Positive = 16


class Recipe(_Strict):
    """Everything that decides the trained adapter, apart from the machine."""

    base: str | None = None  # None is the default base
    revision: str | None = None  # of a hub base
    data: Path
    test_data: Path | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    output: Path
    template: Literal["chat", "none"] = "chat"  # how a prompt is put: as a user's message, or as it is
    lora: Lora = Lora()
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 8
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Positive = 512  # tokens of prompt and answer together; longer rows are refused
    seed: int = 0
    quantization: Literal["none", "nf4"] = "none"  # of the base while training
    dtype: Literal["auto"] | Dtype = "auto"  # of the base; auto: bfloat16 on CUDA, float32 on CPU
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    save_dtype: Dtype = "float32"  # of the adapter's file
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _one_of_each(self) -> Recipe:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        if self.test_data is not None and self.test_fraction is not None:
            raise ValueError("give `test_data` or `test_fraction`, not both")
        return self


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; its relative paths become relative to its folder.

    Raises:
        InvalidRequest: the file cannot be read, or a field is wrong; every wrong field is named.
    """
    try:
        fields = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidRequest(f"recipe {str(path)!r} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"recipe {str(path)!r} must be a YAML mapping of fields, not {fields!r:.80}")
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(_fault(dict(item)) for item in error.errors())
        raise InvalidRequest(f"recipe {str(path)!r}: {faults}") from error
    placed: dict[str, Path | str] = {
        name: path.parent / value
        for name in ("data", "test_data", "output")
        if (value := getattr(recipe, name)) is not None
    }
    if recipe.base is not None and recipe.base.startswith("."):
        placed["base"] = str(path.parent / recipe.base)
    return recipe.model_copy(update=placed)


def _fault(item: dict[str, object]) -> str:
    location = item["loc"]
    where = ".".join(str(part) for part in location) if isinstance(location, tuple) else ""
    if item["type"] == "extra_forbidden":
        known = (
            Lora if where.startswith("lora.") else Evaluation if where.startswith("evaluation.") else Recipe
        )
        return f"{where!r} is not a field; the fields are {', '.join(known.model_fields)}"
    value = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r:.60})"
    return f"{where + ': ' if where else ''}{item['msg']}{value}"
