"""Adapters with rows of their own for tokens, and LoRA on the embedding, beside others through the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model
from tests.engine.adapters import likeliest, load, prompt_of, save_random, told

from veneer.engine.messages import CheckAdapter

OWN = [9, 3, 81, 44]  # in the prompts
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    "tokens": lambda: TrainableTokensConfig(token_indices=OWN),
    "lora and tokens": lambda: LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=OWN[:2]),
    "apart": lambda: LoraConfig(
        r=2, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": OWN, "lm_head": [5, 2, 81]}
    ),
    "embedding": lambda: LoraConfig(r=5, lora_alpha=7, target_modules=["embed_tokens", "lm_head", "o_proj"]),
}


def digest_of(kind: str) -> str:
    return f"{list(KINDS).index(kind) + 1:064x}"


@pytest.fixture(scope="module")
def store_of(make_stores: Callable[..., Callable[[str], Path]]) -> Callable[[str], Path]:
    """A function: architecture -> a store with one random adapter of each kind."""

    def write(base: Path, blobs: Path) -> None:
        tied = load(base).config.tie_word_embeddings
        for seed, (kind, config) in enumerate(KINDS.items()):
            with pytest.warns() if kind == "embedding" and tied else nullcontext():
                save_random(blobs / digest_of(kind), load(base), config(), seed=seed)

    return make_stores(write)


def submit(driver: Any, index: int, kind: str | None) -> str:
    name: str = driver.submit(prompt_of(index), kind and digest_of(kind), logprobs=5, max_tokens=7)
    return name


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma3"])
def test_every_kind_gives_the_log_probabilities_of_peft(
    architecture: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    """In one batch, prompts in chunks; Gemma scales its embeddings and ties them."""
    store, base = store_of(architecture), tiny_model(architecture)
    driver = make_engine(base, store=str(store), max_loras=len(KINDS), max_num_batched_tokens=8)
    assert driver.engine.base.tied == (architecture != "llama")
    kinds = [None, *KINDS]
    ids = [submit(driver, index, kind) for index, kind in enumerate(kinds)]
    for index, (kind, identifier, tokens) in enumerate(zip(kinds, ids, driver.run(*ids), strict=True)):
        model = load(base)
        if kind is not None:
            model = PeftModel.from_pretrained(model, store / "blobs" / digest_of(kind)).eval()
        prompt = prompt_of(index)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1)
        error = (told(driver, identifier) - likeliest(expected, tokens)).abs().max()
        assert error <= 1e-5 * float(logits.abs().max()), kind


def test_others_see_nothing_of_them(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    """The base's answers are the same to the bit with and without neighbours that replace its rows."""
    fields = {"store": str(store_of("llama-tied")), "max_loras": len(KINDS), "prefix_caching": False}
    answers = []
    for neighbours in ([*KINDS], ["lora"] * len(KINDS)):
        driver = make_engine(tiny_model("llama-tied"), **fields)
        for kind in neighbours:  # once they are all loaded, both engines run the same steps
            driver.run(submit(driver, 0, kind))
        ids = [submit(driver, 0, kind) for kind in [None, *neighbours, None]]
        driver.run(*ids)
        answers.append([told(driver, identifier) for identifier in (ids[0], ids[-1])])
    assert all(one.equal(other) for one, other in zip(*answers, strict=True))


def test_a_preempted_sequence_goes_on_as_it_was(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    """Adapters take turns in one slot, with few pages; what the prefix cache keeps is the adapter's own."""
    fields = {"store": str(store_of("llama")), "page_size": 4}
    driver = make_engine(
        tiny_model("llama"), max_loras=1, kv_cache_memory=24 << 10, **fields, slot_patience=0.0
    )
    ids = [submit(driver, 3, kind) for kind in [*KINDS, None, *KINDS]]
    tokens = driver.run(*ids)
    assert driver.engine.scheduler.preemptions
    roomy = make_engine(tiny_model("llama"), max_loras=len(KINDS), **fields)
    assert roomy.run(*(submit(roomy, 3, kind) for kind in [*KINDS, None, *KINDS])) == tokens
    assert len({tuple(each) for each in tokens}) >= len(KINDS)


def test_an_upload_is_tried_on_its_own_tokens(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"))
    folder = store_of("llama") / "blobs" / digest_of("tokens")
    info = driver.call(CheckAdapter("call", str(folder), digest_of("tokens"))).info
    assert info is not None
    assert info.effect
    assert info.primitives == ["token_rows"]
    assert info.bytes == 4 * (4 + 4 * 64)


# ---- tokens beyond the base's vocabulary ------------------------------------------------------------

ADDED = [128, 129, 130]
RESIZED: dict[str, Callable[[], PeftConfig]] = {
    "tied rows": lambda: LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[9, *ADDED]),
    "rows": lambda: TrainableTokensConfig(token_indices=ADDED[:2]),
    "whole": lambda: LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "vocabulary": lambda: LoraConfig(r=2, target_modules=["v_proj"]),
}


def resized(folder: Path, tokens: int) -> Any:
    model = load(folder)
    torch.manual_seed(7)
    model.resize_token_embeddings(128 + tokens, mean_resizing=False)
    for weight in {model.lm_head.weight, model.model.embed_tokens.weight}:
        weight.data[128:] = 0.15 * torch.randn(tokens, 64)
    return model


@pytest.fixture(scope="module")
def grown(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """A function: architecture, kind of RESIZED -> a store with that adapter, and its folder."""

    def make(architecture: str, kind: str) -> tuple[Path, Path]:
        store = tmp_path_factory.mktemp("grown")
        folder = store / "blobs" / f"{99:064x}"
        base = resized(tiny_model(architecture), 2 if kind == "rows" else 3)
        vocabulary = kind == "vocabulary"
        save_random(folder, base, RESIZED[kind](), seed=1, save_embedding_layers=vocabulary)
        return store, folder

    return make


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama-tied", "tied rows"),
        ("gemma3", "tied rows"),
        ("llama-tied", "rows"),
        ("llama", "whole"),
        ("llama", "vocabulary"),
    ],
)
def test_added_tokens_are_read_and_generated_as_in_peft(
    architecture: str,
    kind: str,
    tiny_model: Callable[[str], Path],
    grown: Callable[[str, str], tuple[Path, Path]],
    make_engine: Callable[..., Any],
) -> None:
    store, folder = grown(architecture, kind)
    driver = make_engine(tiny_model(architecture), store=str(store), max_num_batched_tokens=6)
    prompt = [5, 128, 9, 27, 129, 3, 81]
    forced = {128: 1e4, 7: 2e4, 129: 3e4}  # presence_penalty takes each out once it has come
    added = 2 if kind == "rows" else 3
    params: dict[str, Any] = {
        "logprobs": 128 + added,
        "prompt_logprobs": 128 + added,
        "max_tokens": 4,
        "logit_bias": forced,
        "presence_penalty": 5e4,
    }
    one = driver.submit(prompt, f"{99:064x}", **params)
    plain = driver.submit([5, 9, 27], None, logprobs=128, max_tokens=4)
    [tokens, _] = driver.run(one, plain)
    assert tokens[:3] == [129, 7, 128]
    base = resized(tiny_model(architecture), added)
    if kind == "vocabulary":  # PEFT puts its own into the base
        for weight in {base.lm_head.weight, base.model.embed_tokens.weight}:
            weight.data[128:] = 0
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, :-1]
    expected, bound = torch.log_softmax(logits, -1), 1e-5 * float(logits.abs().max())
    told_of = [entry for item in driver.outputs[one] for entry in (*item.prompt_logprobs, *item.logprobs)]
    for row, entry, token in zip(expected, told_of, (prompt + tokens)[1:], strict=True):
        assert len(entry.top_ids) == len(row)
        found = torch.empty(len(row))
        found[entry.top_ids] = torch.tensor(entry.top_logprobs)
        assert torch.allclose(found, row, rtol=0, atol=bound)  # both -inf without an output row
        assert entry.logprob == found[token]
    for item in driver.outputs[plain]:  # the base has its own vocabulary
        assert sorted(item.logprobs[0].top_ids) == list(range(128))


def test_neighbours_of_added_tokens_change_by_no_bit(
    tiny_model: Callable[[str], Path],
    grown: Callable[[str, str], tuple[Path, Path]],
    make_engine: Callable[..., Any],
) -> None:
    """Sampled, penalized and with log probabilities; beside a neighbour with wider logits or none."""
    store, _ = grown("llama-tied", "tied rows")
    narrow = store / "blobs" / f"{98:064x}"
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[9, 10, 11, 12])
    get_peft_model(load(tiny_model("llama-tied")), config).save_pretrained(
        narrow, save_embedding_layers=False
    )
    answers = []
    for digest in (f"{99:064x}", f"{98:064x}"):
        driver = make_engine(tiny_model("llama-tied"), store=str(store), prefix_caching=False)
        driver.generate([9, 3], digest)
        fields: list[dict[str, Any]] = [
            {"logprobs": 20},
            {"temperature": 0.9, "top_p": 0.9, "seed": 5, "logprobs": 3},
            {"repetition_penalty": 1.3, "logit_bias": {4: 2.0}, "logprobs": 128},
        ]
        ids = [driver.submit([5, 9, 27, 81], None, **each) for each in fields]
        ids.append(driver.submit([9, 3, 10, 12], digest, temperature=1.0, seed=3, logprobs=5))
        driver.run(*ids)
        answers.append([[item.logprobs for item in driver.outputs[name]] for name in ids[:3]])
    assert answers[0] == answers[1]


def test_tokens_without_an_output_row_are_read_alone(
    tiny_model: Callable[[str], Path],
    grown: Callable[[str, str], tuple[Path, Path]],
    make_engine: Callable[..., Any],
) -> None:
    store, folder = grown("llama", "rows")
    driver = make_engine(tiny_model("llama"), store=str(store))
    info = driver.call(CheckAdapter("call", str(folder), f"{99:064x}")).info
    assert info is not None
    assert info.added_tokens == 2
    assert info.effect
    assert "never generated" in info.warnings[0]
    identifier = driver.submit([5, 128, 129], f"{99:064x}", logprobs=128, max_tokens=2)
    driver.run(identifier)
    assert sorted(driver.outputs[identifier][0].logprobs[0].top_ids) == list(range(128))
    for change in (
        {"logit_bias": {129: 100.0}},
        {"repetition_penalty": 2.0},
        {"temperature": 2.0, "seed": 3},
    ):
        tokens = driver.generate([5, 128, 129, 129], f"{99:064x}", max_tokens=6, **change)
        assert max(tokens) < 128
