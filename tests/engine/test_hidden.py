"""Activations and hidden states through the engine, in one batch with LoRA, IA3 and the base.

The adapters are of a kind that only these tests have: random parts at the sites that its config names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import save_file
from tests.engine.adapters import (
    assert_graphed_as_eager,
    assert_same,
    likeliest,
    load,
    prompt_of,
    save_random,
    told,
)
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import Activation, Program, SiteProgram
from veneer.adapters.registry import METHODS
from veneer.engine.fused import FusedLayer
from veneer.engine.graphs import Variant
from veneer.engine.hidden import INPUTS
from veneer.engine.layers import StepContext
from veneer.kernels.low_rank import make_tiles
from veneer.kernels.tables import Segment

ARROW = Activation("arrow", group=3, count=4, top_k=2)
FUSION = Activation("fusion", group=4, count=3, inner="silu")
HEADS = Activation("softmax", group=5)
# A kind: the ends of the names of its sites, each with the activation and the rank there.
KINDS: dict[str, dict[str, tuple[Activation | None, int]]] = {
    "heads": {"1.self_attn.heads": (HEADS, 20), "2.self_attn.heads": (HEADS, 15)},
    "after attention": {f"self_attn.{kind}": (Activation("relu"), 6) for kind in INPUTS},
    "after the MLP": {f"mlp.{kind}": (Activation("gelu"), 9) for kind in INPUTS},
    "after a layer": {"0.output": (None, 4), "2.output": (Activation("tanh"), 3)},
    "routed": {"q_proj": (ARROW, 16), "down_proj": (ARROW, 16), "lm_head": (Activation("sigmoid"), 5)},
    "fused": {"1.mlp.sum": (FUSION, 27), "v_proj": (None, 2)},
}
KIND = "TEST_HIDDEN"


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """The random parts of a kind."""
    kind = str(checkpoint.config["name"])
    random = torch.Generator().manual_seed(len(kind))  # loaders of two engines may run at once
    sites = {}
    for name, site in {**base.sites, **base.hidden_sites}.items():
        for end, (activation, rank) in KINDS[kind].items():
            if name.endswith(f".{end}") or name == end:
                a = torch.randn(rank, site.in_features, generator=random) / site.in_features**0.5
                b = torch.randn(rank, site.out_features, generator=random) * 0.3
                d = torch.randn(rank, generator=random) * 0.3 if activation else None
                sites[name] = SiteProgram(a=a, b=b, inner_bias=d, activation=activation)
    return Program(kind="test", sites=sites)


@pytest.fixture(autouse=True)
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, KIND, lower)


def digest_of(kind: str) -> str:
    return f"{[*KINDS, 'lora', 'ia3'].index(kind) + 1:064x}"


ALL = [*KINDS, "lora", "ia3"]


@pytest.fixture(scope="module")
def store_of(make_stores: Callable[..., Callable[[str], Path]]) -> Callable[[str], Path]:
    """A function: architecture -> a store with an adapter of each kind."""

    def write(base: Path, blobs: Path) -> None:
        for kind in KINDS:
            folder = blobs / digest_of(kind)
            folder.mkdir(parents=True)
            (folder / CONFIG_FILE).write_bytes(msgspec.json.encode({"peft_type": KIND, "name": kind}))
            save_file({"unread": torch.zeros(1)}, folder / WEIGHTS_FILE)
        ia3 = IA3Config(target_modules=["o_proj", "down_proj"], feedforward_modules=["down_proj"])
        for kind, config in (("lora", LoraConfig(r=5, target_modules=["o_proj"])), ("ia3", ia3)):
            save_random(blobs / digest_of(kind), load(base), config, seed=7)

    return make_stores(write)


def submit(driver: Any, index: int, kind: str | None) -> str:
    name: str = driver.submit(prompt_of(index), kind and digest_of(kind), logprobs=5, max_tokens=6)
    return name


# ---- against a forward pass that is written out -----------------------------------------------------


class Reference:
    """Llama's forward with a program's parts, for one sequence without a cache."""

    def __init__(self, model: Any, program: Program) -> None:
        self.model, self.sites = model.eval(), program.sites

    def part(self, name: str, x: torch.Tensor) -> torch.Tensor | float:
        if (site := self.sites.get(name)) is None:
            return 0.0
        assert site.a is not None
        assert site.b is not None
        h = x @ site.a.T + (0 if site.inner_bias is None else site.inner_bias)
        return phi(h, site.activation) @ site.b

    def linear(self, module: Any, name: str, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module(x) + self.part(name, x)
        return found

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> torch.Tensor:
        """Log probabilities [tokens, vocabulary]."""
        body = self.model.model
        x = body.embed_tokens(torch.tensor([ids]))
        angles = body.rotary_emb(x, torch.arange(len(ids))[None])
        for index, layer in enumerate(body.layers):
            name = f"model.layers.{index}"
            given = self.attention(layer.self_attn, f"{name}.self_attn", layer.input_layernorm(x), angles)
            x = x + self.sublayer(f"{name}.self_attn", given, x)
            inner = layer.post_attention_layernorm(x)
            gate, up = (self.linear(getattr(layer.mlp, part), f"{name}.mlp.{part}", inner)
                        for part in ("gate_proj", "up_proj"))  # fmt: skip
            given = self.linear(layer.mlp.down_proj, f"{name}.mlp.down_proj", functional.silu(gate) * up)
            x = x + self.sublayer(f"{name}.mlp", given, x)
            x = x + self.part(f"{name}.output", x)
        return torch.log_softmax(self.linear(self.model.lm_head, "lm_head", body.norm(x))[0], -1)

    def sublayer(self, name: str, given: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        inputs = (given, given + residual, residual)
        return given + sum(self.part(f"{name}.{kind}", z) for kind, z in zip(INPUTS, inputs, strict=True))

    def attention(self, module: Any, name: str, x: torch.Tensor, angles: Any) -> torch.Tensor:
        q, k, v = (
            self.linear(getattr(module, part), f"{name}.{part}", x)
            .view(1, x.shape[1], -1, module.head_dim)
            .transpose(1, 2)
            for part in ("q_proj", "k_proj", "v_proj")
        )
        q, k = apply_rotary_pos_emb(q, k, *angles)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        heads, q = (z.transpose(1, 2).flatten(2) for z in (heads, q))
        return self.linear(module.o_proj, f"{name}.o_proj", heads + self.part(f"{name}.heads", q))


def phi(h: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    if activation is None:
        return h
    count, group = activation.count, activation.group
    match activation.kind:
        case "softmax":
            return torch.cat([part.softmax(-1) for part in torch.split(h, group, -1)], -1)
        case "arrow":
            score = h[..., :count].abs()
            lowest = score.topk(activation.top_k).values[..., -1:]
            gates = score.masked_fill(score < lowest, -torch.inf).softmax(-1)
            return torch.cat([0 * gates, h[..., count:] * gates.repeat_interleave(group, -1)], -1)
        case "fusion":
            start, bottlenecks, keys = torch.split(h, [count, count * group, count * group], -1)
            made = functional.silu(bottlenecks)
            gates = (start + (made * keys).view(*h.shape[:-1], count, group).sum(-1)).softmax(-1)
            return torch.cat([gates, made * gates.repeat_interleave(group, -1), 0 * keys], -1)
        case "relu" | "tanh" | "sigmoid" as kind:
            found: torch.Tensor = getattr(torch, kind)(h)
            return found
    return functional.gelu(h)


def check_answers(driver: Any, folder: Path, asked: list[tuple[int, str]], ids: list[str]) -> None:
    """Log probabilities of what the engine generated, against `Reference`."""
    for (index, kind), identifier in zip(asked, ids, strict=True):
        tokens = driver.tokens(identifier)
        program = lower(Named(kind), driver.engine.base, 512)  # type: ignore[arg-type]
        expected = Reference(load(folder), program)(prompt_of(index) + tokens)[len(prompt_of(index)) - 1 : -1]
        torch.testing.assert_close(told(driver, identifier), likeliest(expected, tokens), rtol=0, atol=1e-4)


class Named:
    def __init__(self, kind: str) -> None:
        self.config = {"name": kind}


def test_each_kind_gives_what_its_formula_says(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    """Prompts in chunks of 4 beside decoding rows; the second time their pages come from the prefix cache."""
    folder = tiny_model("llama")
    driver = make_engine(
        folder, store=str(store_of("llama")), max_loras=len(KINDS), max_num_batched_tokens=8, max_num_seqs=4
    )
    asked = [(index, kind) for index, kind in enumerate(KINDS)]
    for _ in range(2):
        ids = [submit(driver, *each) for each in asked]
        driver.run(*ids)
        check_answers(driver, folder, asked, ids)
    assert driver.engine.pool.hit_tokens


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [("llama", "nf4"), ("mistral", "none"), ("qwen2", "none"), ("qwen3", "none"), ("phi3", "none")],
)
def test_a_mixed_batch_equals_each_alone(
    architecture: str,
    quantization: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    fields = {"store": str(store_of(architecture)), "quantization": quantization, "prefix_caching": False}
    choices = [None, *ALL]
    driver = make_engine(tiny_model(architecture), max_loras=len(ALL), max_num_batched_tokens=16, **fields)
    together = [submit(driver, index, kind) for index, kind in enumerate(choices)]
    tokens = driver.run(*together)
    alone = make_engine(tiny_model(architecture), max_loras=2, **fields)  # adapters take turns in two slots
    for index, kind in enumerate(choices):
        assert_same(driver, [together[index]], alone, [submit(alone, index, kind)], 5e-5)
    assert len({tuple(each) for each in tokens}) > len(choices) // 2


def test_a_preempted_sequence_goes_on_as_it_would_have(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    fields = {"store": str(store_of("llama")), "max_loras": len(KINDS), "prefix_caching": False}
    roomy = make_engine(tiny_model("llama"), **fields)
    page = 2 * 3 * 4 * 2 * 16 * 4  # bytes: two sides of three layers of four tokens of two heads
    tight = make_engine(tiny_model("llama"), kv_cache_memory=12 * page, max_model_len=32, **fields)
    for index, kind in enumerate(KINDS):  # every adapter is there, so that all sequences begin together
        tight.run(submit(tight, index, kind))
    ids = [[submit(driver, index, kind) for index, kind in enumerate(KINDS)] for driver in (roomy, tight)]
    assert tight.run(*ids[1]) == roomy.run(*ids[0])
    assert tight.engine.scheduler.preemptions


def test_only_steps_with_such_an_adapter_have_hooks(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(store_of("llama")), max_loras=1)
    base = driver.engine.base
    seen: list[int] = []
    forward = base.model.model.forward

    def counting(*args: Any, **inputs: Any) -> Any:
        seen.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.model.modules()))
        return forward(*args, **inputs)

    base.model.model.forward = counting
    for kind, expected in (
        (None, False),
        ("after a layer", True),
        ("lora", False),
        ("routed", True),
        (None, False),
    ):
        driver.run(submit(driver, 0, kind))  # in the one slot after each other
        assert base.context.rows.hidden == base.context.head_rows.hidden == expected
        assert seen.pop() == 5 * base.num_layers * expected
        assert not any(module._forward_hooks for module in base.model.modules())
    [sites] = base.context.tables.hidden.values()
    names = [*base.sites, *base.hidden_sites]
    assert {names[site].rpartition(".")[2] for site in sites} == {"q_proj", "down_proj", "lm_head"}


def test_other_layers_have_no_hidden_sites(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    base = make_engine(tiny_model("gemma3")).engine.base
    assert not base.hidden_sites
    assert not base.context.heads_sites


@torch.inference_mode()
def test_fused_layers_leave_such_steps_to_the_plain_ones() -> None:
    layer: Any = FusedLayer.__new__(FusedLayer)
    torch.nn.Module.__init__(layer)
    rows = make_tiles([Segment(0, 0, 2)], 2, 1, torch.device("cpu"), hidden=True)
    layer.step = StepContext(rows=rows)
    layer.plain = torch.nn.Linear(4, 4)
    x = torch.randn(1, 2, 4)
    assert torch.equal(layer(x), layer.plain(x))


# ---- graphs -----------------------------------------------------------------------------------------


def test_decode_graphs_have_a_variant_for_it(
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
    replay_graphs: Callable[[Any], list[Any]],
) -> None:
    fields = {"store": str(store_of("llama")), "max_loras": len(ALL), "prefix_caching": False}
    plain, driver = (make_engine(tiny_model("llama"), **fields) for _ in range(2))
    made = replay_graphs(driver.engine)
    for choices in ([None, "lora"], [None, "ia3"], [None, *ALL], ["routed"]):
        ids = [[submit(d, index, kind) for index, kind in enumerate(choices)] for d in (plain, driver)]
        assert_same(driver, ids[1], plain, ids[0], 5e-5)
    used = Counter(each.variant for each in made if each.replays)
    # rows of the base may run alone while adapters are loaded
    assert used.keys() - {Variant.BASE} == {Variant.ADAPTED, Variant.TURNED, Variant.HIDDEN}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_graphed_equals_eager_on_a_gpu(
    quantization: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    """The captured variant, Triton's activations and, with NF4, layers that are fused in other steps."""
    fields = {"store": str(store_of("llama")), "max_loras": len(ALL)}
    graphed = assert_graphed_as_eager(
        partial(make_engine, tiny_model("llama"), **fields),
        lambda driver: [submit(driver, index, kind) for index, kind in enumerate([None, *ALL])],
        quantization,
        cuda_graphs="all",
    )
    assert graphed.engine.runner.graphs.replays
