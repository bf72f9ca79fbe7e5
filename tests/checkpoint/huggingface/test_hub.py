"""Names of repositories, against a hub that lives in this process: what is asked for, what is refused, what is said."""

from __future__ import annotations

import builtins
import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from finemoe.checkpoint.huggingface.hub import resolve
from finemoe.core.errors import CheckpointError, ConfigError

COMMIT = "0123456789abcdef"
FILES = {
    "config.json": 900,
    "model-00001-of-000002.safetensors": 5_000,
    "model-00002-of-000002.safetensors": 4_000,
    "model.safetensors.index.json": 300,
    "tokenizer.json": 700,
    "tokenizer_config.json": 100,
    "chat_template.jinja": 50,
    "consolidated.safetensors": 9_000,
    "modeling_deepseek.py": 60,
    "pytorch_model.bin": 9_000,
    "weights.pt": 9_000,
    "README.md": 10,
    "original/model.safetensors": 9_000,
}
SAFE = {
    name
    for name in FILES
    if "/" not in name and not name.endswith((".py", ".bin", ".pt", ".md")) and "consolidated" not in name
}


class Hub:
    """Stands for huggingface_hub, and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int] = dict(FILES)
        self.asked: list[Any] = []
        self.error: Exception | None = None
        self.offline = False
        self.bars = True
        self.bars_while_fetching: bool | None = None

    def module(self) -> ModuleType:
        hub, constants = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.constants")
        constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = self.offline, str(self.folder)
        hub.constants = constants
        hub.HfApi = lambda: SimpleNamespace(model_info=self.model_info)
        hub.snapshot_download = self.snapshot_download
        hub.try_to_load_from_cache = self.try_to_load_from_cache
        hub.utils = SimpleNamespace(
            are_progress_bars_disabled=lambda: not self.bars,
            disable_progress_bars=lambda: setattr(self, "bars", False),
            enable_progress_bars=lambda: setattr(self, "bars", True),
        )
        return hub

    def model_info(self, repository: str, *, revision: str | None, files_metadata: bool) -> Any:
        assert files_metadata
        self.asked.append(("list", repository, revision))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(
            sha=COMMIT, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in self.files.items()]
        )

    def try_to_load_from_cache(self, repository: str, name: str, cache: Path, revision: str) -> str | None:
        path = self.folder / name
        return str(path) if path.exists() else None

    def snapshot_download(self, repository: str, **options: Any) -> str:
        self.asked.append(("fetch", repository, options))
        self.bars_while_fetching = self.bars
        if options.get("local_files_only") and self.error is not None:
            raise self.error
        for name in options["allow_patterns"]:
            if name in self.files:
                (self.folder / name).write_bytes(b"x" * self.files[name])
        return str(self.folder)

    @property
    def fetched(self) -> dict[str, Any]:
        return next(entry[2] for entry in self.asked if entry[0] == "fetch")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def install(**settings: Any) -> Hub:
        folder = tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        fake = Hub(folder)
        for name, value in settings.items():
            setattr(fake, name, value)
        module = fake.module()
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.constants", module.constants)
        return fake

    monkeypatch.chdir(tmp_path)
    return install


def test_a_path_that_exists_wins(hub: Callable[..., Hub], tmp_path: Path) -> None:
    fake = hub()
    (tmp_path / "deepseek-ai" / "DeepSeek-V3").mkdir(parents=True)
    assert resolve("deepseek-ai/DeepSeek-V3") == Path("deepseek-ai/DeepSeek-V3")
    assert fake.asked == []
    assert resolve("hf:deepseek-ai/DeepSeek-V3") == fake.folder


def test_only_what_is_needed_and_safe_is_fetched(hub: Callable[..., Hub]) -> None:
    fake = hub()
    assert resolve("deepseek-ai/DeepSeek-V3@refs/pr/1") == fake.folder
    assert fake.asked[0] == ("list", "deepseek-ai/DeepSeek-V3", "refs/pr/1")
    assert set(fake.fetched["allow_patterns"]) == SAFE
    assert fake.fetched["revision"] == COMMIT, "what was listed is what is fetched"
    assert {path.name for path in fake.folder.iterdir()} == SAFE


def test_weights_of_another_name_are_fetched_where_there_are_no_others(hub: Callable[..., Hub]) -> None:
    fake = hub(files={"config.json": 1, "consolidated.safetensors": 1})
    resolve("a/b")
    assert "consolidated.safetensors" in fake.fetched["allow_patterns"]


@pytest.mark.parametrize(("quiet", "shown"), [(True, False), (False, True)])
def test_progress_is_as_wanted_and_left_as_found(hub: Callable[..., Hub], quiet: bool, shown: bool) -> None:
    fake = hub()
    resolve("a/b", quiet=quiet)
    assert (fake.bars_while_fetching, fake.bars) == (shown, True)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": 1, "pytorch_model.bin": 9}, "pickle weights (pytorch_model.bin)"),
        ({"config.json": 1, "m-Q4_0.gguf": 9}, "GGUF files only (m-Q4_0.gguf)"),
        ({"config.json": 1, "sub/model.safetensors": 9}, "no safetensors"),
        ({"model.safetensors": 9}, "no config.json"),
    ],
)
def test_a_repository_without_safe_weights_is_refused(hub: Callable[..., Hub], files: Any, said: str) -> None:
    fake = hub(files=files)
    with pytest.raises(CheckpointError) as caught:
        resolve("a/b")
    assert said in str(caught.value)
    assert str(caught.value).startswith("a/b: ")
    assert all(entry[0] != "fetch" for entry in fake.asked)


def test_the_disk_is_looked_at_before(hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=(64 << 20) + 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    fake = hub()
    with pytest.raises(CheckpointError, match=r"not enough disk in .*: 0\.00 GB are to be fetched"):
        resolve("a/b")
    assert all(entry[0] != "fetch" for entry in fake.asked)
    (fake.folder / "model-00001-of-000002.safetensors").touch()  # what is there already needs no room
    resolve("a/b")


def test_offline_takes_the_cache_and_asks_nobody(hub: Callable[..., Hub]) -> None:
    fake = hub(offline=True)
    assert resolve("a/b") == fake.folder
    assert [entry[0] for entry in fake.asked] == ["fetch"]
    assert fake.fetched["local_files_only"] is True
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in fake.fetched["allow_patterns"])


def named(name: str, *bases: str) -> Exception:
    """An exception of a class of that name, with those above it."""
    kind: type[Exception] = Exception
    for base in reversed((name, *bases)):
        kind = type(base, (kind,), {})
    return kind("404 Client Error. (Request ID: Root=1)\n\nRepository Not Found for url: ...")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (named("GatedRepoError", "RepositoryNotFoundError"), "terms"),
        (named("RepositoryNotFoundError", "HfHubHTTPError"), "no such repository"),
        (named("RevisionNotFoundError", "HfHubHTTPError"), "no such revision"),
        (named("OfflineModeIsEnabled"), "HF_HUB_OFFLINE"),
        (
            named("ConnectTimeout"),
            "no such folder, and from the hub it cannot be fetched: 404 Client Error. (Request ID: Root=1)",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ConnectionError(), "cannot be fetched: ConnectionError"),
    ],
)
def test_every_failure_is_one_plain_sentence(hub: Callable[..., Hub], error: Exception, said: str) -> None:
    hub(error=error)
    with pytest.raises(CheckpointError) as caught:
        resolve("a/b")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["runs/tiny", "nothing", "../a/b", "/a/b", "a/b/c", "a/b.gguf/", "", "a/b@"])
def test_what_can_only_be_a_path_is_not_looked_up(hub: Callable[..., Hub], source: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    if source == "":
        source = "no\0pe"
    fake = hub()
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve(source)
    assert fake.asked == []


def test_a_local_folder_in_the_way_is_told_how_to_go_around(hub: Callable[..., Hub], tmp_path: Path) -> None:
    hub()
    (tmp_path / "deepseek-ai").mkdir()
    with pytest.raises(CheckpointError, match="write hf:deepseek-ai/DeepSeek-V3"):
        resolve("deepseek-ai/DeepSeek-V3")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"finemoe\[hf\]"):
        resolve("a/b")


def test_a_file_that_did_not_arrive_is_named(hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = hub()
    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", lambda *_, **__: str(fake.folder))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja did not arrive"):
        resolve("a/b")
