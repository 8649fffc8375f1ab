"""`veneer eval …` on a real server; its toy engine repeats the prompt, with adapters from the second token on."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from tests.conftest import ROOT
from tests.server.conftest import BASE, MakeServer, Server
from tokenizers import Tokenizer

from veneer.errors import VeneerError
from veneer.server import eval_client
from veneer.server.cli import build_parser, main
from veneer.server.eval_client import ServerModels
from veneer.server.state import ServerConfig
from veneer.training.data.formats import Message
from veneer.training.evaluation.error_analysis import CATEGORIES
from veneer.training.evaluation.evaluate import Generation
from veneer.training.evaluation.metrics import Metric
from veneer.training.evaluation.rows import read_evaluation_rows

REPEATED = [{"prompt": text, "completion": text} for text in ("the quick fox", "one two three", "lazy dog.")]
CHOICES = [{"prompt": "one two", "choices": ["three four five", "six"], "answer": 1}]
PROMPT = (Message("user", "the quick"),)


class Cli:
    """Runs the command with a file of rows; `out` and `err` are the last run's."""

    def __init__(self, url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.url, self.folder, self._capsys = url, folder, capsys
        self.out = self.err = ""

    def __call__(self, rows: list[Any], *arguments: str) -> int:
        data = self.folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = main(["eval", "--data", str(data), "--url", self.url, *arguments])
        self.out, self.err = self._capsys.readouterr()
        return status

    def json(self, rows: list[Any], *arguments: str) -> Any:
        assert self(rows, *arguments, "--json") == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def cli(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(server.url, tmp_path, capsys)


@pytest.fixture(scope="module")
def tokens(model_folder: Path) -> Callable[[str], int]:
    """How many tokens a text has."""
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text).ids)


def likelihood(start: int, end: int) -> float:
    """What the toy engine gives the tokens from one place of a prompt to another."""
    return sum(-0.25 * place for place in range(start, end))


def chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


# ---- the command ---------------------------------------------------------------------------------


def test_tables_show_models_side_by_side(cli: Cli) -> None:
    assert (
        cli(REPEATED, "--model", "base", "--model", "sql@1", "--model", "team/poet", "--template", "none")
        == 0
    )
    lines = [line.split() for line in cli.out.splitlines()]
    assert lines[0] == ["3", "rows", "base", "sql@1", "team/poet"]
    assert lines[1][:3] == ["exact_match", "100.0", "%"]
    assert [line[0] for line in lines[1:4]] == ["exact_match", "normalized_match", "token_f1"]
    errors = lines[lines.index(["errors", "base", "sql@1", "team/poet"]) + 1 :]
    wrong = [[int(count) for count in line[1:]] for line in errors[: errors.index([])]]
    assert [sum(counts) for counts in zip(*wrong, strict=True)] == [0, 3, 3]
    pairs = [line[:3] for line in lines if line[1:2] == ["−"]]
    assert pairs[::3] == [["sql@1", "−", "base"], ["team/poet", "−", "sql@1"], ["team/poet", "−", "base"]]
    assert "-100.0 %" in cli.out
    assert "may be chance" in cli.out  # three rows prove nothing
    assert "evaluating: 100%" in cli.err
    assert "9/9" in cli.err


def test_requests_are_greedy_and_bounded(cli: Cli, server: Server) -> None:
    cli.json(REPEATED, "--model", BASE, "--model", "sql", "--max-new-tokens", "7", "--rows", "2")
    asked = server.received("Generate")
    assert len(asked) == 4
    assert {(each["sampling"]["temperature"], each["sampling"]["max_tokens"]) for each in asked} == {(0, 7)}
    assert len({str(each["prompt"]) for each in asked}) == 2  # each row to both models
    assert len({each["adapter"] for each in asked}) == 2


def test_chat_answers_come_through_the_template(cli: Cli) -> None:
    (row,) = REPEATED[:1]
    answer = cli.json([row], "--model", "base")["answers"][0]["models"]["base"]
    assert answer["text"] == "user\nthe quick fox\nassistant\n"  # the whole prompt, which it repeats
    assert (answer["error"], answer["scores"]["exact_match"]) == ("too_long", 0)
    assert cli.json([row], "--model", "base", "--max-new-tokens", "2")["models"][0]["errors"] == {
        "cut_off": 1
    }


@pytest.mark.parametrize("template", ["chat", "none"])
def test_perplexity_is_that_of_the_answers_tokens(
    cli: Cli, tokens: Callable[[str], int], template: str
) -> None:
    found = cli.json(REPEATED, "--model", "base", "--template", template, "--metric", "perplexity")
    prompts = [chat(row["prompt"]) if template == "chat" else row["prompt"] for row in REPEATED]
    spans = [
        (tokens(prompt), tokens(prompt + row["completion"]))
        for prompt, row in zip(prompts, REPEATED, strict=True)
    ]
    mean = sum(likelihood(*span) for span in spans) / sum(end - start for start, end in spans)
    assert found["models"][0]["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(-mean))
    assert found["answers"][0]["models"]["base"]["text"] is None


def test_plain_texts_are_scored_from_their_second_token(cli: Cli, tokens: Callable[[str], int]) -> None:
    text = "one two three four"
    found = cli.json([{"text": text}], "--model", "base")
    mean = likelihood(1, tokens(text)) / (tokens(text) - 1)
    assert found["models"][0]["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(-mean))


def test_choices_are_compared_by_likelihood(cli: Cli) -> None:
    found = cli.json(CHOICES, "--model", "base", "--model", "sql")
    assert [each["metrics"]["accuracy"]["value"] for each in found["models"]] == [1, 1]  # the shorter one
    assert found["answers"][0]["models"]["base"]["text"] == "six"
    assert cli.json([CHOICES[0] | {"answer": 0}], "--model", "sql")["models"][0]["errors"] == {"choice": 1}


def test_the_report_is_written_beside_the_tables(cli: Cli, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    models = ["--model", "base", "--model", "sql"]
    assert cli(REPEATED, *models, "--template", "none", "--output", str(report)) == 0
    assert "<h1>Evaluation of sql</h1>" in report.read_text()
    assert cli.out.startswith("3 rows")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--at-least", "0.9"], 0, "gate passed: exact_match of base is 100.0 %, at least 90.0 %"),
        (["--metric", "token_f1", "--at-least", "1"], 0, "gate passed: token_f1"),
        (["--model", "sql", "--at-least", "0.1"], 3, "gate not passed: exact_match of sql is 0.0 %"),
        (["--model", "sql", "--no-worse-than", "base"], 3, "worse than that of base"),
        (
            ["--model", "sql", "--model", "team/poet", "--no-worse-than", "previous"],
            0,
            "equal to that of sql",
        ),
    ],
)
def test_the_gates_exit_status(cli: Cli, arguments: list[str], status: int, says: str) -> None:
    assert cli(REPEATED, "--model", "base", "--template", "none", *arguments) == status
    assert says in cli.out
    assert cli(REPEATED, "--model", "base", "--template", "none", *arguments, "--json") == status
    assert json.loads(cli.out)["gate"]["passed"] is (status == 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nobody"], " to nobody: the model 'nobody' does not exist"),
        (["--model", "sql", "--model", "sql"], "each model once"),
        (["--model", "sql", "--metric", "accuracy"], "no metric 'accuracy'"),
        (["--model", "sql", "--no-worse-than", "base"], "give two or more"),
        (["--model", "sql", "--at-least", "90"], "from 0 to 1 (got 90.0)"),
        (["--model", "sql", "--at-least", "nan"], "--at-least: Input should be a finite number"),
        (["--model", "sql", "--output", "{folder}/none/report.html"], "its folder does not exist"),
        (["--model", "sql", "--data", "{folder}/none.jsonl"], "none.jsonl"),
        (["--model", "sql", "--url", "http://127.0.0.1:1"], "No answer from http://127.0.0.1:1"),
    ],
)
def test_faults_are_named(cli: Cli, arguments: list[str], says: str) -> None:
    assert cli(REPEATED, *(argument.format(folder=cli.folder) for argument in arguments)) == 1
    assert "veneer: " in cli.err
    assert says in cli.err
    assert cli.out == ""


def test_a_prompt_that_is_too_long_is_named(cli: Cli) -> None:
    assert cli([*REPEATED, {"prompt": "the " * 300, "completion": "x"}], "--model", "base") == 1
    assert "rows.jsonl:4 to base: " in cli.err


def test_the_key_comes_from_flag_or_environment(
    make_server: MakeServer, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.url = make_server(config=ServerConfig(api_keys=("plain",))).until_ready().url
    assert cli(REPEATED, "--model", "base") == 1
    assert "API key" in cli.err
    assert cli(REPEATED, "--model", "base", "--api-key", "plain") == 0
    monkeypatch.setenv("VENEER_API_KEY", "plain")
    assert cli(REPEATED, "--model", "base") == 0


# ---- what the documentation says -----------------------------------------------------------------


def test_documented_commands_and_rows_are_taken(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("veneer eval ")]
    assert len(commands) >= 3
    for command in commands:
        assert build_parser().parse_args(shlex.split(command)[1:]).data == Path(
            "examples/data/negate.test.jsonl"
        )
    rows = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(rows) == 2
    for row in rows:
        (tmp_path / "rows.jsonl").write_text(row)
        assert len(read_evaluation_rows(tmp_path / "rows.jsonl")) == 1


def test_the_documentation_names_every_metric_and_category() -> None:
    named = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "evaluation.md").read_text(), re.MULTILINE)
    assert named == [*get_args(Metric), *CATEGORIES]


# ---- the client, where the server is not ours or busy --------------------------------------------


def asked(answer: Callable[[httpx.Request], httpx.Response], method: str = "generate", *extra: Any) -> Any:
    """What a method returns when `answer` is the server."""

    async def ask() -> Any:
        async with ServerModels("http://server", transport=httpx.MockTransport(answer)) as server:
            return await getattr(server, method)(*extra)

    return asyncio.run(ask())


def test_a_full_queue_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"error": {"message": "The queue is full.", "code": "queue_full"}}
    good = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    replies = [httpx.Response(429, json=full), httpx.Response(200, json=good)]
    assert asked(lambda request: replies.pop(0), "generate", "m", PROMPT) == Generation("", "stop")
    monkeypatch.setattr(eval_client, "_PATIENCE", 1)
    with pytest.raises(VeneerError, match="The queue is full"):
        asked(lambda request: httpx.Response(429, json=full), "generate", "m", PROMPT)


@pytest.mark.parametrize(
    ("models", "name"),
    [
        ([{"id": "big", "parent": None}, {"id": "x", "parent": "big"}], "big"),
        ([{"id": "big", "parent": None}, {"id": "base", "parent": "big"}], "base"),
    ],
)
def test_base_is_the_servers_base_unless_something_is_called_so(models: list[Any], name: str) -> None:
    assert asked(lambda request: httpx.Response(200, json={"data": models}), "find_base") == name


def test_a_list_without_a_base_is_an_error() -> None:
    with pytest.raises(VeneerError, match="no model of http://server"):
        asked(lambda request: httpx.Response(200, json={"data": []}), "find_base")


@pytest.mark.parametrize("status", [200, 502])
def test_what_is_no_api_is_named(status: int) -> None:
    with pytest.raises(VeneerError, match=f"GET /v1/models answered {status}: <html>"):
        asked(lambda request: httpx.Response(status, text="<html>"), "find_base")


@pytest.mark.parametrize(
    ("logprobs", "says"),
    [
        (None, "does not give those of prompts"),
        ({"token_logprobs": [-1.0]}, "1 log probabilities came back for 3 tokens"),
        ({"token_logprobs": [None, -1.0, None]}, "not a finite number"),
        ({"token_logprobs": [None, -1.0, -math.inf]}, "not a finite number"),
    ],
)
def test_likelihoods_that_are_none_are_refused(logprobs: Any, says: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            text = body.get("continue_final_message", False)
            return httpx.Response(200, json={"tokens": [5, 6, 7] if text else [5, 6]})
        choice = {"index": 0, "logprobs": logprobs}
        return httpx.Response(200, content=json.dumps({"choices": [choice]}))

    with pytest.raises(VeneerError, match=says):
        asked(answer, "score", "m", PROMPT, ["text"])


def test_a_token_across_the_border_is_the_answers() -> None:
    """`[5, 6]` is the prompt alone; with the answer its last token grows into another."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            text = body.get("continue_final_message", False)
            return httpx.Response(200, json={"tokens": [5, 66, 7] if text else [5, 6]})
        assert body["prompt"] == [[5, 66, 7]]
        return httpx.Response(
            200, json={"choices": [{"index": 0, "logprobs": {"token_logprobs": [None, -1, -2]}}]}
        )

    assert asked(answer, "score", "m", PROMPT, ["text"]) == [[-1, -2]]


def test_conversations_need_the_template() -> None:
    server = ServerModels("http://server", template="none")
    with pytest.raises(VeneerError, match="needs --template chat"):
        asyncio.run(server.generate("m", [*PROMPT, *PROMPT]))
