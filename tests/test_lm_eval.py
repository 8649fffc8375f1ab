"""lm-evaluation-harness, unmodified, against a real server: each of its kinds of request, for base and adapter.

What it finds over HTTP is compared with what it finds itself with transformers and PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import LiveServer

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval[api] is not installed"),
    pytest.mark.filterwarnings("ignore"),  # those of a library that is not ours
]

EXAMPLES = Path(__file__).parent.parent / "examples"
BASE = "SmolLM2-135M-Instruct"
ROWS = 4
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{choices[0]}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n", "\t", "###", "Q:", "User:"], "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def server(live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    options = ["--store", str(tmp_path_factory.mktemp("store")), "--quantization", "none", "--threads", "1"]
    modules = ["--lora-modules", f"negate={EXAMPLES / 'negate'}"]
    return live_server(*options, "--kv-cache-memory", "256MiB", *modules)


@pytest.fixture(scope="module")
def tasks(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tasks of held-out sentences for `negate`; a wrong choice is the sentence as it was, or one more word."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    lines = (EXAMPLES / "data" / "negate.test.jsonl").read_text().splitlines()[:ROWS]
    documents = []
    for row in map(json.loads, lines):
        message = {"role": "user", "content": row["prompt"]}
        ids = server.http.post("/tokenize", json={"messages": [message]}).json()["tokens"]
        prompt = server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        right = row["completion"]
        documents.append({"prompt": prompt, "choices": [right, row["prompt"], f"{right} Indeed."]})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    arguments = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": arguments}
        config = {"task": name, "test_split": "test", **source, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def evaluate(tasks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A function: lm-eval's model and its arguments -> what it returns for all tasks."""
    import lm_eval

    def run(kind: str, batch_size: int, **arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=list(TASKS),
            task_manager=tasks,
            batch_size=batch_size,
            bootstrap_iters=0,
            log_samples=True,
        )
        return found

    return run


@pytest.fixture(scope="module")
def reference(evaluate: Callable[..., dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What lm-eval finds without a server, by model."""
    from veneer.engine.source import resolve

    fields = {"pretrained": str(resolve(None)), "dtype": "float32", "device": "cpu"}
    adapters: dict[str, dict[str, str]] = {BASE: {}, "negate": {"peft": str(EXAMPLES / "negate")}}
    return {name: evaluate("hf", 1, **fields, **adapter) for name, adapter in adapters.items()}


def responses(found: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(found["samples"][task], key=lambda sample: int(sample["doc_id"]))
    return [sample["filtered_resps"] for sample in samples]


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_backend": "remote", "batch_size": 1},
        {"tokenizer_backend": "huggingface", "batch_size": 4},
        {"tokenizer_backend": "huggingface", "tokenized_requests": False, "batch_size": 3},
        {"tokenizer_backend": "auto", "num_concurrent": 4, "batch_size": 2},
    ],
    ids=str,
)
def test_it_finds_what_it_finds_without_a_server(
    fields: dict[str, Any],
    server: LiveServer,
    evaluate: Callable[..., dict[str, Any]],
    reference: dict[str, dict[str, Any]],
) -> None:
    from veneer.engine.source import resolve

    if fields["tokenizer_backend"] == "huggingface":
        fields = fields | {"tokenizer": str(resolve(None))}
    for model, expected in reference.items():
        url = f"{server.url}/v1/completions"
        found = evaluate("local-completions", model=model, base_url=url, max_length=2048, **fields)
        for ours, theirs in zip(responses(found, "choose"), responses(expected, "choose"), strict=True):
            assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
            assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-2)
        assert responses(found, "answer") == responses(expected, "answer")
        rolled = [score for (score,) in responses(found, "read")]
        assert rolled == pytest.approx([score for (score,) in responses(expected, "read")], abs=1e-2)
        assert found["results"]["choose"]["acc,none"] == expected["results"]["choose"]["acc,none"]
    chosen = {model: each["results"]["choose"]["acc,none"] for model, each in reference.items()}
    answered = {model: each["results"]["answer"]["exact_match,none"] for model, each in reference.items()}
    assert chosen["negate"] > chosen[BASE]
    assert answered == {BASE: 0.0, "negate": 1.0}
