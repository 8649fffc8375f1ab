"""What tests of adapters in the engine share: random adapters that PEFT saves, and what is expected of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

PAGE = 2 * 3 * 4 * 2 * 16 * 4  # bytes of `tiny_model`'s: K and V, layers, tokens, heads, head_dim, float32


def digest_of(name: str) -> str:
    """What stands for the digest of the adapter of that name."""
    return f"{sum(map(ord, name)):064x}"


def load(folder: Path) -> Any:
    """The tiny base of a folder, in float32 and for evaluation."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_random(
    folder: Path,
    base: Any,
    config: PeftConfig,
    *,
    seed: int,
    strength: float = 0.2,
    save_embedding_layers: bool | str = False,
) -> None:
    """Let PEFT make an adapter of a loaded base, add normal numbers times `strength` to it, and save it."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += strength * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)


def save_lora(folder: Path, base: Path, rank: int, **fields: Any) -> None:
    """Let PEFT save a LoRA of a base's folder at every linear layer, with B of normal numbers times 0.1."""
    torch.manual_seed(rank)
    config = LoraConfig(**{"r": rank, "lora_alpha": 16, "target_modules": "all-linear", **fields})
    model: Any = get_peft_model(load(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)


def prompt_of(index: int) -> list[int]:
    """One of several prompts, which differ in length and share beginnings."""
    return [3 + index % 4, 9, 27, 81, 5, 25, 3 + index % 2] + [40 + index] * (index % 6)


def likeliest(logprobs: torch.Tensor, tokens: list[int], count: int = 5) -> torch.Tensor:
    """Of log probabilities [tokens, vocabulary] the tokens' own and the `count` largest, as `told` has them."""
    own = logprobs[torch.arange(len(tokens)), torch.tensor(tokens)][:, None]
    return torch.cat([own, logprobs.topk(count).values], 1)


def told(driver: Any, identifier: str) -> torch.Tensor:
    """Log probabilities [tokens, 1 + count] of a request's tokens and of the likeliest ones."""
    found = [item.logprobs[0] for item in driver.outputs[identifier]]
    return torch.tensor([[entry.logprob, *entry.top_logprobs] for entry in found])


def assert_same(driver: Any, ids: list[str], other: Any, other_ids: list[str], atol: float) -> None:
    """Two engines answer with the same tokens, and with log probabilities within `atol` of each other."""
    assert driver.run(*ids) == other.run(*other_ids)
    for ours, theirs in zip(ids, other_ids, strict=True):
        torch.testing.assert_close(told(driver, ours), told(other, theirs), rtol=0, atol=atol)


def assert_graphed_as_eager(
    make: Callable[..., Any], submit_all: Callable[[Any], list[str]], quantization: str, **fields: Any
) -> Any:
    """On a GPU each request's first log probabilities are the same with graphs and without.

    `make`: config fields -> a driver. Returns that with graphs.
    """
    packed = quantization == "nf4"
    fields |= {"device": "cuda", "quantization": quantization, "prefix_caching": False, "max_num_seqs": 16}
    fields |= {"dtype": "bfloat16" if packed else "float32"}
    answers = []
    for eager in (True, False):
        driver = make(enforce_eager=eager, **fields)
        ids = submit_all(driver)
        driver.run(*ids)
        answers.append([told(driver, identifier)[0] for identifier in ids])
    for eager_row, graphed_row in zip(*answers, strict=True):
        torch.testing.assert_close(graphed_row, eager_row, rtol=0, atol=0.25 if packed else 1e-3)
    return driver


class Peft:
    """Teacher-forced log probabilities by PEFT, for a base and the adapters of a store under `digest_of` a name."""

    def __init__(self, base: Path, store: Path) -> None:
        self.base, self.store = base, store
        self.models: dict[str | None, Any] = {None: load(base)}

    def logprobs(self, name: str | None, prompt: list[int], output: list[int]) -> torch.Tensor:
        """Of what follows each token of prompt and output, [tokens, vocabulary]; without an adapter for None."""
        logits = self.forward(name, prompt, output).logits[0]
        return torch.log_softmax(logits[-len(prompt + output) :], -1)

    def forward(self, name: str | None, prompt: list[int], output: list[int], **fields: Any) -> Any:
        """What the model returns."""
        if name not in self.models:
            folder = self.store / "blobs" / digest_of(name or "")
            self.models[name] = PeftModel.from_pretrained(load(self.base), folder).eval()
        with torch.inference_mode():
            inputs = {"input_ids": torch.tensor([prompt + output]), **self.inputs(name, prompt, output)}
            return self.models[name](**inputs, **fields)

    def inputs(self, name: str | None, prompt: list[int], output: list[int]) -> dict[str, Any]:
        """What the forward pass needs besides the tokens."""
        return {}


def check_against_peft(
    driver: Any, peft: Peft, asked: list[tuple[list[int], str | None]], **sampling: Any
) -> None:
    """All at once; tokens and log probabilities are PEFT's."""
    ids = [driver.submit(p, name and digest_of(name), logprobs=3, **sampling) for p, name in asked]
    for identifier, (prompt, name), tokens in zip(ids, asked, driver.run(*ids), strict=True):
        expected = peft.logprobs(name, prompt, tokens)[len(prompt) - 1 : -1]
        assert tokens == expected.argmax(-1).tolist(), (prompt, name)
        top = told(driver, identifier)[:, 1:]
        assert (top - expected.topk(3).values).abs().max() < 1e-4, (prompt, name)
