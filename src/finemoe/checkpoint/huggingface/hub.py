"""Models by name: `deepseek-ai/DeepSeek-V2-Lite` becomes a folder of the Hugging Face cache.

Only what is needed and safe is fetched: safetensors, JSON and tokenizer files, chat templates. Never Python, never
pickles. The one module that knows `huggingface_hub`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from finemoe.checkpoint.storage.untrusted import PICKLES
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.core.logs import logger

PREFIX = "hf:"
"""Before a name that must not be taken for a path."""

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_SUFFIXES = frozenset({".json", ".jinja"})
_TOKENIZER_FILES = frozenset({"tokenizer.model", "merges.txt"})
_SLACK_BYTES = 64 << 20
_LOG_IN = "log in with `hf auth login`"
_UNREACHED = "the network is out of reach or switched off (HF_HUB_OFFLINE)"
_REASONS: Mapping[str, str] = {
    "GatedRepoError": f"its owners want their terms accepted first: do so on its page, then {_LOG_IN}",
    "RepositoryNotFoundError": f"there is no such repository, or it is private; {_LOG_IN} if it is yours",
    "RevisionNotFoundError": "it has no such revision",
    "OfflineModeIsEnabled": f"it is not in the cache, and {_UNREACHED}",
    "LocalEntryNotFoundError": f"it is not in the cache, and {_UNREACHED}",
    "IncompleteSnapshotError": f"only a part of it is in the cache, and {_UNREACHED}",
    "HFValidationError": "that is no possible name of a repository",
}
"""What the errors of huggingface_hub mean, by the name of their class; the names differ less than the places."""


@dataclass(frozen=True)
class _Listing:
    """What a repository holds that is of use."""

    commit: str
    sizes: Mapping[str, int]
    """Bytes by file name."""


def resolve(source: str, *, cache: Path | None = None, quiet: bool = False) -> Path:
    """The path of `source`: itself where it exists, else the folder that the repository of that name is fetched into.

    Args:
        source: a path, or `organisation/name`, or `organisation/name@revision`; `hf:` before it makes it a name.
        cache: folder to fetch into; None: the user's Hugging Face cache.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: neither a path nor a repository, nothing safe in it, too little disk, or the network fails.
        ConfigError: huggingface_hub is not installed.
    """
    name = source.removeprefix(PREFIX)
    path = Path(source)
    if name == source and path.exists():
        return path
    match = _NAME.fullmatch(name)
    if match is None or (name == source and path.parent.is_dir()):
        forced = f"; for the repository of that name write {PREFIX}{name}" if match is not None else ""
        raise CheckpointError(f"{source}: no such file or folder{forced}")
    hub = _package()
    repository, revision = match["repository"], match["revision"]
    with _plain_words(source):
        folder = Path(hub.constants.HF_HUB_CACHE if cache is None else cache)
        if hub.constants.HF_HUB_OFFLINE:
            patterns = ["*.safetensors", *(f"*{suffix}" for suffix in sorted(_SUFFIXES)), *sorted(_TOKENIZER_FILES)]
            return Path(
                hub.snapshot_download(
                    repository, revision=revision, cache_dir=folder, allow_patterns=patterns, local_files_only=True
                )
            )
        listing = _list(hub, repository, revision, source)
        missing = {
            file: size
            for file, size in listing.sizes.items()
            if not isinstance(hub.try_to_load_from_cache(repository, file, folder, listing.commit), str)
        }
        _check_space(folder, sum(missing.values()), source)
        return _fetch(hub, repository, listing, folder, sum(missing.values()), quiet)


def _package() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError as error:
        raise ConfigError(
            "names of repositories need the huggingface_hub package: pip install 'finemoe[hf]', or give a folder"
        ) from error
    return huggingface_hub


@contextmanager
def _plain_words(source: str) -> Iterator[None]:
    """One sentence for whatever the library, or the network below it, raises: their classes have no common base."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        known = (_REASONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _REASONS)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full; free some space and give the same command again"
        else:
            said = str(error).strip().split("\n")[0][:200] or type(error).__name__
            reason = next(known, f"no such folder, and from the hub it cannot be fetched: {said}")
        raise CheckpointError(f"{source}: {reason}") from error


def _list(hub: ModuleType, repository: str, revision: str | None, source: str) -> _Listing:
    info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
    tensors = [name for name in sizes if name.endswith(".safetensors")]
    if not tensors:
        _refuse(source, sizes)
    if "config.json" not in sizes:
        raise CheckpointError(f"{source}: has no config.json, so nobody can say what its weights are")
    # Some repositories hold the same weights a second time under another name.
    weights = [name for name in tensors if _WEIGHTS.fullmatch(name)] or tensors
    wanted = {name for name in sizes if Path(name).suffix in _SUFFIXES or name in _TOKENIZER_FILES}
    return _Listing(info.sha, {name: sizes[name] for name in sorted(wanted | set(weights))})


def _refuse(source: str, sizes: Mapping[str, int]) -> None:
    pickles = sorted(name for name in sizes if Path(name).suffix.lower() in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{source}: has only pickle weights ({pickles[0]}), which may run code when opened; "
            "ask its owners for safetensors"
        )
    ggufs = sorted(name for name in sizes if name.endswith(".gguf"))
    if ggufs:
        raise CheckpointError(f"{source}: has GGUF files only ({ggufs[0]}); fetch the one you want and give its path")
    raise CheckpointError(f"{source}: has no safetensors weights")


def _check_space(folder: Path, nbytes: int, source: str) -> None:
    home = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(home).free
    if nbytes and nbytes + _SLACK_BYTES > free:
        raise CheckpointError(
            f"{source}: not enough disk in {home}: {nbytes / 1e9:.2f} GB are to be fetched and {free / 1e9:.2f} GB are "
            "free; free some space, or set HF_HOME to a larger disk"
        )


def _fetch(hub: ModuleType, repository: str, listing: _Listing, folder: Path, missing_bytes: int, quiet: bool) -> Path:
    """Fetch what is missing; interrupted, the same call goes on where it was."""
    if missing_bytes and not quiet:
        logger.info("fetching %.2f GB of %s into %s", missing_bytes / 1e9, repository, folder)
    silenced = quiet and not hub.utils.are_progress_bars_disabled()
    if silenced:
        hub.utils.disable_progress_bars()
    try:
        path = hub.snapshot_download(
            repository, revision=listing.commit, cache_dir=folder, allow_patterns=sorted(listing.sizes)
        )
    finally:
        if silenced:
            hub.utils.enable_progress_bars()
    absent = [name for name in listing.sizes if not os.path.exists(os.path.join(path, name))]
    if absent:
        raise CheckpointError(f"{repository}: {absent[0]} did not arrive; give the same command again")
    return Path(path)
