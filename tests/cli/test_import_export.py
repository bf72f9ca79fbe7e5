"""`finemoe import` and `finemoe export`: what they say, where they refuse, and that --verify can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.huggingface.published import LLAMA, V3_FP8, contents_of, publish
from finemoe.checkpoint import conversion
from finemoe.checkpoint.proof.twin import TwinResult
from finemoe.core.errors import CheckpointError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def v3() -> Path:
    return publish(Path("v3"), V3_FP8, shards=2)


@pytest.fixture
def llama() -> Path:
    folder = publish(Path("llama"), LLAMA)
    (folder / "tokenizer.json").unlink()  # it splits as no GGUF tokenizer does
    return folder


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Say what becomes of twins, without transformers; what was asked is in the list."""

    def answer(status: Any = "verified", reason: str = "close enough") -> list[Any]:
        asked: list[Any] = []

        def verify_twin(raw: Any, *, seed: int = 0) -> TwinResult:
            asked.append(raw)
            if status == "refused":
                raise CheckpointError(reason)
            return TwinResult(status, None, 1e-5, reason, None)

        monkeypatch.setattr(conversion, "verify_twin", verify_twin)
        return asked

    return answer


def rows(output: str) -> dict[str, str]:
    return {line[:19].strip(): line[21:].strip() for line in output.splitlines() if line[:1].strip()}


def narrow(result: Any) -> str:
    """The output, if it fits into 80 columns; stderr is not wrapped."""
    assert max(map(len, result.stdout.splitlines())) <= 80
    return str(result.stdout)


def test_an_import_without_a_chat_template_is_no_talker(v3: Path, command: Any) -> None:
    shutil.copytree(v3, "silent")
    Path("silent/chat_template.jinja").unlink(missing_ok=True)
    file = Path("silent/tokenizer_config.json")
    file.write_text(json.dumps({key: one for key, one in json.loads(file.read_text()).items() if "chat" not in key}))
    said = command("import", "silent", "mute", "--quiet").stdout
    assert "finemoe generate mute" in said
    assert "finemoe chat" not in said


def test_an_import_says_what_it_did_and_what_is_next(v3: Path, command: Any) -> None:
    result = command("import", v3, "ours", "--quiet")
    shown = rows(narrow(result))
    assert result.exit_code == 0
    assert shown["Imported"] == "deepseek_v3 (Hugging Face) into ours"
    assert "multi-token prediction" in shown["Parameters"]
    assert "placed (" in shown["Tensors"]
    assert "FP8 factors of the weights" in result.stdout
    for next_step in ("finemoe doctor ours", "finemoe chat ours", "finemoe export ours", 'start_from = "ours"'):
        assert next_step in result.stdout
    assert result.stderr == ""


def test_a_round_trip_through_the_verbs_is_bit_exact(v3: Path, command: Any) -> None:
    command("import", v3, "ours", "-q")
    result = command("export", "ours", "theirs", "-q")
    shown = rows(narrow(result))
    assert contents_of(Path("theirs")) == contents_of(v3)
    assert json.loads((Path("theirs") / "config.json").read_text()) == V3_FP8
    assert shown["config.json"] == "as it was imported"
    assert ", 0 with a new one" in shown["FP8 blocks"]
    assert "from_pretrained" in result.stdout


def test_json(v3: Path, command: Any, twin: Any) -> None:
    asked = twin()
    done = json.loads(command("import", v3, "ours", "--json", "-q", "--verify").stdout)
    assert done["tensors"] == {"loaded": done["tensors"]["loaded"], "carried": done["dequantized"]}
    assert [check["sound"] for check in done["checks"]] == [True, True]
    done = json.loads(command("export", "ours", "theirs", "--json", "-q", "--verify").stdout)
    assert (done["format"], done["family"], done["path"]) == ("hf", "deepseek_v3", str(Path("theirs").resolve()))
    assert [check["name"] for check in done["checks"]] == ["tensors", "twin"]
    assert [raw["model_type"] for raw in asked] == ["deepseek_v3"] * 2


def test_a_gguf_file_out_and_in(llama: Path, command: Any, twin: Any) -> None:
    asked = twin()
    command("import", llama, "ours", "-q")
    result = command("export", "ours", "out.gguf", "--dtype", "F32", "--verify", "-q")
    assert rows(narrow(result))["Exported"] == "llama (GGUF) to out.gguf"
    assert "llama-cli -m out.gguf" in result.stdout
    result = command("import", "out.gguf", "again", "--verify", "-q")
    shown = rows(narrow(result))
    assert shown["Imported"] == "llama (GGUF) into again"
    assert shown["verified: tensors"].startswith("all ")
    assert len(asked) == 2
    assert "finemoe generate" not in result.stdout, "there is no tokenizer"


def test_the_name_says_the_format_however_it_is_written(llama: Path, command: Any) -> None:
    command("import", llama, "ours", "-q")
    result = command("export", "ours", "OUT.GGUF", "-q")
    assert rows(narrow(result))["Exported"] == "llama (GGUF) to OUT.GGUF"
    assert Path("OUT.GGUF").is_file()
    result = command("export", "OUT.GGUF", "again.Gguf", "--format", "gguf", "-q")
    assert (result.exit_code, Path("again.Gguf").is_file()) == (0, True)


def test_a_foreign_folder_is_exported_through_a_temporary_import(llama: Path, command: Any) -> None:
    result = command("export", llama, "out.gguf", "-q")
    assert result.exit_code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["llama", "out.gguf"]
    result = command("export", llama, "other", "--family", "mixtral", "-q")
    assert (result.exit_code, "llama" in result.stderr, ".other" in result.stderr) == (2, True, False)
    assert sorted(path.name for path in Path().iterdir()) == ["llama", "out.gguf"]


def test_a_run_is_exported(run_directory: Path, command: Any, twin: Any) -> None:
    twin("could not", "no class of its own")
    result = command("export", run_directory, "out", "--verify", "-q")
    shown = rows(narrow(result))
    assert result.exit_code == 0, "a check that could not be made is no failure"
    assert "optimizer state" in shown["Left behind"]
    assert shown["not checked: twin"] == "no class of its own"
    assert (Path("out") / "tokenizer.json").exists()


@pytest.mark.parametrize("status", ["differs", "refused"])
def test_a_twin_that_differs_fails_and_says_so(llama: Path, command: Any, twin: Any, status: str) -> None:
    twin(status, "logits differ by half")
    result = command("import", llama, "ours", "--verify", "-q")
    assert result.exit_code == 1
    assert rows(result.stdout)["NOT VERIFIED: twin"] == "logits differ by half"
    assert "verification failed: twin" in result.stderr
    assert "Next:" not in result.stdout


def test_a_tensor_that_differs_fails_and_is_named(
    llama: Path, command: Any, twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin()
    convert = conversion.import_hf

    def and_rot(source: Path, out: Path, *, quiet: bool) -> Any:
        report = convert(source, out, quiet=quiet)
        data = bytearray((source / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (source / "model.safetensors").write_bytes(data)
        return report

    monkeypatch.setattr(conversion, "import_hf", and_rot)
    result = command("import", llama, "ours", "--verify", "-q", "--json")
    check = json.loads(result.stdout)["checks"][0]
    assert (result.exit_code, check["sound"]) == (1, False)
    assert check["said"].startswith("1 of ")


WRONG_EXPORTS = {
    "no such type": (["--dtype", "int4"], "--dtype int4: no such type"),
    "a type of the other format": (["--dtype", "q8_0"], "is for GGUF files"),
    "a name of the other format": (["--format", "gguf"], "must end in .gguf"),
    "no such family": (["--family", "lama"], "did you mean `llama`?"),
    "another family": (["--family", "deepseek_v3"], "cannot be written as deepseek_v3"),
}


@pytest.mark.parametrize("case", WRONG_EXPORTS)
def test_an_export_that_cannot_be_leaves_nothing(llama: Path, command: Any, case: str) -> None:
    options, words = WRONG_EXPORTS[case]
    command("import", llama, "ours", "-q")
    result = command("export", "ours", "out", "-q", *options)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["llama", "ours"]


@pytest.mark.parametrize("options", [["--family", "llama"], ["--fp8"]])
def test_options_of_folders_are_refused_for_files(llama: Path, command: Any, options: list[str]) -> None:
    result = command("export", llama, "out.gguf", *options)
    assert (result.exit_code, "becomes a GGUF file" in result.stderr) == (2, True)


def test_what_needs_no_import_is_told_so(run_directory: Path, llama: Path, command: Any, tmp_path: Path) -> None:
    command("import", llama, "ours", "-q")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").write_bytes(b"")
    for source, words in (
        (run_directory, "needs no import"),
        ("ours", "is imported already"),
        ("llama/model.safetensors", "give the folder"),
        ("ggufs", "give the one you want, such as ggufs/a.gguf"),
        ("absent", "no such file or folder"),
    ):
        result = command("import", source, "out")
        assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    assert not Path("out").exists()


def test_a_damaged_source_is_refused_whole(v3: Path, command: Any) -> None:
    (v3 / "model-00002-of-00002.safetensors").unlink()
    result = command("import", v3, "ours")
    assert result.exit_code == 2
    assert "model-00002-of-00002.safetensors" in result.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["v3"]
