"""Trainable tokens and LoRA at the embedding: what the programs hold, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.adapters.files import edit_config, refusal

from veneer.adapters.methods import trainable_tokens
from veneer.adapters.methods.base import Limits
from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.program import EMBEDDING, HEAD, Program
from veneer.adapters.registry import lower

KEY = "base_model.model."
DELTA = "token_adapter.trainable_tokens_delta"
Make = Callable[..., Path]


@pytest.fixture
def bases(make_llama: Callable[..., Any], site_table: Callable[[Any], Any]) -> Callable[[bool], Any]:
    """A function: whether embeddings are tied -> what methods see of the base."""
    return lambda tied: site_table(make_llama(tied=tied))


@pytest.fixture
def make(tmp_path: Path, make_llama: Callable[..., Any]) -> Make:
    """A function: config, whether tied, whether trained -> the folder that PEFT saved."""

    def save(config: Any, *, tied: bool = False, moved: bool = True) -> Path:
        model = get_peft_model(make_llama(tied=tied), config)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad and moved:
                parameter.data += torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return save


def trained(**fields: Any) -> TrainableTokensConfig:
    return TrainableTokensConfig(**{"token_indices": [7, 2, 90]} | fields)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | fields)


def rows_at(program: Program, site: str) -> Any:
    found = program.sites[site].tokens
    assert found is not None
    return found


def product(program: Program, site: str) -> torch.Tensor:
    """Its low-rank change [out, in]."""
    a, b = program.sites[site].a, program.sites[site].b
    assert a is not None
    assert b is not None
    return b.T @ a


# ---- what they hold -------------------------------------------------------------------------------


def test_rows_are_in_the_order_of_ids(make: Make, bases: Any) -> None:
    folder = make(trained())
    program = lower(folder, bases(False), 64)
    stored = load_file(folder / WEIGHTS_FILE)[f"{KEY}{EMBEDDING}.trainable_tokens_delta"]
    rows = rows_at(program, EMBEDDING)
    assert rows.ids.tolist() == [2, 7, 90]
    assert rows.rows.equal(stored[[1, 0, 2]])
    assert HEAD not in program.sites
    assert (program.kind, program.primitives) == ("trainable_tokens", ("token_rows",))


def test_the_head_of_tied_embeddings_has_the_same_rows(make: Make, bases: Any) -> None:
    for folder in (make(trained(), tied=True), make(lora(trainable_token_indices=[7, 2, 90]), tied=True)):
        program = lower(folder, bases(True), 64)
        one, other = (rows_at(program, site) for site in (EMBEDDING, HEAD))
        assert one.ids.equal(other.ids)
        assert one.rows.equal(other.rows)


def test_a_base_that_scales_has_scaled_embeddings(make: Make, bases: Any) -> None:
    folder = make(trained(target_modules=["embed_tokens", "lm_head"]))
    plain, scaled = (
        lower(folder, dataclasses.replace(bases(False), embedding_scale=scale), 64) for scale in (1.0, 8.0)
    )
    assert rows_at(scaled, EMBEDDING).rows.equal(8 * rows_at(plain, EMBEDDING).rows)
    assert rows_at(scaled, HEAD).rows.equal(rows_at(plain, HEAD).rows)


def test_what_is_the_bases_own_is_left_out(make: Make, bases: Any) -> None:
    """As it is served: 16 bits do not tell a change of a thousandth."""
    folder = make(trained(), moved=False)
    base = bases(False)
    assert lower(folder, base, 64).is_identity
    stored = load_file(folder / WEIGHTS_FILE)
    [key] = stored
    stored[key][1] *= 1.0001
    save_file(stored, folder / WEIGHTS_FILE)
    assert rows_at(lower(folder, base, 64), EMBEDDING).ids.tolist() == [2]
    half = dataclasses.replace(base, dtype=torch.bfloat16)
    half.model.bfloat16().float()
    stored[key] = half.token_rows(EMBEDDING, torch.tensor([7, 2, 90])) * 1.0001
    save_file(stored, folder / WEIGHTS_FILE)
    assert lower(folder, half, 64).is_identity


def test_lora_of_the_embedding_ties_the_head(make: Make, bases: Any) -> None:
    folder = make(lora(target_modules=["embed_tokens"], ensure_weight_tying=True, lora_alpha=6), tied=True)
    program = lower(folder, bases(True), 64)
    torch.testing.assert_close(product(program, HEAD), product(program, EMBEDDING).T)
    untied = lower(make(lora(target_modules=["embed_tokens"], ensure_weight_tying=True)), bases(False), 64)
    assert set(untied.sites) == {EMBEDDING}


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("token_indices", [], "it must name a token"),
        ("token_indices", [7, 2, 2], "once each"),
        ("token_indices", [7, 2, -1], "once each"),
        ("token_indices", [7, 2, 400], "the base has the ids 0 to 95"),
        ("target_modules", ["q_proj"], "at 'model.embed_tokens', 'lm_head' alone"),
        ("target_modules", ["embed_tokens", "q_proj"], "at 'model.embed_tokens', 'lm_head' alone"),
        ("task_type", "SEQ_CLS", "only causal language models"),
    ],
)
def test_wrong_configs_are_refused_by_field(
    field: str, value: Any, rule: str, make: Make, bases: Any
) -> None:
    message = refusal(edit_config(make(trained()), **{field: value}), bases(False))
    assert f"adapter_config.json: {field} = " in message
    assert rule in message


def test_every_field_of_peft_is_decided_on() -> None:
    decided = {
        *trainable_tokens.Honoured.__struct_fields__,
        *trainable_tokens.TrainingOnly.__struct_fields__,
        *trainable_tokens.REFUSED,
    }
    assert {field.name for field in dataclasses.fields(TrainableTokensConfig)} - decided == set()


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"target_modules": ["embed_tokens"], "trainable_token_indices": [3]}, "trainable_token_indices"),
        (
            {"target_modules": ["lm_head"], "trainable_token_indices": {"lm_head": [3]}},
            "trainable_token_indices",
        ),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "use_dora"),
        (
            {
                "target_modules": ["embed_tokens"],
                "alora_invocation_tokens": [3],
                "task_type": "CAUSAL_LM",
            },
            "alora_invocation_tokens",
        ),
        (
            {"trainable_token_indices": [3], "alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
            "trainable_token_indices",
        ),
    ],
)
def test_what_does_not_go_together_at_the_embedding_is_refused(
    config: dict[str, Any], field: str, make: Make, bases: Any
) -> None:
    message = refusal(edit_config(make(lora()), **config), bases(False))
    assert f"adapter_config.json: {field} = " in message


def test_tied_embeddings_must_agree(make: Make, bases: Any) -> None:
    folder = make(trained(), tied=True)
    stored = load_file(folder / WEIGHTS_FILE)
    stored[f"{KEY}{HEAD}.trainable_tokens_delta"] = stored[f"{KEY}{EMBEDDING}.trainable_tokens_delta"] + 1
    save_file(stored, folder / WEIGHTS_FILE)
    assert "differs from the embedding's rows" in refusal(folder, bases(True))
    apart = {"embed_tokens": [1, 2], "lm_head": [3]}
    folder = make(lora(trainable_token_indices=apart), tied=True)
    assert set(lower(folder, bases(True), 64).sites) > {EMBEDDING, HEAD}
    assert "must have the same trainable_token_indices" in refusal(
        edit_config(folder, ensure_weight_tying=True), bases(True)
    )


def test_files_must_hold_exactly_the_rows(make: Make, bases: Any) -> None:
    folder = make(lora(trainable_token_indices=[7, 2]))
    message = refusal(edit_config(folder, trainable_token_indices=[7, 2, 3]), bases(False))
    assert f"'{KEY}{EMBEDDING}.{DELTA}' has [2, 64], the config and the base need [3, 64]" in message
    assert "1 tensor cannot be served" in refusal(
        edit_config(folder, trainable_token_indices=None), bases(False)
    )
    assert "1 tensor missing" in refusal(
        edit_config(folder, trainable_token_indices={"embed_tokens": [7, 2], "lm_head": [1]}), bases(False)
    )


@pytest.mark.parametrize(
    ("ids", "rule"), [([96, 98], "must follow each other from 96 on"), ([96, 97, 98], "may add 2")]
)
def test_added_tokens_must_be_the_next_few(ids: list[int], rule: str, make: Make, bases: Any) -> None:
    base = dataclasses.replace(bases(False), limits=Limits(added_tokens=2))
    if len(ids) == 2:
        base = dataclasses.replace(base, limits=Limits(added_tokens=3))
    assert rule in refusal(edit_config(make(trained()), token_indices=ids), base)
