"""Parquet files of training data, for which pyarrow must be installed.

A few bytes can stand for many: a long text that repeats is there once, in a dictionary. So columns of text are read
as dictionaries, and a row's size is known before it is written out. What remains is pyarrow's: for a page it takes
as much memory as the page says it needs, up to 2 GiB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import InvalidRequest
from veneer.training.data.records import Limits, Record, given

_VALUE_BYTES = 16  # about what a value takes beside its text


def parquet(path: Path, name: str, limits: Limits) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidRequest(
            f"data file {name!r}: Parquet needs pyarrow, which is not installed; run "
            "`pip install 'veneer[parquet]'`, or send JSON lines"
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            texts, fault = _checked(file.metadata, limits)
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            if fault := fault or _strange(file.schema_arrow):
                yield Record(name, {}, fault)
                return
            for batch in file.iter_batches(batch_size=512):
                wheres = [f"{name} row {number + at}" for at in range(1, batch.num_rows + 1)]
                number += batch.num_rows
                yield from _rows(batch, wheres, limits)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).replace(str(path), name).split())
        yield Record(f"{name} after row {number}", {}, f"is not readable as Parquet: {reason:.200}")


def _checked(metadata: Any, limits: Limits) -> tuple[list[str], str | None]:
    """The paths of columns of text, and what the file says it holds too much of."""
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    columns = [group.column(at) for group in groups for at in range(group.num_columns)]
    texts = {column.path_in_schema for column in columns if column.physical_type == "BYTE_ARRAY"}
    size = sum(group.total_byte_size for group in groups)
    values = max((column.num_values for column in columns), default=0)
    fault = None
    if size > limits.file_bytes:
        fault = f"holds {size} bytes when it is unpacked; at most {limits.file_bytes} are taken"
    elif metadata.num_rows > limits.rows:
        fault = f"has {metadata.num_rows} rows; at most {limits.rows} are taken: split the file"
    elif values > limits.file_bytes // _VALUE_BYTES:
        most = limits.file_bytes // _VALUE_BYTES
        fault = f"holds {values} values in one column of a row group; at most {most} are taken"
    return sorted(texts), fault


def _strange(schema: Any) -> str | None:
    """A column that is there twice, or of a type whose size could not be told and that no format has a use for."""
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        return f"names column {twice[0]:.60} twice"
    for field in schema:
        if not _is_known(field.type):
            return (
                f"column {field.name:.60} is of type {field.type!s:.60}, which cannot be read; leave it out"
            )
    return None


def _is_known(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_known(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_known(kind.value_type)
    return bool(types.is_dictionary(kind) or types.is_primitive(kind) or types.is_null(kind))


def _rows(batch: Any, wheres: Sequence[str], limits: Limits) -> list[Record]:
    if sum(map(_size, batch.columns)) <= limits.row_bytes:
        try:
            return [Record(where, given(row)) for where, row in zip(wheres, _written(batch), strict=True)]
        except (ValueError, OverflowError) as error:  # text that is not UTF-8 among them
            fault = f"has a value that cannot be read: {error!s:.200}"
    else:
        fault = f"is longer than {limits.row_bytes} bytes; shorten the row"
    half = batch.num_rows // 2
    if not half:
        return [Record(wheres[0], {}, fault)]
    first, second = batch.slice(0, half), batch.slice(half)
    return _rows(first, wheres[:half], limits) + _rows(second, wheres[half:], limits)


def _written(batch: Any) -> list[dict[str, Any]]:
    """The rows as Python values; arrays without dictionaries are faster to take apart."""
    # Taken: a slice of lists still has the values of all, and a cast would write them out.
    whole = batch.take(list(range(batch.num_rows)))
    columns = [column.cast(_plain(column.type)) for column in whole.columns]
    return list(type(batch).from_arrays(columns, names=batch.schema.names).to_pylist())


def _plain(kind: Any) -> Any:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        return kind.value_type
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([(field.name, _plain(field.type)) for field in kind])
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(_plain(kind.value_type))
    return pyarrow.list_(_plain(kind.value_type)) if pyarrow.types.is_list(kind) else kind


def _size(values: Any) -> int:
    """How many bytes values take once they are Python's, about."""
    from pyarrow import compute, types

    own = _VALUE_BYTES * len(values)
    if types.is_dictionary(values.type):
        lengths = compute.binary_length(values.dictionary).take(values.indices)
        return own + int(compute.sum(lengths).as_py() or 0)
    if types.is_struct(values.type):
        return own + sum(map(_size, values.flatten()))
    if types.is_list(values.type) or types.is_large_list(values.type):
        return own + _size(values.flatten())
    return own
