"""Rows of a dataset of the Hugging Face hub: the one place where the `datasets` library is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finemoe.core.errors import DataError
from finemoe.data.documents.tables import without_added


def rows(name: str, config: str | None, split: str, revision: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one split, in order.

    Raises:
        DataError: the library is missing, or the dataset cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"corpus {name}: reading the Hugging Face hub needs `pip install 'finemoe[hf]'`") from error
    try:
        table = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the library raises whatever the network, hub or file format raised
        raise DataError(f"corpus {name}, split {split}: cannot be loaded: {error}") from error
    yield from map(without_added, table)


def config_names(name: str) -> list[str]:
    """The names of a dataset's configurations.

    Raises:
        DataError: the library is missing, or the dataset cannot be found.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"corpus {name}: reading the Hugging Face hub needs `pip install 'finemoe[hf]'`") from error
    try:
        return list(datasets.get_dataset_config_names(name))
    except Exception as error:  # as above
        raise DataError(f"corpus {name}: its configurations cannot be listed: {error}") from error
