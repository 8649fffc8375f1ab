"""What to train and how: the `Training` of a fine-tuning job, and the YAML recipe of `veneer train` around it.

    base: SmolLM2-135M-Instruct        # as for `veneer serve`: default base, folder, .gguf file or hub id
    data: negate.train.jsonl           # relative paths start at the recipe's folder
    test_data: negate.test.jsonl       # or test_fraction: 0.1
    output: adapter
    steps: 60                          # or epochs: 3
    adapter: {kind: lora, rank: 8, alpha: 16, targets: all-linear}

Fields that are not listed here are refused by name. Imports no torch: the HTTP process checks jobs with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veneer.errors import InvalidRequest
from veneer.training.evaluation.metrics import Metric

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
Kind = Literal[
    "lora",
    "rslora",
    "dora",
    "lora+",
    "adalora",
    "vera",
    "gralora",
    "loha",
    "lokr",
    "oft",
    "ia3",
    "hra",
    "miss",
    "prefix",
    "prompt",
    "p-tuning",
    "bitfit",
    "reft",
    "bottleneck",
    "layers",
]


HELD_OUT = "held_out.jsonl"  # in a job's folder: the validation rows, for its evaluation

_LORA = ("rank", "alpha", "dropout", "targets", "init", "layers", "options")
_TARGETS = ("targets", "layers", "options")
USES: Mapping[Kind, tuple[str, ...]] = {
    "lora": _LORA,
    "rslora": _LORA,
    "dora": _LORA,
    "lora+": _LORA,
    "adalora": ("rank", "alpha", "dropout", *_TARGETS),
    "vera": ("rank", "dropout", *_TARGETS),
    "gralora": ("rank", "alpha", "dropout", *_TARGETS),
    "loha": ("rank", "alpha", *_TARGETS),
    "lokr": ("rank", "alpha", *_TARGETS),
    "oft": ("rank", *_TARGETS),
    "ia3": ("targets", "options"),
    "hra": ("rank", *_TARGETS),
    "miss": ("rank", "dropout", *_TARGETS),
    "prefix": ("tokens", "options"),
    "prompt": ("tokens", "options"),
    "p-tuning": ("tokens", "options"),
    "bitfit": ("targets", "options"),
    "reft": ("rank", "layers", "options"),
    "bottleneck": ("rank", "layers", "options"),
    "layers": ("layers", "targets"),
}
"""The fields of `Adapter` that each kind uses."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Adapter(_Strict):
    """What is trained. A field that is set and that the kind has no use for is refused."""

    kind: Kind = "lora"
    rank: Annotated[int, Field(gt=0, le=512)] = 8  # r; block size of oft; size of a bottleneck
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    init: Literal["default", "pissa", "olora", "loftq", "eva"] = "default"  # of LoRA's factors
    tokens: Positive = 16  # virtual tokens of prefix, prompt and p-tuning
    layers: list[Annotated[int, Field(ge=0)]] | None = None  # decoder layers to train; None: all
    options: dict[str, Any] = {}  # further fields of PEFT's config of this kind, by its names

    @model_validator(mode="after")
    def _has_use_for_all(self) -> Adapter:
        idle = sorted(self.model_fields_set - {"kind", *USES[self.kind]})
        if idle:
            value = getattr(self, idle[0])
            raise ValueError(
                f"{idle[0]}={value!r}: kind {self.kind!r} has no use for it; its fields are "
                f"{', '.join(USES[self.kind])}. Leave it out"
            )
        return self


class Gate(_Strict):
    """What the trained version must reach on the held-out rows, or it is not published."""

    metric: Metric = "exact_match"
    at_least: Annotated[float, Field(allow_inf_nan=False)] | None = None  # for perplexity: at most
    no_worse_than: Literal["base", "previous"] | None = None

    @model_validator(mode="after")
    def _asks_what_can_be(self) -> Gate:
        if self.at_least is None and self.no_worse_than is None:
            raise ValueError("a gate needs `at_least` or `no_worse_than`")
        if self.at_least is not None and self.metric != "perplexity" and not 0 <= self.at_least <= 1:
            raise ValueError(f"`at_least` of {self.metric} is from 0 to 1 (got {self.at_least})")
        return self


class Evaluation(_Strict):
    """By greedy generation on held-out rows, of the base and of the trained adapter."""

    rows: Annotated[int, Field(ge=0)] = 100  # of the held-out rows; 0 switches it off
    max_new_tokens: Positive = 64
    batch_size: Positive = 16
    gate: Gate | None = None


class Training(_Strict):
    """Everything that decides the trained adapter, apart from base, data and machine."""

    method: Literal["supervised", "dpo", "self_supervised"] = "supervised"
    adapter: Adapter = Adapter()
    template: Literal["chat", "none"] = "chat"  # how a prompt is put: as a user's message, or as it is
    loss_on: Literal["answer", "assistant", "all"] = "answer"  # last answer, all assistant turns, all tokens
    max_length: Positive = 512  # tokens of prompt and answer together
    overlong: Literal["refuse", "drop", "keep_start", "keep_end"] = "refuse"  # rows longer than that
    packing: bool = False  # several rows in one sequence; none attends to another
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    loraplus_ratio: Annotated[float, Field(ge=1)] | None = (
        None  # learning rate of B over that of A; lora+: 16
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 8  # rows (packed sequences) of a micro-batch
    accumulation: Positive = 1  # micro-batches of a step
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None  # noise on embeddings (Jain et al., 2023)
    gradient_checkpointing: bool = False
    dpo_beta: Annotated[float, Field(gt=0)] = 0.1
    validation_fraction: Fraction | None = None  # of the rows, when no validation rows are given
    evaluate_every: Positive | None = (
        None  # steps between validation losses; None: at checkpoints and the end
    )
    checkpoint_every: Positive | None = None  # steps between servable checkpoints; None: once an epoch
    keep_best: bool = True  # the result is the checkpoint of the least validation loss, where there is one
    patience: Positive | None = None  # validations without a better loss, after which training ends
    seed: int = 0
    save_dtype: Dtype = "float32"  # of the adapter's file
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fits_together(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        if self.packing and self.method == "dpo":
            raise ValueError("`packing` is for single sequences; dpo has pairs")
        return self


class Recipe(Training):
    """A training on a base of its own, with files."""

    base: str | None = None  # None is the default base
    revision: str | None = None  # of a hub base
    data: Path
    validation_data: Path | None = None
    test_data: Path | None = None
    test_fraction: Fraction | None = None
    chat_template: Path | None = (
        None  # a Jinja file, kept with the adapter, whose requests then use it; None: the base's
    )
    output: Path
    quantization: Literal["none", "nf4", "int8"] = "none"  # of the base while training
    dtype: Literal["auto"] | Dtype = "auto"  # of the base; auto: bfloat16 on CUDA, float32 on CPU
    device: str = "auto"  # auto | cpu | cuda | cuda:N

    @model_validator(mode="after")
    def _one_of_each(self) -> Recipe:
        for kind in ("test", "validation"):
            if getattr(self, f"{kind}_data") is not None and getattr(self, f"{kind}_fraction") is not None:
                raise ValueError(f"give `{kind}_data` or `{kind}_fraction`, not both")
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
        raise InvalidRequest(f"recipe {str(path)!r}: {faults(Recipe, error)}") from error
    placed: dict[str, Path | str] = {
        name: path.parent / value
        for name in ("data", "validation_data", "test_data", "chat_template", "output")
        if (value := getattr(recipe, name)) is not None
    }
    if recipe.base is not None and recipe.base.startswith("."):
        placed["base"] = str(path.parent / recipe.base)
    return recipe.model_copy(update=placed)


def faults(model: type[Training], error: ValidationError) -> str:
    """Every fault of a `model` that did not validate, each with its field and value."""
    return "; ".join(_fault(model, dict(item)) for item in error.errors())


def _fault(model: type[Training], item: dict[str, object]) -> str:
    location = item["loc"]
    where = ".".join(str(part) for part in location) if isinstance(location, tuple) else ""
    if item["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {"adapter": Adapter, "evaluation": Evaluation}
        owner = Gate if where.startswith("evaluation.gate.") else parts.get(where.partition(".")[0], model)
        return f"{where!r} is not a field; the fields are {', '.join(owner.model_fields)}"
    value = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r:.60})"
    return f"{where + ': ' if where else ''}{item['msg']}{value}"
