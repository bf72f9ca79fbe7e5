"""The doctor: what it says of sound checkpoints of every kind, of damaged ones, and that damage never stops it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from checkpoint.huggingface.published import LLAMA, MIXTRAL, V3, V3_FP8, publish, tensors_of, write_weights
from finemoe.checkpoint.doctor.examine import Diagnosis, examine
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.huggingface.importing import import_hf, open_source
from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.core.errors import CheckpointError
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from finemoe.text import END_OF_TEXT, Tokenizer

ROOMY = {"vocab_size": 300}  # for the 260 ids of the published tokenizer
V3_WIDE, V3_FP8_WIDE, LLAMA_WIDE = {**V3, **ROOMY}, {**V3_FP8, **ROOMY}, {**LLAMA, **ROOMY}
ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def tokenizer() -> Tokenizer:
    """One that splits as GPT-2's does, which GGUF has a name for."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["abc abd " * 9], trainer)
    return Tokenizer(inner, "test")


def mended(folder: Path) -> Path:
    """A published folder whose tokenizer and template have nothing to complain about."""
    tokenizer().save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}'
    )
    (folder / "chat_template.jinja").unlink()  # each rendering starts a process
    return folder


def with_template(folder: Path, text: str) -> Path:
    (folder / "chat_template.jinja").write_text(text)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("originals")
    mended(publish(home / "v3", V3_WIDE, shards=3))
    with_template(
        mended(publish(home / "fp8", V3_FP8_WIDE)), "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    )
    mended(publish(home / "llama", LLAMA_WIDE))
    mended(publish(home / "mixtral", {**MIXTRAL, **ROOMY}))
    import_hf(home / "v3", home / "imported", quiet=True)
    import_hf(home / "fp8", home / "imported_fp8", quiet=True)
    import_hf(home / "llama", home / "imported_llama", quiet=True)
    export_gguf(home / "imported", home / "v3.gguf", dtype="F32", quiet=True)
    export_gguf(home / "imported_llama", home / "llama.gguf", quiet=True)
    run = home / "run"
    run.mkdir()
    config = expand(resolve({"preset": "tiny-moe", "vocab_size": 300}, "test"))
    model = Transformer(config)
    initialize(model, seed=1)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": 64}})
    (run / "config.json").write_text(text)
    for step in (1, 2):
        save(run / "checkpoints", step, RunState(model.state_dict(), {}, {"step": step}, text), keep=2)
    Tokenizer.train(["abc"] * 5, vocab_size=290).save(run / "tokenizer.json")
    return home


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        source, target = originals / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target

    return make


def said(diagnosis: Diagnosis, severity: str) -> list[str]:
    return [f"{f.about}: {f.text}" for f in diagnosis.findings if f.severity == severity]


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


SOUND = {
    "v3": ("huggingface", "deepseek_v3"),
    "fp8": ("huggingface", "deepseek_v3"),
    "llama": ("huggingface", "llama"),
    "mixtral": ("huggingface", "mixtral"),
    "imported": ("imported", "deepseek_v3"),
    "imported_fp8": ("imported", "deepseek_v3"),
    "v3.gguf": ("gguf", "deepseek2"),
    "llama.gguf": ("gguf", "llama"),
    "run": ("run", None),
    "run/checkpoints/step-00000002": ("checkpoint", None),
    "llama/model.safetensors": ("tensors", None),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("deep", [False, True])
def test_what_is_sound_has_no_problems(originals: Path, name: str, deep: bool) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in originals.rglob("*"))
    diagnosis = examine(originals / name, deep=deep)
    assert said(diagnosis, "problem") == []
    assert said(diagnosis, "warning") == []
    assert (diagnosis.kind, diagnosis.family) == SOUND[name]
    assert json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))["sound"] is True
    assert sorted((p, p.stat().st_mtime_ns) for p in originals.rglob("*")) == before


def test_the_facts_of_a_v3_folder(originals: Path) -> None:
    facts = examine(originals / "fp8").facts
    opened = open_source(originals / "fp8")
    assert facts["keys"]["placed"] == len(opened.account.loaded) + len(opened.account.copies)
    assert facts["keys"]["carried"] == len(opened.account.scales) > 0
    assert facts["mtp"] == {"announced": 1, "present": 1}
    assert facts["fp8"]["matrices"] == facts["fp8"]["factors"] == len(opened.account.scales)
    assert facts["fp8"]["blocks"] > facts["fp8"]["matrices"], "hidden size 136 needs two blocks"
    assert facts["router"]["weights"] == ["BF16"]
    bias = opened.tensors.read(ROUTER_BIAS)
    entry = facts["router"]["bias"][0]
    assert entry == {"layer": 1, "dtype": "F32", "low": bias.min().item(), "high": bias.max().item()}
    assert [entry["layer"] for entry in facts["router"]["bias"]] == [1, 2], "the prediction module counts as layer 2"
    assert sum(entry["bytes"] for entry in facts["dtypes"]) == opened.tensors.nbytes
    assert facts["size"]["mtp_parameters"] > 0
    assert facts["tokenizer"]["faithful"]
    assert facts["template"]["rendered"] == "Hello<|end_of_text|>"
    possible = {entry["family"]: entry for entry in facts["exports"] if entry["possible"]}
    assert set(possible) == {"deepseek_v3", "kimi_k2", "deepseek2"}
    assert possible["deepseek_v3"]["lost"] == []
    assert "multi-token prediction" in possible["deepseek2"]["lost"][0]
    assert all(entry["reason"] for entry in facts["exports"] if not entry["possible"])


def test_an_imported_folder_accounts_for_its_source(originals: Path) -> None:
    facts = examine(originals / "imported_fp8").facts
    opened = open_source(originals / "fp8")
    assert facts["keys"]["source"] == {
        "loaded": len(opened.account.loaded) + len(opened.account.copies),
        "carried": len(opened.account.carried),
    }


def test_small_tensors_alone_are_read_unless_deep(tmp_path: Path) -> None:
    large = torch.zeros(600, 600)  # above 1 MiB
    large[599, 599] = torch.nan
    folder = tmp_path / "one"
    folder.mkdir()
    write_weights(folder, {"large": large, "small": torch.ones(3)})
    quick, deep = (examine(folder / "model.safetensors", deep=value) for value in (False, True))
    assert quick.facts["values"] == {"looked_at": 1, "of": 2, "deep": False}
    assert quick.problems == ()
    assert said(deep, "problem") == ["weights: 1 tensor holds NaN or infinity: large (1 element)"]


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        examine(tmp_path / "absent")


def drop(folder: Path, *names: str, **replace: torch.Tensor) -> None:
    """Write the V3 folder's weights again, in one file, without some and with others."""
    raw = json.loads((folder / "config.json").read_text())
    for file in folder.glob("model*"):
        file.unlink()
    found = tensors_of(raw) | replace
    write_weights(folder, {name: tensor for name, tensor in found.items() if name not in names})


def truncate(path: Path, cut: int = 100) -> None:
    os.truncate(path, path.stat().st_size - cut)


EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("v3", lambda f: drop(f, EXPERT), f"weights: 1 tensor is missing: {EXPERT}"),
    "many missing": (
        "v3",
        lambda f: drop(f, *(f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in range(4))),
        "weights: 4 tensors are missing: model.layers.1.mlp.experts.0",
    ),
    "misshaped": ("v3", lambda f: drop(f, **{EXPERT: torch.zeros(3, 4)}), f"{EXPERT} ([3, 4] instead of [12, 136])"),
    "unexpected": (
        "v3",
        lambda f: drop(f, odd=torch.ones(2)),
        "weights: 1 tensor is known to no part of the model: odd",
    ),
    "unread type": (
        "v3",
        lambda f: drop(f, **{"model.norm.weight": torch.ones(136, dtype=torch.int8)}),
        "model.norm.weight (I8)",
    ),
    "nan": (
        "v3",
        lambda f: drop(f, **{"model.norm.weight": torch.full((136,), torch.nan)}),
        "weights: 1 tensor holds NaN or infinity: model.norm.weight (136 elements)",
    ),
    "cut short": ("v3", lambda f: truncate(f / "model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors"),
    "shard lost": (
        "v3",
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        "names model-00002-of-00003.safetensors, not in the folder",
    ),
    "config no json": ("v3", lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config lost": ("v3", lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "unknown family": ("v3", lambda f: change_json(f / "config.json", model_type="gpt9"), "`model_type` is"),
    "unknown function": ("v3", lambda f: change_json(f / "config.json", hidden_act="gelu"), "`hidden_act` is"),
    "config of another size": (
        "v3",
        lambda f: change_json(f / "config.json", num_hidden_layers=3),
        "weights: ",
    ),
    "factors lost": (
        "fp8",
        lambda f: drop(f, "model.layers.0.mlp.up_proj.weight_scale_inv"),
        "fp8: 1 FP8 matrix lacks its factors: model.layers.0.mlp.up_proj.weight",
    ),
    "factors of another shape": (
        "fp8",
        lambda f: drop(f, **{"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}),
        "1 matrix has factors that do not fit it",
    ),
    "factors infinite": (
        "fp8",
        lambda f: drop(f, **{"model.layers.0.mlp.up_proj.weight_scale_inv": torch.full((2, 2), torch.inf)}),
        "1 tensor of factors holds NaN or infinity",
    ),
    "tokenizer of another model": (
        "v3",
        lambda f: (
            Tokenizer.train(["abcdefghi " * 40 + "xyz" * 20] * 5, 310).save(f / "tokenizer.json")
            or change_json(f / "config.json", vocab_size=200)
            or drop(f)
        ),
        "tokenizer: it has ",
    ),
    "tokenizer no json": ("v3", lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer: "),
    "template does not parse": ("v3", lambda f: with_template(f, "{% if %}"), "template: "),
    "template breaks out": (
        "v3",
        lambda f: with_template(f, "{{ ''.__class__.__mro__ }}"),
        "template: ",
    ),
    "link out": (
        "v3",
        lambda f: (f / "tokenizer.json").unlink() or (f / "tokenizer.json").symlink_to("/etc/hostname"),
        "leads out of ",
    ),
    "link in a circle": (
        "v3",
        lambda f: (f / "tokenizer.json").unlink() or (f / "tokenizer.json").symlink_to("tokenizer.json"),
        "tokenizer.json: ",
    ),
    "import unfinished": ("imported", lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "import cut short": ("imported", lambda f: truncate(f / "model.safetensors"), "manifest.json says"),
    "import without a file": ("imported", lambda f: (f / "source.json").write_text("{"), "not valid JSON"),
    "gguf cut short": ("v3.gguf", truncate, "truncated"),
    "gguf no gguf": ("v3.gguf", lambda f: f.write_bytes(b"nothing at all"), "not a GGUF file"),
    "run damaged": (
        "run",
        lambda f: truncate(f / "checkpoints/step-00000002/model.safetensors"),
        "files: checkpoint step-00000002: ",
    ),
    "run without checkpoints": (
        "run",
        lambda f: shutil.rmtree(f / "checkpoints/step-00000001") or shutil.rmtree(f / "checkpoints/step-00000002"),
        "no checkpoint to open: there is none yet",
    ),
    "empty folder": ("v3", lambda f: [p.unlink() for p in f.iterdir()], "neither a run, nor an imported folder"),
    "pickles alone": (
        "v3",
        lambda f: [p.unlink() for p in f.glob("model*")] and (f / "pytorch_model.bin").write_bytes(b""),
        "has only pickle weights",
    ),
}


@pytest.mark.parametrize("damage", WRONG)
def test_damage_is_a_problem_that_names_it(copy: Callable[[str], Path], damage: str) -> None:
    name, harm, words = WRONG[damage]
    path = copy(name)
    harm(path)
    diagnosis = examine(path)
    problems = said(diagnosis, "problem")
    assert any(words in text for text in problems), problems
    assert len(problems) <= 4, "one damage, not an avalanche"
    assert diagnosis.findings[: len(problems)] == diagnosis.problems, "problems first"
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_it_agrees_with_the_import(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """A Hugging Face folder has a problem of files, config, weights or FP8 exactly where an import refuses it."""
    for number, (name, harm, _) in enumerate(WRONG.values()):
        if name not in ("v3", "fp8"):
            continue
        path = copy(name)
        harm(path)
        found = {finding.about for finding in examine(path).problems}
        try:
            import_hf(path, tmp_path / f"out{number}", quiet=True)
            refused = False
        except CheckpointError:
            refused = True
        about = found & {"files", "config", "weights", "fp8"}
        if not found & {"tokenizer", "template"}:  # the import takes these along verbatim
            assert refused == bool(about), (number, found)
        shutil.rmtree(path)


MILD: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "bf16 bias": (
        "v3",
        lambda f: drop(f, **{ROUTER_BIAS: torch.ones(4, dtype=torch.bfloat16)}),
        "warning",
        "router: selection bias stored as BF16 in layer 1",
    ),
    "biases lost": (
        "v3",
        lambda f: drop(f, **{ROUTER_BIAS: torch.zeros(4), ROUTER_BIAS.replace("layers.1", "layers.2"): torch.zeros(4)}),
        "warning",
        "router: every selection bias is 0",
    ),
    "fp8 router": (
        "fp8",
        lambda f: drop(
            f,
            **{
                "model.layers.1.mlp.gate.weight": torch.ones(4, 136).to(torch.float8_e4m3fn),
                "model.layers.1.mlp.gate.weight_scale_inv": torch.ones(1, 2),
            },
        ),
        "warning",
        "router: weights of less than 16 bits",
    ),
    "a factor of 0": (
        "fp8",
        lambda f: drop(f, **{"model.layers.0.mlp.up_proj.weight_scale_inv": torch.zeros(2, 2)}),
        "warning",
        "a whole block of weights is lost",
    ),
    "a matrix of zeros": ("v3", lambda f: drop(f, **{EXPERT: torch.zeros(12, 136)}), "warning", "nothing but zeros"),
    "prediction module lost": (
        "v3",
        lambda f: drop(f, *(name for name in tensors_of(V3_WIDE) if name.startswith("model.layers.2."))),
        "warning",
        "mtp: config.json promises 1 ",
    ),
    "class trap": (
        "v3",
        lambda f: change_json(f / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast"),
        "warning",
        "tokenizer: tokenizer_class is LlamaTokenizerFast",
    ),
    "no tokenizer": ("v3", lambda f: (f / "tokenizer.json").unlink(), "warning", "tokenizer: no tokenizer.json"),
    "sentencepiece alone": (
        "v3",
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "warning",
        "only tokenizer.model",
    ),
    "stop beyond": (
        "v3",
        lambda f: change_json(f / "generation_config.json", eos_token_id=100_001),
        "warning",
        "stops at id 100,001",
    ),
    "reach": (
        "v3",
        lambda f: change_json(
            f / "config.json",
            max_position_embeddings=9000,
            rope_scaling={"type": "yarn", "factor": 2, "original_max_position_embeddings": 4096, "mscale": 1},
        ),
        "warning",
        "rope: yarn scaling by 2 from 4,096 positions reaches 8,192, and max_position_embeddings says 9,000",
    ),
    "pickle": ("v3", lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "note", "1 pickle file, which may run"),
    "code": ("v3", lambda f: (f / "modeling.py").write_text("boom"), "note", "never run: modeling.py"),
    "auto_map": ("v3", lambda f: None, "note", "named by `auto_map` alone"),
    "frequencies": (
        "llama",
        lambda f: drop(f, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        "note",
        "weights: 1 tensor is not needed: rotary frequencies",
    ),
    "stray link": ("v3", lambda f: (f / "notes.txt").symlink_to("/etc/hostname"), "warning", "leads out of the folder"),
}


@pytest.mark.parametrize("case", MILD)
def test_what_still_opens_is_no_problem(copy: Callable[[str], Path], case: str) -> None:
    name, change, severity, words = MILD[case]
    path = copy(name)
    change(path)
    diagnosis = examine(path)
    assert said(diagnosis, "problem") == []
    assert any(words in text for text in said(diagnosis, severity)), diagnosis.findings


def test_damage_that_only_checksums_show_needs_deep(copy: Callable[[str], Path]) -> None:
    path = copy("imported")
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    assert examine(path).problems == ()
    assert any("checksum" in text for text in said(examine(path, deep=True), "problem"))


def test_copies_that_differ_show_where_all_is_read(copy: Callable[[str], Path]) -> None:
    path = copy("v3")
    drop(path, **{"model.layers.2.embed_tokens.weight": torch.ones(300, 136, dtype=torch.bfloat16)})
    assert said(examine(path), "warning") == []
    deep = examine(path, deep=True)
    assert deep.problems == ()
    assert "model.layers.2.embed_tokens.weight should equal" in said(deep, "warning")[0]


def test_a_run_with_a_damaged_checkpoint_is_judged_by_the_one_before(copy: Callable[[str], Path]) -> None:
    path = copy("run")
    truncate(path / "checkpoints/step-00000002/model.safetensors")
    diagnosis = examine(path)
    assert diagnosis.facts["keys"]["placed"] == diagnosis.facts["keys"]["tensors"] > 0
    assert diagnosis.facts["checkpoints"] == ["step-00000002", "step-00000001"]


def test_an_interrupted_import_is_recognised(tmp_path: Path) -> None:
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"")
    (partial / ".model.journal").write_text("")
    assert "give its command again" in examine(partial).problems[0].text


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 30), name=st.sampled_from(["v3", "imported", "llama.gguf", "run", "mixtral"]))
def test_random_damage_never_raises(
    originals: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, name: str
) -> None:
    """Bytes flipped, files cut, emptied or removed: always a diagnosis, and it can be written as JSON."""
    draw = random.Random(seed)
    home = tmp_path_factory.mktemp("damaged")
    source, path = originals / name, home / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    for file in draw.sample(files, min(len(files), draw.randint(1, 2))):
        data = bytearray(file.read_bytes())
        match draw.randrange(5):
            case 0 if data:
                for _ in range(draw.randint(1, 8)):  # headers and JSON are where it hurts
                    data[draw.randrange(min(len(data), 4096))] = draw.randrange(256)
                file.write_bytes(data)
            case 1:
                file.write_bytes(data[: draw.randrange(len(data) + 1)])
            case 2:
                file.write_bytes(b"")
            case 3 if path.is_dir():
                file.unlink()
                file.symlink_to(draw.choice(["/etc/hostname", "/dev/zero", file.name]))
            case _:
                file.unlink()
    if path.exists():
        json.dumps(examine(path, deep=draw.random() < 0.3).to_dict(), allow_nan=False)
    shutil.rmtree(home)
