"""Reading rows from files, directories or the hub, with the place that each row came from."""

import contextlib
import difflib
import glob
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada_jax.data import row_bounds
from neuroada_jax.data.readers import (
    BATCH,
    LINE_SUFFIXES,
    SUFFIXES,
    Record,
    check_characters,
    damage,
    first_line,
    read_file,
    table_rows,
    too_large,
)
from neuroada_jax.data.row_store import Places, stored
from neuroada_jax.errors import UserError
from neuroada_jax.files import read_json

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_PATIENCE = 5.0  # seconds for the first answer of the hub
# A file whose name has one of these words belongs to that split, and one that has none of them to "train". A name with
# words of two splits, such as dev1000_from_train, belongs to neither: it is read only for a split of another name.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


@dataclass(frozen=True)
class Rows:
    """Rows in file order.

    Attributes:
      rows: one dict a row, with the values of the file (checked when they are rendered, not here); a list, or a sequence on
        disk where they are many.
      source: the name that the user gave, for error messages.
      places: (file, number) of each row; the number is a line of a text file and a row of other formats.
    """

    rows: Sequence[dict[str, Any]]
    source: str
    places: Sequence[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Return the place of a row: 'file:line', or 'file: row 3' (counted from 0) for sources without lines."""
        file, number = self.places[index]
        return f"{file}:{number}" if file.lower().endswith(LINE_SUFFIXES) else f"{file}: row {number}"

    def part(self, numbers: Iterable[int]) -> "Rows":
        """Return the rows with these numbers, in the order given."""
        chosen = list(numbers)
        found = {i: self.rows[i] for i in sorted(set(chosen))}  # rows on disk are read in their order
        return Rows([found[i] for i in chosen], self.source, [self.places[i] for i in chosen])

    def renamed(self, columns: Mapping[str, str]) -> "Rows":
        """Return the rows with other names of fields; see `load_rows`.

        Raises:
          UserError: columns that are not there.
        """
        names = _Columns(dict(columns))
        rows = stored(names.row(row, *self.places[i]) for i, row in enumerate(self.rows))
        names.check()
        return Rows(rows, self.source, self.places)

    def converted(self, convert: Callable[[Mapping[str, Any], str], dict[str, Any]]) -> "Rows":
        """Return the rows in another form; `convert` takes a row and its place."""
        return Rows(stored(convert(row, self.where(i)) for i, row in enumerate(self.rows)), self.source, self.places)


def rows_from_list(rows: list[dict], source: str = "rows") -> Rows:
    """Wrap rows that are in memory; error messages name them '<source>: row <index>'.

    Raises:
      UserError: half of a surrogate pair; names the row and the field.
    """
    found = Rows(rows, source, [(source, index) for index in range(len(rows))])
    for i, row in enumerate(rows):
        check_characters(row, found.where(i))
    return found


def load_rows(
    source: str | Sequence[str],
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Rows:
    """Read rows.

    Args:
      source: one of these, or a list of them, whose rows follow one another: a file of `readers.SUFFIXES`; a pattern of
        files such as `data/*.jsonl`; a directory written by `datasets` (`save_to_disk`), or one with such files; a hub name
        such as `tatsu-lab/alpaca`, with a colon before the name of a configuration: `nyu-mll/glue:mrpc`.
      split: the split of a hub name or of a saved DatasetDict; of a directory, the files whose names have the split's name
        (files that name no split are "train", files that name two are neither); of a .json file with several lists, the
        list of that name. Other files are read whatever the split.
      limit: the number of rows to read, from the first on; None for all.
      columns: the name that a field gets -> its name in the files.

    Raises:
      UserError: nothing there, an unknown kind of file, an unknown split or one that is two sets (MNLI's validation), no
        rows, a damaged file, a row that is not an object, or columns that are not there.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    name = ", ".join(map(str, sources))
    if limit is not None and limit < 1:
        raise UserError(f"limit: found {limit}, expected a positive number of rows")
    if not sources:
        raise UserError("rows: found an empty list, expected at least one file or name")
    records = itertools.chain.from_iterable(_read(str(each), split, limit) for each in sources)
    renamed = _Columns(dict(columns or {}))
    places = Places()

    def rows() -> Iterator[dict[str, Any]]:
        for file, number, row in itertools.islice(records, limit):
            places.append(file, number)
            yield renamed.row(row, file, number)

    found = stored(rows())
    if not found:
        raise UserError(f"{name}: no rows, expected at least one")
    renamed.check()
    return Rows(found, name, places)


def _where(file: str, number: int) -> str:
    return Rows([], "", [(file, number)]).where(0)


class _Columns:
    """New names of fields, with a check that every old name is somewhere."""

    def __init__(self, columns: dict[str, str]) -> None:
        self._columns, self._fields = columns, {column: field for field, column in columns.items()}
        if len(self._fields) < len(columns):
            twice = next(column for column in columns.values() if list(columns.values()).count(column) > 1)
            raise UserError(f"columns: column {twice!r} is given twice, expected one field for each column")
        self._seen: dict[str, dict[str, None]] = {}  # file -> the names of its columns

    def row(self, row: dict[str, Any], file: str, number: int) -> dict[str, Any]:
        """Return a row of a file under the new names; `number` is its place there.

        Raises:
          UserError: a field of the new name is there already.
        """
        if not self._fields:
            return row
        self._seen.setdefault(file, {}).update(dict.fromkeys(row))
        result = {}
        for column, value in row.items():
            field = self._fields.get(column, column)
            if field in result or (field != column and field in row and field not in self._fields):
                raise UserError(
                    f"{_where(file, number)}: columns.{field}: found a column {field!r} beside {self._columns[field]!r}, "
                    "expected one of them"
                )
            result[field] = value
        return result

    def check(self) -> None:
        """Check that every file has each column or a field of the new name, and one of them the column.

        Raises:
          UserError: names the file, the column, the nearest column and all of them.
        """
        for field, column in self._columns.items():
            everywhere = any(column in seen for seen in self._seen.values())
            for file, seen in self._seen.items():
                if column not in seen and not (everywhere and field in seen):
                    near = "".join(f"; did you mean {each!r}?" for each in difflib.get_close_matches(column, seen, n=1))
                    raise UserError(
                        f"{file}: columns.{field}: no column {column!r}, found {', '.join(seen) or 'none'}{near}"
                    )


def _read(source: str, split: str, limit: int | None) -> Iterator[Record]:
    """Yield the records of a source; more than `limit` of them are not needed."""
    path = Path(source)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _from_datasets(source, split, limit, _load_from_disk)
        return itertools.chain.from_iterable(read_file(file, split, limit) for file in _files_of(path, split))
    if path.exists():
        return read_file(path, split, limit)
    if any(sign in source for sign in "*?["):
        files = sorted(Path(file) for file in glob.glob(source, recursive=True))
        if not files:
            raise UserError(f"{source}: no file has such a name")
        return itertools.chain.from_iterable(read_file(file, split, limit) for file in files)
    if source.lower().endswith(SUFFIXES) or not HUB_NAME.fullmatch(source) or source[0] == ".":
        raise UserError(f"{source}: no such file or directory")
    return _from_datasets(source, split, limit, _load_from_hub)


def _data_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file() and path.name.lower().endswith(SUFFIXES))


def _files_of(directory: Path, split: str) -> list[Path]:
    files = _data_files(directory)
    if not files:
        raise UserError(f"{directory}: no data files in this directory, expected some of {', '.join(SUFFIXES)}")
    chosen = _of_split(files, split)
    if not chosen:
        names = ", ".join(file.name for file in files[:5])
        raise UserError(f"{directory}: no file for split {split!r}, found {names}{' ...' if len(files) > 5 else ''}")
    stems = [file.name.lower().removesuffix(".gz").rpartition(".")[0] for file in chosen]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        names = ", ".join(file.name for file, stem in zip(chosen, stems, strict=True) if stem == twice)
        raise UserError(f"{directory}: the same rows in several formats ({names}); name one of the files")
    if len({"mismatched" in _words(file.name) for file in chosen if _words(file.name) & {"matched", "mismatched"}}) > 1:
        raise UserError(
            f"{directory}: split {split!r} is two sets here; name one of them: {split}_matched or {split}_mismatched"
        )
    return chosen


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Return the files of a split; for a split that is not in SPLIT_WORDS, those whose names have all its words."""
    if split not in SPLIT_WORDS:
        asked = set(re.findall(r"[a-z0-9]+", split.lower()))
        return [file for file in files if asked <= _words(file.name)]
    kinds = {file: [kind for kind, words in SPLIT_WORDS.items() if words & _words(file.name)] for file in files}
    chosen = [file for file in files if kinds[file] == [split]]
    return chosen if chosen or split != "train" else [file for file in files if not kinds[file]]


def _words(name: str) -> set[str]:
    """Return the words of a file's name, each with and without the digits at its end."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return {*words, *(word.rstrip("0123456789") for word in words)}


def has_split(directory: Path, split: str) -> bool:
    """Return whether a directory has rows of a split, judged by the names of its files."""
    if not directory.is_dir():
        return False
    if (directory / "dataset_dict.json").exists():
        return split in read_json(directory / "dataset_dict.json").get("splits", [])
    return (directory / "state.json").exists() or bool(_of_split(_data_files(directory), split))


def _from_datasets(source: str, split: str, limit: int | None, load: Callable[[str, str], Any]) -> Iterator[Record]:
    dataset = load(source, split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    size = sum(row_bounds.file_bytes(Path(each["filename"])) for each in dataset.cache_files)
    try:
        yield from table_rows(source, dataset.with_format("arrow").iter(batch_size=BATCH), size)
    except row_bounds.TooLarge:
        raise too_large(source) from None
    except damage() as error:
        raise UserError(f"{source}: cannot be read ({first_line(error)})") from error


def _load_from_disk(source: str, split: str) -> Any:
    import datasets

    try:
        with row_bounds.limited_memory(row_bounds.file_bytes(Path(source))):
            dataset = datasets.load_from_disk(source)
    except row_bounds.TooLarge:
        raise too_large(source) from None
    except Exception as error:  # of Arrow, JSON or the file system, for a damaged directory
        raise UserError(f"{source}: not a directory saved by datasets ({first_line(error)})") from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(f"{source}: no split {split!r}, found {', '.join(dataset)}")
    return dataset[split]


@contextlib.contextmanager
def _without_retries(name: str) -> Iterator[None]:
    """Keep to the hub's cache if the hub cannot be reached, which `datasets` would try for half a minute."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants, errors

    switches: list[Any] = [constants, datasets.config]
    before = [each.HF_HUB_OFFLINE for each in switches]
    if not constants.HF_HUB_OFFLINE:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=_PATIENCE)
        except (errors.HfHubHTTPError, errors.HFValidationError):
            pass  # the hub has answered: `datasets` says what
        except Exception:  # of the HTTP library below the client: no network, no such host, no answer
            for each in switches:
                each.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for each, value in zip(switches, before, strict=True):
            each.HF_HUB_OFFLINE = value


def _load_from_hub(source: str, split: str) -> Any:
    import datasets

    try:
        with _without_retries(source.partition(":")[0]):
            return datasets.load_dataset(*source.split(":"), split=split)
    except Exception as error:  # an unknown data set, an unknown split and no network raise different types
        raise UserError(
            f"{source}: no such file or directory, and as a hub data set it cannot be loaded ({first_line(error)})"
        ) from error
