"""Names of adapters, and what the `model` field selects."""

from __future__ import annotations

import pytest

from veneer.adapters.names import (
    Base,
    Selector,
    check_name,
    checkpoint_name,
    is_job_name,
    job_name,
    parse_selector,
)
from veneer.errors import InvalidRequest, NotFound

BASE = "org/Base-1.5"


@pytest.mark.parametrize("name", ["a", "A-1", "org/name", "a/b/c", "v1.2_x", "0", "x" * 128, "a..b"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".a", "-a", "/a", "_a", "a@1", "a:b", "a b", "a\n", "a\0", "ä", "x" * 129, "a\\b", "a%2f"),
        *("a//b", "a/", "a/.", "a/..", "a/../b", "../a"),
    ],
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check_name(name, param="alias")
    assert repr(name) in error.value.message
    assert error.value.param == "alias"
    if "@" not in name:
        with pytest.raises(NotFound):
            parse_selector(name, BASE)


@pytest.mark.parametrize(
    ("model", "selected"),
    [
        (BASE, Base()),
        ("name", Selector("name")),
        ("name@3", Selector("name", 3)),
        ("org/name@12", Selector("org/name", 12)),
        (f"{BASE}:name", Selector("name")),
        (f"{BASE}:name@3", Selector("name", 3)),
        (f"{BASE}:{BASE}", Selector(BASE)),  # an adapter may be reached even under the base's name
        (f"{BASE}/x", Selector(f"{BASE}/x")),
    ],
)
def test_selectors(model: str, selected: Base | Selector) -> None:
    assert parse_selector(model, BASE) == selected


@pytest.mark.parametrize(
    "model",
    [
        *(
            "name@",
            "name@0",
            "name@-1",
            "name@x",
            "name@1.0",
            "name@01",
            "name@1@2",
            "name@ 1",
            "name@\u0661",
        ),
        *(f"name@{10**9}", "@1", "other:name", f"{BASE}:", f"{BASE}:@1", f"{BASE}:a:b", f"{BASE}@1:x"),
    ],
)
def test_what_selects_nothing(model: str) -> None:
    with pytest.raises(NotFound) as error:
        parse_selector(model, BASE)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    assert repr(model) in error.value.message


# ---- names of fine-tuning jobs --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [None, "poet", "My.poet_2-x", "x" * 64])
@pytest.mark.parametrize("base", ["tiny", BASE])
def test_names_of_jobs(base: str, suffix: str | None) -> None:
    name = job_name(base, suffix, "a1b2c3d4")
    assert name == f"ft:{base}:{suffix or ''}:a1b2c3d4"
    for each in (name, checkpoint_name(name, 1), checkpoint_name(name, 123456789)):
        assert is_job_name(each)
        assert check_name(each) == each
        assert parse_selector(each, base) == Selector(each)
        assert parse_selector(f"{each}@2", base) == Selector(each, 2)
        assert parse_selector(f"{base}:{each}", base) == Selector(each)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "ft:",
            "ft::x",
            "ft:a:b",
            "ft:a:b c:d",
            "ft:a:b:",
            "ft:a:b:D",
            "ft:a:b:c:d",
            "ft:a:b:c:ckpt-step-0",
        ),
        *("ft:a:b:c:ckpt-step-", "ft:a/../b::c", "ft:a//b::c", "ft:a::c\n", f"ft:{'a' * 128}::c", "fta::c"),
    ],
)
def test_what_is_no_name_of_a_job(name: str) -> None:
    assert not is_job_name(name)
    with pytest.raises(InvalidRequest):
        check_name(name)


def test_an_adapter_of_a_base_that_is_called_ft() -> None:
    assert parse_selector("ft:poet", "ft") == Selector("poet")
    assert parse_selector("ft:ft::abc", "ft") == Selector("ft:ft::abc")


@pytest.mark.parametrize(
    ("base", "suffix", "param"),
    [
        ("b", "", "suffix"),
        ("b", "a b", "suffix"),
        ("b", "x" * 65, "suffix"),
        ("a:b", None, "model"),
        ("b" * 120, None, "suffix"),
    ],
)
def test_names_that_a_job_cannot_have(base: str, suffix: str | None, param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        job_name(base, suffix, "a1")
    assert error.value.param == param
