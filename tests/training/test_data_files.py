"""Files of every kind give the same records, and hostile ones give faults with a place, not exceptions."""

from __future__ import annotations

import builtins
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from veneer.errors import InvalidRequest
from veneer.training.data.files import records
from veneer.training.data.formats import Row
from veneer.training.data.records import Limits, Record
from veneer.training.data.rows import read_rows, scan, validate

GOOD = b'{"prompt": "p", "completion": "c"}\n'


def read(path: Path, content: bytes | None = None, **limits: int) -> list[Record]:
    if content is not None:
        path.write_bytes(content)
    return list(records(path, path.name, Limits(**limits)))


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_the_kinds_hold_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a,\\n\u2028b", "completion": "c"}\r\n')
    (tmp_path / "a.csv").write_text('\ufeffprompt,completion\r\n"a,\n\u2028b",c\r\n', newline="")
    write_parquet(tmp_path / "a.parquet", {"prompt": ["a,\n\u2028b"], "completion": ["c"], "input": [None]})
    read = [read_rows(tmp_path / f"a.{kind}")[0] for kind in ("jsonl", "csv", "parquet")]
    assert [row.where for row in read] == ["a.jsonl:1", "a.csv row 1", "a.parquet row 1"]
    assert {row.prompt[0].content for row in read} == {"a,\n\u2028b"}
    assert {row.answer for row in read} == {"c"}


def test_messages_are_read_from_parquet(tmp_path: Path) -> None:
    message = [
        {"role": "user", "content": "u", "weight": None},
        {"role": "assistant", "content": "a", "weight": 1},
    ]
    (row,) = scan(write_parquet(tmp_path / "a.parquet", {"messages": [message]}))
    assert isinstance(row, Row)
    assert row.answer == "a"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a",', "is not JSON: Input data was truncated"),
        (b'{"prompt": NaN, "completion": "c"}', "is not JSON: invalid character"),
        (b'{"prompt": "\\ud800 a", "completion": "c"}', "is not JSON"),
        (b'{"prompt": "\xe4", "completion": "c"}', "is not UTF-8"),
        (b"[" * 200_000, "is nested too deeply"),
        (b"[1]", "must be a JSON object, not a list"),
        (b"\xff\xfe{\x00}\x00", "is not JSON"),
        (b'{"prompt": "' + b"a" * 100 + b'"}', "is longer than 80 bytes"),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", "is not JSON: Integer value out of range"),
    ],
)
def test_a_hostile_line_is_named_and_the_next_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    limit = 80 if "longer" in reason else 1 << 20
    good, bad, after = read(tmp_path / "a.jsonl", GOOD + line + b"\n" + GOOD.rstrip(), row_bytes=limit)
    assert (good.fault, after.fault, after.where) == (None, None, "a.jsonl:3")
    assert bad.where == "a.jsonl:2"
    assert bad.fault is not None
    assert reason in bad.fault


def test_nesting_that_can_just_be_read_is_a_fault_of_the_row(tmp_path: Path) -> None:
    for depth in (100, 500, 900, 950, 990):
        value = "[" * depth + "]" * depth
        (tmp_path / "a.jsonl").write_text(f'{{"messages": [{{"role": "user", "content": {value}}}]}}')
        found = validate(tmp_path / "a.jsonl")
        assert found.fault_count == 1


def test_a_line_of_100_mb_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"a" * 1_000_000)
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    try:
        long, good = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert long.fault == f"is longer than {16 << 20} bytes; shorten the row"
    assert good.fields == {"prompt": "p", "completion": "c"}
    assert peak < 48 << 20


@pytest.mark.parametrize(
    ("content", "where", "reason"),
    [
        (b"a,a\n1,2\n", "a.csv header", "names a column twice"),
        (b"a,b\n1,2\n1\0,2\n", "a.csv row 2", "has a NUL character"),
        ("a,b\n1,2\n".encode("utf-16"), "a.csv header", "has a NUL character; if the file is UTF-16"),
        (b"a,b\n1,2\n\xe4,2\n", "a.csv row 2", "is not UTF-8"),
        (b"a,b\n1,2\n1\n", "a.csv row 2", "has 1 cells, the header 2"),
        (b"a,b\n1,2\n1,2,3\n", "a.csv row 2", "has 3 cells, the header 2"),
        (b'a,b\n1,2\n"1"x,2\n', "a.csv row 2", "is not CSV"),
        (b'a,b\n1,2\n"1,2\n', "a.csv row 2", "is not CSV: unexpected end of data"),
        (b"a,b\n1,2\n" + b"1" * 200 + b",2\n", "a.csv row 2", "is longer than 80 characters"),
        (b'a,b\n1,2\n"' + b"1\n" * 100 + b'",2\n', "a.csv row 2", "is longer than 80 characters"),
    ],
)
def test_a_hostile_csv_is_named(tmp_path: Path, content: bytes, where: str, reason: str) -> None:
    (fault,) = (record for record in read(tmp_path / "a.csv", content, row_bytes=80) if record.fault)
    assert fault.where == where
    assert reason in str(fault.fault)


def test_a_row_after_a_wrong_one_is_read_in_csv(tmp_path: Path) -> None:
    found = read(tmp_path / "a.csv", b'a\n"1"x\n\n2\n\xe4\n3\n')
    assert [record.fields for record in found] == [{}, {"a": "2"}, {}, {"a": "3"}]
    assert found[3].where == "a.csv row 4"


def test_parquet_of_wrong_types_is_named_by_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": [1, 2], "completion": [b"x", b"y"]})
    found = validate(path)
    assert [str(fault) for fault in found.faults] == [
        "a.parquet row 1: prompt must be text (got 1)",
        "a.parquet row 2: prompt must be text (got 2)",
    ]


def test_parquet_text_that_is_not_utf8_is_named_by_row(tmp_path: Path) -> None:
    wrong = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xe4a")]
    )
    first, second = read(write_parquet(tmp_path / "a.parquet", {"text": wrong}))
    assert "has a value that cannot be read" in str(first.fault)
    assert second.fields == {"text": "a"}


def test_a_damaged_parquet_is_a_fault(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["some text"] * 100}, compression="none")
    whole = path.read_bytes()
    for content in (b"", b"PAR1", b"not parquet at all", whole[:-20], whole[:4] + b"\xff" * 40 + whole[44:]):
        found = read(path, content)
        assert "is not readable as Parquet" in str(found[-1].fault)
        assert str(tmp_path) not in str(found[-1].fault)


def test_a_parquet_that_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a" * 100_000] * 100}, use_dictionary=False)
    size = path.stat().st_size
    (found,) = read(path, file_bytes=size + 1)
    assert "bytes when it is unpacked; at most" in str(found.fault)
    (found,) = read(path, rows=99)
    assert "has 100 rows; at most 99 are taken" in str(found.fault)
    assert {"is longer than 99999 bytes; shorten the row"} == {r.fault for r in read(path, row_bytes=99_999)}


def test_a_text_that_repeats_is_not_written_out(tmp_path: Path) -> None:
    """24 kB that stand for 50 GB in one row, after a row that is right."""
    count, text = 100_000, pa.array(["x" * 500_000, "p"])
    contents = pa.DictionaryArray.from_arrays(pa.array([1] + [0] * count, pa.int32()), text)
    roles = pa.array(["assistant"] * (count + 1))
    messages = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    rows = pa.ListArray.from_arrays(pa.array([0, 1, count + 1], pa.int32()), messages)
    path = write_parquet(tmp_path / "a.parquet", {"messages": rows})
    assert path.stat().st_size < 100_000
    good, bomb = read(path)
    assert good.fields == {"messages": [{"role": "assistant", "content": "p"}]}
    assert bomb.fault == f"is longer than {16 << 20} bytes; shorten the row"
    (found,) = read(path, file_bytes=1_000_000)
    assert "holds 100001 values in one column of a row group; at most 62500 are taken" in str(found.fault)


def test_a_column_of_a_strange_type_is_refused(tmp_path: Path) -> None:
    table = {"text": ["t"], "more": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))}
    (found,) = read(write_parquet(tmp_path / "a.parquet", table))
    assert "column more is of type map<" in str(found.fault)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    (found,) = read(tmp_path / "a.parquet")
    assert found.fault == "names column text twice"


def test_every_kind_of_text_and_list_is_read(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        (found,) = read(write_parquet(tmp_path / "a.parquet", {"text": pa.array(["t"], kind)}))
        assert found.fields == {"text": "t"}
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int64())])
    value = [{"role": "user", "content": "u", "weight": None}]
    for kind in (pa.list_(message), pa.large_list(message)):
        (found,) = read(write_parquet(tmp_path / "a.parquet", {"messages": pa.array([value], kind)}))
        assert found.fields == {"messages": value}
    number = pa.array([1.5], pa.float64())
    assert read(write_parquet(tmp_path / "a.parquet", {"text": number}))[0].fields == {"text": 1.5}


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["t"]})
    whole = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return whole(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidRequest, match=r"pip install 'veneer\[parquet\]'"):
        read(path)


def test_a_file_that_is_missing_too_large_or_of_no_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"'none.jsonl' cannot be read: No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(InvalidRequest, match=r"must end in .jsonl, .ndjson, .csv, .parquet"):
        read(tmp_path / "a.json", GOOD)
    with pytest.raises(InvalidRequest, match=r"has 35 bytes; at most 34"):
        read(tmp_path / "a.jsonl", GOOD, file_bytes=34)
    assert read(tmp_path / "a.jsonl", GOOD * 3, rows=2)[-1].fault == "has more than 2 rows; split the file"


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + GOOD)[0].fault is None
