"""A recipe is taken exactly or refused with the field's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.errors import InvalidRequest
from veneer.training.recipe import read_recipe

LEAST = "data: rows.jsonl\noutput: out\nsteps: 3\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_the_least_recipe_has_defaults_and_paths_beside_it(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, LEAST))
    assert recipe.data == tmp_path / "rows.jsonl"
    assert recipe.output == tmp_path / "out"
    assert recipe.test_data is None
    assert recipe.base is None
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.targets) == (8, 16, "all-linear")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "learning_rat: 1\n", "'learning_rat' is not a field; the fields are method, "),
        (LEAST + "adapter: {rnk: 4}\n", r"'adapter.rnk' is not a field; the fields are kind, rank, alpha"),
        (LEAST + "evaluation: {row: 4}\n", r"'evaluation.row' is not a field; the fields are rows"),
        (LEAST + "adapter: {rank: 0}\n", r"adapter.rank: .*greater than 0 \(got 0\)"),
        (LEAST + "adapter: {rank: 513}\n", r"adapter.rank: .*512 \(got 513\)"),
        (LEAST + "adapter: {kind: ia3, rank: 4}\n", r"adapter: .*rank=4: kind 'ia3' has no use for it"),
        (LEAST + "adapter: {kind: prompt, targets: [q]}\n", r"targets=\['q'\]: kind 'prompt' has no use"),
        (LEAST + "adapter: {targets: []}\n", r"adapter.targets"),
        (LEAST + "quantization: int3\n", r"quantization: .*'none', 'nf4' or 'int8'.*'int3'"),
        (LEAST + "epochs: 2\n", "either `steps` or `epochs`"),
        (LEAST + "packing: true\nmethod: dpo\n", "`packing` is for single sequences"),
        (
            LEAST + "evaluation: {gate: {metrik: f1}}\n",
            "'evaluation.gate.metrik' is not a field; the fields are metric",
        ),
        ("data: a\noutput: b\n", "either `steps` or `epochs`"),
        (LEAST + "test_data: a\ntest_fraction: 0.1\n", "not both"),
        ("output: b\nsteps: 1\n", "data: Field required"),
        ("- 1\n- 2\n", "must be a YAML mapping"),
        ("a: [", "cannot be read"),
        ("!!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_recipe(write(tmp_path, text))


def test_every_wrong_field_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"batch_size.*; 'colour' is not a field"):
        read_recipe(write(tmp_path, LEAST + "batch_size: 0\ncolour: red\n"))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.yaml"):
        read_recipe(tmp_path / "none.yaml")
