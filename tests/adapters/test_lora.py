"""PEFT's LORA against PEFT itself: honoured fields give PEFT's logits, everything else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods import common, lora_config
from veneer.adapters.program import Program, SiteProgram
from veneer.adapters.registry import lower
from veneer.errors import AdapterRefused

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
KEY = "base_model.model."
HEAD_DUMP = f"{KEY}lm_head.base_layer.weight"
ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def apply(model: nn.Module, program: Program) -> None:
    """Add the primitives to a plain model: y += B^T (A x) + beta."""

    def hook(site: SiteProgram) -> Callable[..., torch.Tensor]:
        def add(module: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
            if site.a is not None and site.b is not None:
                y = y + inputs[0] @ site.a.T @ site.b
            return y if site.bias is None else y + site.bias

        return add

    for name, site in program.sites.items():
        model.get_submodule(name).register_forward_hook(hook(site))


def refusal(adapter: Any, base: Any, *, max_rank: int = 64) -> str:
    with pytest.raises(AdapterRefused) as error:
        lower(adapter.folder, base, max_rank)
    return error.value.message


HONOURED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1, "lora_alpha": 1},
    "fractional alpha": {"lora_alpha": 2.5},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"v_proj": 2, "layers.0.self_attn.q_proj": 5}},
    "alpha_pattern": {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 40}},
    "both patterns and rslora": {
        "use_rslora": True,
        "rank_pattern": {Q: 3},
        "alpha_pattern": {Q: 7, "self_attn.v_proj": 1},
    },
    "the first matching key wins": {"alpha_pattern": {"1.self_attn.q_proj": 2, Q: 5, "q_proj": 90}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "one layer": {"layers_to_transform": 0},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "a full name escapes layers_to_transform": {
        "target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"],
        "layers_to_transform": [1],
    },
    "lora_bias": {"lora_bias": True, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "every linear layer": {"target_modules": [*ALL_LINEAR, "lm_head"]},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "tied lm_head": {"target_modules": ["lm_head", "q_proj"], "tied": True},
    "tied": {"target_modules": "all-linear", "tied": True},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["k_proj", V]},
    "regular expression": {"target_modules": r".*layers\.1\.(mlp|self_attn)\.(up|q)_proj"},
    "excluded by regular expression": {"exclude_modules": r".*\.0\..*"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.5},
    "task_type": {"task_type": "CAUSAL_LM"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("fields", HONOURED.values(), ids=HONOURED.keys())
def test_logits_equal_pefts(
    fields: dict[str, Any],
    make_adapter: Callable[..., Any],
    make_llama: Callable[..., nn.Module],
    site_table: Callable[[nn.Module], Any],
    tokens: torch.Tensor,
) -> None:
    adapter = make_adapter(**fields)
    if fields.get("fan_in_fan_out"):
        adapter.edit_config(fan_in_fan_out=True)  # PEFT has set it to false for its linear layers
    model = make_llama(tied=fields.get("tied", False))
    with torch.no_grad():
        plain = model(tokens).logits
        program = lower(adapter.folder, site_table(model), 64)
        apply(model, program)
        logits = model(tokens).logits
    scale = adapter.logits.abs().max()
    assert (plain - adapter.logits).abs().max() > 1e-2 * scale, "the adapter must matter"
    assert (logits - adapter.logits).abs().max() < 1e-5 * scale
    for site in program.sites.values():
        for tensor in (site.a, site.b, site.bias):
            assert tensor is None or (tensor.is_contiguous() and tensor.dtype == torch.float32)


def test_program_says_what_it_is(make_adapter: Callable[..., Any], base: Any) -> None:
    adapter = make_adapter(rank_pattern={"v_proj": 12}, lora_bias=True)
    adapter.edit_config(base_model_name_or_path="org/base")
    program = lower(adapter.folder, base, 12)
    assert (program.kind, program.rank, program.base_model) == ("lora", 12, "org/base")
    assert program.primitives == ("low_rank", "bias")
    assert program.warnings == ()
    assert len(program.sites) == 4


@pytest.mark.parametrize("init", [False, "eva", "gaussian"])
def test_initialisations_that_leave_the_base_alone_are_served(init: Any, adapter: Any, base: Any) -> None:
    adapter.edit_config(init_lora_weights=init)
    assert len(lower(adapter.folder, base, 64).sites) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_exactly(dtype: torch.dtype, adapter: Any, base: Any) -> None:
    key = f"{KEY}{Q}.lora_A.weight"
    tensors: dict[str, torch.Tensor] = {}
    adapter.edit_tensors(tensors.update)
    half = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    adapter.edit_tensors(lambda tensors: tensors.update(half))
    a = lower(adapter.folder, base, 64).sites[Q].a
    assert a is not None
    assert torch.equal(a, half[key].float())


# ---- the sets of fields ---------------------------------------------------------------------------


def test_every_field_of_peft_is_in_exactly_one_set() -> None:
    honoured, training = lora_config.Honoured.__struct_fields__, lora_config.TrainingOnly.__struct_fields__
    decided = [*honoured, *training, *lora_config.REFUSED]
    assert len(decided) == len(set(decided))
    assert {field.name for field in dataclasses.fields(LoraConfig)} - set(decided) == set()


def test_defaults_are_pefts() -> None:
    """A field that the file leaves out means what it means to PEFT."""
    theirs = json.loads(json.dumps(LoraConfig().to_dict(), default=list)) | {"runtime_config": None}
    theirs["arrow_experts"] = None  # ours: see arrow.py
    ours = lora_config.read_config({"peft_type": "LORA"})
    for name in lora_config.Honoured.__struct_fields__:
        assert (getattr(ours, name) or None) == (theirs[name] or None), name
    for name, (off, _) in lora_config.REFUSED.items():
        assert theirs.get(name, off[0]) in off, name


# A value that turns the field on. init_lora_weights has more than one, below.
ON: dict[str, Any] = {
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa",
    "kasa_config": {},
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"a": 1},
    "modules_to_save": ["lm_head"],
    "task_type": "SEQ_CLS",
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [1],
    "use_qalora": True,
}


@pytest.mark.parametrize("field", lora_config.REFUSED)
def test_refused_fields_are_named(field: str, adapter: Any, base: Any) -> None:
    adapter.edit_config(**{field: ON[field]})
    message = refusal(adapter, base)
    assert f"{field} = {json.dumps(ON[field])}: " in message
    assert lora_config.REFUSED[field].reason in message or field == "modules_to_save"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("init_lora_weights", name)
            for name in ("pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "x")
        ),
        ("init_lora_weights", 1),
        ("bias", "boft_only"),
        ("task_type", "causal_lm"),
        ("r", "8"),
        ("r", True),
        ("r", 8.0),
        ("r", None),
        ("r", 0),
        ("r", -1),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_alpha", 1e41),
        ("lora_alpha", 10**400),
        ("use_rslora", 1),
        ("use_rslora", "true"),
        ("lora_bias", None),
        ("alora_invocation_tokens", []),
        ("alora_invocation_tokens", [1] * 65),
        ("alora_invocation_tokens", [3, -1]),
        ("alora_invocation_tokens", [1, 2.0]),
        ("alora_invocation_tokens", [True]),
        ("alora_invocation_tokens", 5),
        ("alora_invocation_tokens", "5"),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {".*q_proj": 4}),
        ("rank_pattern", {"(q|v)_proj": 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"(a+)+$": 4}),
        ("alpha_pattern", {"": 4}),
        ("alpha_pattern", {f"q{i}": 4 for i in range(5000)}),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", ["nothing"]),
        ("target_modules", [1]),
        ("ensure_weight_tying", 1),
        ("trainable_token_indices", []),
        ("trainable_token_indices", [3, 3]),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", [400]),
        ("trainable_token_indices", [1.5]),
        ("trainable_token_indices", {"q_proj": [1]}),
        ("trainable_token_indices", {"embed_tokens": [1], "model.embed_tokens": [2]}),
        ("trainable_token_indices", {"embed_tokens": []}),
        ("exclude_modules", 3),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [0.5]),
        ("layers_pattern", "layers"),
        ("lora_dropout", "none"),
        ("inference_mode", "yes"),
        ("peft_version", 21),
        ("base_model_name_or_path", ["x"]),
    ],
)
def test_wrong_values_are_refused_by_field(field: str, value: object, adapter: Any, base: Any) -> None:
    adapter.edit_config(**{field: value})
    assert f"adapter_config.json: {field} = " in refusal(adapter, base)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+$"}, "layers_pattern"),
        ({"layers_to_transform": [0], "layers_pattern": ["layers"] * 65}, "layers_pattern"),
    ],
)
def test_wrong_layer_choices_are_refused(fields: Any, named: str, adapter: Any, base: Any) -> None:
    adapter.edit_config(**fields)
    assert named in refusal(adapter, base)


def test_unknown_fields_are_refused_by_name(adapter: Any, base: Any) -> None:
    adapter.edit_config(use_something_new=False)
    assert "use_something_new" in refusal(adapter, base)


@pytest.mark.parametrize("kind", ["IA4", "lora", None, 7, ["LORA"]])
def test_other_kinds_are_refused_with_the_choices(kind: object, adapter: Any, base: Any) -> None:
    adapter.edit_config(peft_type=kind)
    message = refusal(adapter, base)
    assert f"peft_type {kind!r} is not served" in message
    assert "LORA" in message


def test_a_huge_rank_is_refused_before_anything_is_allocated(
    adapter: Any, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter.edit_config(r=100_000)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    tracemalloc.start()
    try:
        message = refusal(adapter, base, max_rank=512)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "r = 100000" in message
    assert "from 1 to 512" in message
    assert peak < 1 << 20


def test_the_largest_rank_is_served(make_adapter: Callable[..., Any], base: Any) -> None:
    adapter = make_adapter(r=64)
    assert lower(adapter.folder, base, 64).rank == 64
    assert "from 1 to 63" in refusal(adapter, base, max_rank=63)


# ---- the tensors ----------------------------------------------------------------------------------

A_KEY, B_KEY = f"{KEY}{Q}.lora_A.weight", f"{KEY}{Q}.lora_B.weight"


def test_missing_tensors_are_listed(adapter: Any, base: Any) -> None:
    adapter.edit_tensors(lambda tensors: tensors.pop(B_KEY))
    message = refusal(adapter, base)
    assert "1 tensor missing" in message
    assert B_KEY in message


def test_a_module_without_tensors_is_missing(adapter: Any, base: Any) -> None:
    adapter.edit_config(target_modules=["q_proj", "v_proj", "k_proj"])
    assert "4 tensors missing" in refusal(adapter, base)


def test_all_linear_wants_every_layer_but_the_head(adapter: Any, base: Any) -> None:
    adapter.edit_config(target_modules="all-linear")
    message = refusal(adapter, base)
    assert "20 tensors missing" in message  # 14 layers, of which 4 are there
    assert "lm_head" not in message


@pytest.mark.parametrize(
    ("key", "shape", "reason"),
    [
        (f"{KEY}model.layers.0.self_attn.k_proj.lora_A.weight", [8, 64], "leave this layer out"),
        (f"{KEY}model.layers.7.self_attn.q_proj.lora_A.weight", [8, 64], "no linear layer"),
        (f"{KEY}model.embed_tokens.lora_embedding_A", [8, 96], "leaves the embedding out"),
        (f"{KEY}{Q}.lora_magnitude_vector", [64], "use_dora is false"),
        (f"{KEY}{Q}.lora_A.default.weight", [8, 64], "adapter's name"),
        (f"{KEY}{Q}.lora_B.bias", [64], "lora_bias is false"),
        (f"{Q}.lora_A.weight", [8, 64], "keys begin with 'base_model.model.'"),
        (f"{KEY}{Q}.base_layer.weight", [64, 64], "cannot replace"),
        (f"{KEY}model.norm.weight", [64], "cannot replace"),
        (HEAD_DUMP, [96, 64], "cannot replace"),  # the head is not targeted
    ],
)
def test_extra_tensors_are_refused_with_the_reason(
    key: str, shape: list[int], reason: str, adapter: Any, base: Any
) -> None:
    adapter.edit_tensors(lambda tensors: tensors.update({key: torch.zeros(shape)}))
    message = refusal(adapter, base)
    assert key in message
    assert reason in message


@pytest.mark.parametrize("exclude", [{"exclude_modules": ["q_proj"]}, {"layers_to_transform": [1]}])
def test_tensors_of_untargeted_layers_are_extra(exclude: dict[str, Any], adapter: Any, base: Any) -> None:
    adapter.edit_config(**exclude)
    assert A_KEY in refusal(adapter, base)


@pytest.mark.parametrize("shape", [[4, 64], [8, 63], [64, 8], [8], [8, 64, 1], [0, 64]])
def test_wrong_shapes_are_refused_with_both(shape: list[int], adapter: Any, base: Any) -> None:
    adapter.edit_tensors(lambda tensors: tensors.update({A_KEY: torch.zeros(shape)}))
    message = refusal(adapter, base)
    assert A_KEY in message
    assert f"has {shape}" in message
    assert "need [8, 64]" in message


def test_rank_pattern_must_agree_with_the_tensors(adapter: Any, base: Any) -> None:
    adapter.edit_config(rank_pattern={"v_proj": 4})
    message = refusal(adapter, base)
    assert "4 tensors of a wrong shape" in message
    assert "need [4, 64]" in message


def test_another_bases_shapes_are_refused(
    adapter: Any, make_llama: Callable[..., nn.Module], site_table: Callable[[nn.Module], Any]
) -> None:
    message = refusal(adapter, site_table(make_llama(hidden=32)))
    assert "8 tensors of a wrong shape" in message
    assert "need [8, 32]" in message


def test_another_architecture_is_refused(adapter: Any, site_table: Callable[[nn.Module], Any]) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96))
    assert "no layer of the base matches" in refusal(adapter, site_table(gpt2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_tensor(value: float, adapter: Any, base: Any) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[B_KEY][63, 7] = value

    adapter.edit_tensors(poison)
    assert B_KEY in refusal(adapter, base)


# ---- warnings -------------------------------------------------------------------------------------


def test_the_copy_of_the_head_is_skipped_only_in_its_own_shape(
    make_adapter: Callable[..., Any], base: Any
) -> None:
    adapter = make_adapter(target_modules=["lm_head"])
    assert any(HEAD_DUMP in warning for warning in lower(adapter.folder, base, 64).warnings)
    adapter.edit_tensors(lambda tensors: tensors.update({HEAD_DUMP: torch.zeros(98, 64)}))
    message = refusal(adapter, base)  # a resized vocabulary
    assert HEAD_DUMP in message
    assert "[98, 64]" in message


# ---- aLoRA ----------------------------------------------------------------------------------------


def test_activated_lora_is_the_plain_one_with_its_invocation(adapter: Any, base: Any) -> None:
    plain = lower(adapter.folder, base, 64)
    assert (plain.invocation, plain.warnings) == ((), ())
    adapter.edit_config(alora_invocation_tokens=[95, 0, 7], task_type="CAUSAL_LM")
    program = lower(adapter.folder, base, 64)
    assert program.invocation == (95, 0, 7)
    assert "A prompt without these tokens is answered as the base does" in program.warnings[0]
    for name, site in program.sites.items():
        assert all(map(torch.equal, site.tensors, plain.sites[name].tensors))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "PEFT does not combine it with use_dora"),
        ({"alora_invocation_tokens": [5, 96]}, "[5, 96]: 96 is no token of the base; it has 96"),
        ({"task_type": None}, 'task_type = null: without "CAUSAL_LM" PEFT looks for no invocation'),
        ({"use_bdlora": {}}, "PEFT does not combine it with use_bdlora"),
        ({"velora_config": {}}, "PEFT does not combine it with velora_config"),
        ({"monteclora_config": {}}, "PEFT does not combine it with monteclora_config"),
        ({"init_lora_weights": "mica"}, 'init_lora_weights = "mica": PEFT does not combine it'),
        ({"bias": "lora_only"}, 'bias = "lora_only": it changes the base\'s biases before the invocation'),
    ],
    ids=str,
)
def test_activated_lora_with_other_variants_is_refused(
    fields: Any, message: str, adapter: Any, base: Any
) -> None:
    adapter.edit_config(**{"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM", **fields})
    assert message in refusal(adapter, base)


def test_what_has_no_effect_is_warned_about(adapter: Any, base: Any) -> None:
    adapter.edit_config(
        fan_in_fan_out=True, target_modules=["q_proj", "v_proj", "query_key_value"], rank_pattern={"idle": 3}
    )
    warnings = " ".join(lower(adapter.folder, base, 64).warnings)
    assert "fan_in_fan_out" in warnings
    assert "query_key_value" in warnings
    assert "rank_pattern: 'idle'" in warnings


# ---- patterns -------------------------------------------------------------------------------------


def test_plain_patterns_match_as_in_peft() -> None:
    names = ["model.layers.1.q_proj", "model.layers.11.q_proj", "layers.1.q_proj", "q_proj", "xq_proj", "a.b"]
    parts = ["^", "model", ".", "\\.", "layers", "1", "11", "q_proj", "x", "-", "$"]
    draw = random.Random(0)
    checked = matched = 0
    for _ in range(20_000):
        key = "".join(draw.choices(parts, k=draw.randint(1, 6)))
        try:
            first = common.compile_pattern("alpha_pattern", [key])
        except AdapterRefused:
            continue
        for name in names:
            theirs = re.match(rf"(.*\.)?({key})$", name) is not None  # peft.utils.other.get_pattern_key
            assert (first(name) == key) == theirs, (key, name)
            checked += 1
            matched += theirs
    assert checked > 20_000
    assert matched > 100


def test_hostile_patterns_cost_nothing(adapter: Any, base: Any) -> None:
    """Strings that take PEFT's regular expressions minutes are never run (the suite's timeout would tell)."""
    hostile = r"(([a-z_.0-9]+)+)+!"
    adapter.edit_config(target_modules=hostile, exclude_modules=hostile)
    assert len(lower(adapter.folder, base, 64).sites) == 4
