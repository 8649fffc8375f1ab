"""`modules_to_save` and PARTIAL: which modules are read, in which form they are kept, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.adapters.files import refusal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Limits, Norm
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import EMBEDDING, HEAD
from veneer.adapters.registry import lower

KEY = "base_model.model."
OUT = "model.layers.1.self_attn.o_proj"
NORM = "model.layers.1.input_layernorm"
READERS = tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture
def served(make_llama: Callable[..., Any], site_table: Callable[[Any], Any]) -> Any:
    base = site_table(make_llama())
    norms = {
        NORM: Norm(torch.full((64,), 2.0), 0.0, READERS),
        "model.layers.1.self_attn.q_norm": Norm(torch.ones(16), 0.0, ()),
    }
    return dataclasses.replace(base, norms=norms)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function: names, tensors by module path, further fields -> a folder."""

    def make(names: Any, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
        config = {"peft_type": "PARTIAL", "modules_to_save": names, **fields}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        save_file({f"{KEY}{path}": tensor for path, tensor in tensors.items()}, tmp_path / WEIGHTS_FILE)
        return tmp_path

    return make


def test_a_linear_layer_is_its_own_weight_without_the_bases_output(write: Any, served: Any) -> None:
    weight = torch.randn(64, 64)
    program = lower(write(["layers.1.self_attn.o_proj"], {f"{OUT}.weight": weight}), served, 64)
    [site] = program.sites.values()
    assert site.dense is not None
    assert site.scale_out is not None
    assert site.dense.equal(weight)
    assert not site.scale_out.any()
    assert (program.kind, program.portability) == ("partial", "independent")


def test_a_norm_scales_what_reads_it(write: Any, served: Any) -> None:
    q, new = READERS[0], torch.rand(64) + 1
    weight = torch.randn(64, 64)
    folder = write(["q_proj", "input_layernorm"], {
        f"{NORM}.weight": new, f"{q}.weight": weight, f"{q.replace('layers.1', 'layers.0')}.weight": weight.clone(),
    })  # fmt: skip
    program = lower(folder, served, 64)
    assert program.portability == "proportional"
    replaced, scaled = program.sites[q], program.sites[READERS[1]]
    assert replaced.dense is not None
    torch.testing.assert_close(replaced.dense, weight * (new / 2))
    assert replaced.rotate_in is None
    assert scaled.rotate_in is not None
    assert scaled.rotate_in.flatten().equal(new / 2)
    assert program.sites[q.replace("layers.1", "layers.0")].dense.equal(weight)  # type: ignore[union-attr]


def test_embedding_and_head_keep_the_rows_that_differ(write: Any, served: Any) -> None:
    embedding, head = (served.model.get_submodule(path).weight.detach().clone() for path in (EMBEDDING, HEAD))
    embedding[[5, 90]] += 1
    head[7] -= 1
    tensors = {f"{EMBEDDING}.weight": embedding, f"{HEAD}.weight": head}
    program = lower(write(["embed_tokens", "lm_head"], tensors), served, 64)
    one, other = program.sites[EMBEDDING].tokens, program.sites[HEAD].tokens
    assert one is not None
    assert other is not None
    assert (one.ids.tolist(), other.ids.tolist()) == ([5, 90], [7])
    assert one.rows.equal(embedding[[5, 90]])
    tensors[f"{HEAD}.weight"] = head + 1
    program = lower(write(["embed_tokens", "lm_head"], tensors), served, 64)
    assert program.sites[HEAD].dense is not None  # most rows differ
    assert program.sites[HEAD].tokens is None


def test_a_larger_vocabulary_has_the_rows_behind(write: Any, served: Any) -> None:
    embedding, head = (
        torch.cat([served.model.get_submodule(path).weight.detach(), torch.randn(2, 64)])
        for path in (EMBEDDING, HEAD)
    )
    tensors = {f"{EMBEDDING}.weight": embedding, f"{HEAD}.weight": head}
    for names in (["embed_tokens", "lm_head"], None):  # PEFT adds them also when they are not listed
        program = lower(write(names, tensors), served, 64)
        for path, weight in ((EMBEDDING, embedding), (HEAD, head)):
            rows = program.sites[path].tokens
            assert rows is not None
            assert rows.ids.tolist() == [96, 97]
            assert rows.rows.equal(weight[96:])
    small = dataclasses.replace(served, limits=Limits(added_tokens=1))
    assert "an adapter may add 1 (--max-added-tokens)" in refusal(write(None, tensors), small)
    only_head = write(None, {f"{HEAD}.weight": head})
    assert "an output row and no embedding for token 96" in refusal(only_head, served)


@pytest.mark.parametrize(
    ("names", "tensors", "rule"),
    [
        ("lm_head", {}, "it must be a list of names"),
        ([1], {}, "it must be a list of names"),
        ([""], {}, "it must be a list of names"),
        (["nothing"], {}, "no layer of the base has this name"),
        (["lm_head"], {}, "the file has no 'base_model.model.lm_head.weight'"),
        (["q_norm"], {"model.layers.1.self_attn.q_norm.weight": (16,)}, "not only read by linear layers"),
        (["layers.1.self_attn.o_proj"], {f"{OUT}.weight": (64, 32)}, "has [64, 32], the base needs [64, 64]"),
        (["lm_head"], {f"{HEAD}.weight": (95, 64)}, "has [95, 64], the base needs [96, 64]"),
        (
            ["layers.1.self_attn.o_proj"],
            {f"{OUT}.weight": (64, 64), "model.norm.weight": (64,)},
            "names no module",
        ),
    ],
)
def test_what_is_wrong_is_named(
    names: Any, tensors: dict[str, Any], rule: str, write: Any, served: Any
) -> None:
    folder = write(names, {path: torch.ones(shape) for path, shape in tensors.items()})
    assert rule in refusal(folder, served)


def test_sizes_are_checked_before_a_tensor_is_read(
    write: Any, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "_load", lambda *_: pytest.fail("a tensor was read"))
    small = dataclasses.replace(served, limits=Limits(module_bytes=16383))
    message = refusal(write(["layers.1.self_attn.o_proj"], {f"{OUT}.weight": torch.ones(64, 64)}), small)
    assert f"{OUT}, which the adapter replaces, takes 16384 bytes in full" in message
    assert "The limit is 16383 (--max-module-bytes)" in message


def test_whole_modules_do_not_go_with_an_invocation(write: Any, served: Any) -> None:
    folder = write(
        ["layers.1.self_attn.o_proj"],
        {
            f"{OUT}.weight": torch.ones(64, 64),
            f"{READERS[0]}.lora_A.weight": torch.ones(2, 64),
            f"{READERS[0]}.lora_B.weight": torch.ones(64, 2),
        },
        peft_type="LORA",
        r=2,
        target_modules=["layers.1.self_attn.q_proj"],
        alora_invocation_tokens=[3],
        task_type="CAUSAL_LM",
    )
    assert "with aLoRA it would act before the invocation" in refusal(folder, served)
