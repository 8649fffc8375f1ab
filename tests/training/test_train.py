"""The training run end to end on a tiny base: it learns, its files load in PEFT, and its seed reproduces it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.errors import Conflict, InvalidRequest, NotFound
from veneer.training.train import main

QUESTIONS = {"a": "1", "b": "22", "c": "3", "d": "44"}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_recipe(folder: Path, base: Path | str, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": question, "completion": answer} for question, answer in QUESTIONS.items()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "base": str(base),
        "data": "rows.jsonl",
        "output": "out",
        "steps": 6,
        "batch_size": 4,
        "device": "cpu",
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "evaluation": {"max_new_tokens": 4},
        **fields,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in recipe.items() if value is not None}))
    return path


def read_losses(folder: Path) -> list[float]:
    with (folder / "loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Forty steps on two questions, with two others held out by name."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, tiny_base, steps=40, learning_rate=0.01, test_fraction=0.5, seed=1)
    return main(recipe)


def test_the_loss_goes_down_and_is_written(trained: Path) -> None:
    losses = read_losses(trained)
    assert len(losses) == 40
    assert losses[-1] < 0.3 * losses[0]
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_what_was_done(trained: Path) -> None:
    text = (trained / "report.json").read_text()
    report = json.loads(text)
    assert report["base"] == "tiny-base"
    assert str(trained.parent) not in text
    assert report["data"]["rows"] == 2
    assert report["before"]["rows"] == report["after"]["rows"] == 2
    answers = report["evaluation"]["answers"]
    assert len(answers) == 2
    assert (trained / "evaluation.html").read_text().startswith("<!DOCTYPE html>")
    assert report["training"]["steps"] == 40
    assert report["recipe"]["seed"] == 1
    assert {"torch", "transformers", "peft", "veneer"} <= set(report["versions"])


def test_the_files_load_in_peft_and_the_answers_are_learnt(trained: Path, tiny_base: Path) -> None:
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-base"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert sorted(path.name for path in trained.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "data.png",
        "evaluation.html",
        "loss.csv",
        "loss.png",
        "report.json",
    ]
    assert {path.stat().st_mode & 0o777 for path in trained.iterdir()} == {0o644}
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    answers = {}
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, max_new_tokens=4, do_sample=False)
        answers[question] = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [question for question, answer in QUESTIONS.items() if answers[question] == answer]
    assert len(right) >= 2  # those that were trained on


def test_one_seed_gives_one_adapter_and_another_a_different_one(tmp_path: Path, tiny_base: Path) -> None:
    made = [
        main(write_recipe(tmp_path / name, tiny_base, seed=seed))
        for name, seed in [("a", 5), ("b", 5), ("c", 6)]
    ]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in made]
    configs = [(folder / "adapter_config.json").read_bytes() for folder in made]
    assert weights[0] == weights[1]
    assert configs[0] == configs[1]
    assert weights[0] != weights[2]


def test_the_loss_is_on_the_answer_alone(tmp_path: Path, tiny_base: Path) -> None:
    """The first loss equals the mean cross-entropy over the answers' tokens, computed by hand."""
    folder = main(write_recipe(tmp_path, tiny_base, steps=1, batch_size=4, adapter={"rank": 2}))
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    losses = []
    for question, answer in QUESTIONS.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        wanted = [*tokenizer(answer)["input_ids"], 2]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + wanted])).logits[0, len(prompt) - 1 : -1]
        losses += (-logits.log_softmax(-1)[range(len(wanted)), wanted]).tolist()
    assert read_losses(folder)[0] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_epochs_count_whole_passes_and_the_learning_rate_warms_up(tmp_path: Path, tiny_base: Path) -> None:
    fields = {"steps": None, "epochs": 2, "batch_size": 3, "warmup_steps": 2, "schedule": "constant"}
    folder = main(write_recipe(tmp_path, tiny_base, **fields))
    with (folder / "loss.csv").open() as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates == [0.0, 5e-4, 1e-3, 1e-3]


def test_targets_rslora_and_storage_are_as_the_recipe_says(tmp_path: Path, tiny_base: Path) -> None:
    adapter = {"kind": "rslora", "rank": 3, "alpha": 6, "targets": ["q_proj", "down_proj"]}
    folder = main(write_recipe(tmp_path, tiny_base, adapter=adapter, save_dtype="bfloat16", steps=1))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6, True)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 2 * 2 * 2  # layers, targets, factors


def test_an_adapter_is_not_written_over_unless_asked(tmp_path: Path, tiny_base: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, steps=1)
    folder = main(recipe)
    first = (folder / "adapter_model.safetensors").read_bytes()
    write_recipe(tmp_path, tiny_base, steps=2)
    with pytest.raises(Conflict, match="already holds an adapter"):
        main(recipe)
    assert (folder / "adapter_model.safetensors").read_bytes() == first
    main(recipe, overwrite=True)
    assert (folder / "adapter_model.safetensors").read_bytes() != first


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": {"targets": ["no_such_proj"]}}, r"adapter.targets \['no_such_proj'\]"),
        ({"max_length": 10}, "4 rows are longer than max_length 10, first rows.jsonl:1"),
        ({"test_data": "rows.jsonl"}, "rows.jsonl:1 asks the same as rows.jsonl:1"),
        ({"learning_rate": 0.99, "max_grad_norm": 1e30, "steps": 60, "weight_decay": 1e8}, "the loss is"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(
    tmp_path: Path, tiny_base: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        main(write_recipe(tmp_path, tiny_base, **fields))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "rows.jsonl"]


def test_a_base_beside_the_recipe_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=str(tmp_path / "none")):
        main(write_recipe(tmp_path, "./none"))


def test_a_template_of_its_own_is_trained_with_and_kept(tmp_path: Path, tiny_base: Path) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    (tmp_path / "own.jinja").write_text(template)
    folder = main(write_recipe(tmp_path, tiny_base, steps=1, chat_template="own.jinja", batch_size=4))
    assert (folder / "chat_template.jinja").read_text() == template
    plain = main(write_recipe(tmp_path / "plain", tiny_base, steps=1, batch_size=4))
    losses = [
        json.loads((each / "report.json").read_text())["training"]["first_loss"] for each in (folder, plain)
    ]
    assert losses[0] != losses[1]
    with pytest.raises(InvalidRequest, match=r"chat_template .*none\.jinja"):
        main(write_recipe(tmp_path / "none", tiny_base, steps=1, chat_template="none.jinja"))


def test_training_on_an_nf4_base(tmp_path: Path, tiny_base: Path) -> None:
    folder = main(
        write_recipe(
            tmp_path, tiny_base, quantization="nf4", steps=12, learning_rate=0.01, adapter={"rank": 4}
        )
    )
    losses = read_losses(folder)
    assert losses[-1] < losses[0]
    report = json.loads((folder / "report.json").read_text())
    assert report["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert report["recipe"]["quantization"] == "nf4"


@pytest.mark.gpu
def test_a_seed_gives_one_adapter_on_cuda_too(tmp_path: Path, tiny_base: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = [main(write_recipe(tmp_path / name, tiny_base, device="cuda", steps=30)) for name in "ab"]
    first, second = ((folder / "adapter_model.safetensors").read_bytes() for folder in made)
    assert first == second
    losses = read_losses(made[0])
    assert losses[-1] < losses[0]
    assert json.loads((made[0] / "report.json").read_text())["dtype"] == "bfloat16"
