"""Reads rows of the tensors in a model's safetensors files.

The files are memory-mapped, and a page that was read stays mapped until its file is closed. A file is
therefore reopened after `_MAPPED_BYTES`, so that a reader never holds more than that.

Left out: files that hold pickles (`pytorch_model.bin`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from areal_like.errors import ConfigError, first_line
from areal_like.paths import read_json

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MAPPED_BYTES = 8 << 20
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Dtypes of weights -> bytes of an element."""


class SafetensorsRows:
    """The tensors of some safetensors files by name. Not thread-safe.

    Every method raises ConfigError, which names the file, if a file cannot be read.
    """

    def __init__(self, files: Sequence[Path], *, remedy: str = "is it complete? Download it again") -> None:
        """Reads the headers of all files, and keeps at most one file open afterwards.

        `remedy`: end of the message about a file that cannot be read.
        """
        self._remedy = remedy
        self.folder = files[0].parent
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._path: Path | None = None
        self._open: Any = None
        self._mapped = 0
        for path in files:
            with _readable(path, remedy), safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    entry = file.get_slice(name)
                    self._where[name] = path
                    self._shapes[name] = tuple(entry.get_shape())
                    self._dtypes[name] = entry.get_dtype()

    @classmethod
    def of_model(cls, model: str) -> SafetensorsRows:
        """The files of a Hugging Face directory or hub name (downloaded if they are not in the cache)."""
        if (single := find_file(model, SINGLE_FILE)) is not None:
            return cls([single])
        if (index := find_file(model, INDEX_FILE)) is None:
            if any(find_file(model, name) for name in _PICKLES):
                raise ConfigError(
                    f"{model}: its weights are pickles ({_PICKLES[0]}), which are not read here: convert them"
                    " with AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIRECTORY) and name that"
                )
            raise ConfigError(f"{model}: no {SINGLE_FILE} and no {INDEX_FILE} there: name another model")
        file_of = _read_index(index)
        files = {name: find_file(model, name) for name in sorted(set(file_of.values()))}
        for name, file in files.items():
            if file is None:
                raise ConfigError(f"{index}: it names {name}, which does not exist: download the model again")
        source = cls([file for file in files.values() if file is not None])
        for tensor, name in file_of.items():
            if source._where.get(tensor) != files[name]:
                raise ConfigError(
                    f"{index}: {tensor} is not in {name}, which the index names: download the model again"
                )
        return source

    @property
    def names(self) -> list[str]:
        """Names of all tensors, file by file. Reading in this order opens each file once."""
        return list(self._where)

    @property
    def files(self) -> list[Path]:
        """The files, each once."""
        return list(dict.fromkeys(self._where.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def file_of(self, name: str) -> Path:
        return self._where[name]

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as in the file, such as `F32`."""
        return self._dtypes[name]

    def is_float(self, name: str) -> bool:
        """True if the tensor has a dtype of weights: float64, float32, float16 or bfloat16."""
        return self._dtypes[name] in _DTYPES

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, copied; of any dtype and rank."""
        with self._reading(name, 0) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    def pieces(self, name: str, first: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (r, rows from r on) of the rows `first` to `end` (exclusive), in pieces of bounded size.

        The rows are views of the mapped file, in the dtype of the file: copy them before the next piece.
        """
        row_bytes = _DTYPES[self._dtypes[name]]
        for size in self._shapes[name][1:]:
            row_bytes *= size
        step = max(1, _MAPPED_BYTES // max(1, row_bytes))
        for start in range(first, end, step):
            stop = min(start + step, end)
            with self._reading(name, (stop - start) * row_bytes) as file:
                yield start, file.get_slice(name)[start:stop]

    def copy(self, name: str, into: Tensor, *, first: int) -> None:
        """Copies `len(into)` rows from row `first` on into `into`, and casts them to its dtype."""
        for start, rows in self.pieces(name, first, first + len(into)):
            into[start - first : start - first + len(rows)].copy_(rows)

    def close(self) -> None:
        """Closes the file that is open, if any. The next read opens it again."""
        self._open, self._path, self._mapped = None, None, 0

    @contextmanager
    def _reading(self, name: str, num_bytes: int) -> Iterator[Any]:
        path = self._where[name]
        if path != self._path or self._mapped + num_bytes > _MAPPED_BYTES:
            self.close()
        with _readable(path, self._remedy):
            if self._open is None:
                self._open, self._path = safe_open(path, framework="pt"), path
            self._mapped += num_bytes
            yield self._open


def find_file(model: str, name: str) -> Path | None:
    """A file of the model on this machine; None if the model has no such file."""
    try:
        found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model}: {name} cannot be found ({first_line(error)})") from error
    return None if found is None else Path(found)


def _read_index(index: Path) -> dict[str, str]:
    """Tensor -> name of its file, of `model.safetensors.index.json`."""
    try:
        file_of = read_json(index)["weight_map"]
        names = set(file_of.values())
        inside = all(_is_inside(name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index} is not an index of safetensors files ({error!r}): download it again"
        ) from error
    if not names or not inside:
        raise ConfigError(
            f"{index}: `weight_map` has to name files of its own directory: {sorted(names)[:3]}"
        )
    return dict(file_of)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name.endswith(".safetensors") and not path.is_absolute() and ".." not in path.parts


@contextmanager
def _readable(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): {remedy}") from error
