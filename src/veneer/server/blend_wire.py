"""How requests name several adapters: our `adapters` with `max_rank`, and LoRAX's `merged_adapters`.

LoRAX applies its strategies to the factors A and B by themselves, with the first adapter's alpha; here they act on
the changes of the weights (adapters/merging.py), so `linear` is the weighted sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from veneer.adapters.names import Selector, parse_selector
from veneer.adapters.recipes import PARTS_LIMIT, WEIGHT_LIMIT, Recipe, recipe
from veneer.adapters.saved_blends import Blend, Ingredient
from veneer.adapters.schema import AdapterVersion
from veneer.adapters.store import AdapterStore
from veneer.errors import InvalidRequest, NotFound

Weight = Annotated[float, Field(ge=-WEIGHT_LIMIT, le=WEIGHT_LIMIT)]
Density = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=1, lt=2**31)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class WeightedAdapter(Strict):
    """One adapter of several."""

    id: Annotated[str, Field(min_length=1)]  # as `model` names it
    weight: Weight = 1.0
    task_id: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class MergedAdapters(Strict):
    """LoRAX's body, with its names and defaults."""

    ids: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=PARTS_LIMIT)]
    weights: Annotated[list[Weight], Field(max_length=PARTS_LIMIT)]
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: Density = 0.0
    majority_sign_method: Literal["total", "frequency"] | None = None


WeightedAdapters = Annotated[list[WeightedAdapter], Field(min_length=1, max_length=PARTS_LIMIT)]


class Mixture(NamedTuple):
    """What a request says of several adapters; nothing of it means one or none, by `model`."""

    adapters: Sequence[WeightedAdapter] | None = None
    merged_adapters: MergedAdapters | None = None
    max_rank: int | None = None

    @property
    def is_empty(self) -> bool:
        return self == Mixture()


def make_blend(store: AdapterStore, served_name: str, mixture: Mixture) -> Blend | None:
    """The blend that a request asks for; None when nothing of it is left, which is the base.

    Raises InvalidRequest, and NotFound for an adapter that is not there.
    """
    adapters, merged, rank = mixture
    if adapters is not None and merged is not None:
        raise InvalidRequest(
            "adapters and merged_adapters say the same thing; send one", param="merged_adapters"
        )
    if merged is not None:
        found = [WeightedAdapter(id=name, weight=w) for name, w in zip(*_pairs(merged), strict=True)]
        ingredients = [ingredient(store, served_name, each, "merged_adapters") for each in found]
        return _of(ingredients, _lorax(ingredients, merged, rank))
    if adapters is None:
        raise InvalidRequest(f"max_rank={rank} belongs to adapters; leave it out", param="max_rank")
    ingredients = [ingredient(store, served_name, each, "adapters") for each in adapters]
    return _of(ingredients, recipe([each.part for each in ingredients], rank=rank))


def ingredient(store: AdapterStore, served_name: str, asked: WeightedAdapter, param: str) -> Ingredient:
    """The version that is meant now. Raises NotFound, and InvalidRequest for the base, a blend and a wrong task."""
    selector = parse_selector(asked.id, served_name)
    if not isinstance(selector, Selector):
        raise InvalidRequest(f"{asked.id!r} is the base, which needs no weight; leave it out", param=param)
    try:
        adapter = store.resolve(selector.name, selector.version)
    except NotFound:
        if not store.blends(selector.name):
            raise
        rule = f"{asked.id!r} is a blend itself; name its adapters with their weights"
        raise InvalidRequest(rule, param=param) from None
    return Ingredient(adapter, _task(adapter, asked.task_id, param), asked.weight)


def _task(adapter: AdapterVersion, task: int | None, param: str) -> int:
    if (task is None and adapter.tasks > 1) or (task is not None and task >= adapter.tasks):
        has = (
            f"the tasks 0 to {adapter.tasks - 1}; its entry needs a task_id" if adapter.tasks else "no tasks"
        )
        raise InvalidRequest(f"task_id={task} of {adapter.name!r}: it has {has}.", param=param)
    return task or 0


def _of(ingredients: Sequence[Ingredient], made: Recipe) -> Blend | None:
    """Without what weighs nothing."""
    left = {part.key for part in made.parts}
    found = tuple(each for each in ingredients if each.part.key in left)
    return Blend(made, found) if found else None


def _pairs(merged: MergedAdapters) -> tuple[list[str], list[float]]:
    if len(merged.ids) != len(merged.weights):
        raise InvalidRequest(
            f"merged_adapters has {len(merged.ids)} ids and {len(merged.weights)} weights; each id needs one",
            param="merged_adapters.weights",
        )
    return merged.ids, merged.weights


def _lorax(ingredients: Sequence[Ingredient], merged: MergedAdapters, rank: int | None) -> Recipe:
    strategy = merged.merge_strategy or "linear"
    if strategy != "linear" and merged.density == 0:
        raise InvalidRequest(
            f"merged_adapters.density={merged.density:g}: {strategy} would leave nothing; it must be above 0",
            param="merged_adapters.density",
        )
    if strategy == "linear" and 0 < merged.density < 1:
        raise InvalidRequest(
            f"merged_adapters.density={merged.density:g}: linear leaves nothing out; leave it out",
            param="merged_adapters.density",
        )
    return recipe(
        [each.part for each in ingredients],
        strategy,
        density=merged.density or 1.0,
        sign=merged.majority_sign_method or "total",
        rank=rank,
    )
