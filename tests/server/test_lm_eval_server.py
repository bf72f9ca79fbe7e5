"""lm-evaluation-harness against the server: the log-probabilities and texts of `finemoe evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.generation import SamplingConfig
from finemoe.generation.generate import generate
from finemoe.generation.scoring import Windows, WindowScore, continuation_windows, score, text_windows
from finemoe.server.conversation import Conversation
from server.conftest import Live

completions = pytest.importorskip("lm_eval.models.openai_completions")
pytest.importorskip("tenacity")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PAIRS = [("def main", " return 1"), ("weather in", " Ulm"), ("x = 1", " return"), ("a", " b")]  # borders of tokens


@pytest.fixture(scope="module")
def tokenizer(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the harness reads it, to know where a context ends."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(writer / "tokenizer.json", folder)
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def client(live: Live, tokenizer: Path) -> Any:
    return completions.LocalCompletionsAPI(
        base_url=f"{live.address}/v1/completions",
        model="writer",
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        max_length=255,
        num_concurrent=1,
    )


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def scores(opened: LanguageModel, windows: Windows) -> list[WindowScore]:
    return [one for settled, _ in score(opened.model, windows.windows, 1) for _, one in settled]


def test_continuations_are_scored_the_same(client: Any, writer: Path) -> None:
    opened = open_language_model(writer)
    found = client.loglikelihood([asked(*pair) for pair in PAIRS], disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        own = scores(opened, continuation_windows(opened, context, continuation))
        assert logprob == pytest.approx(sum(one.logprob for one in own), abs=1e-3)
        assert greedy == all(one.greedy for one in own)


def test_whole_texts_are_scored_the_same(client: Any, writer: Path) -> None:
    opened = open_language_model(writer)
    text = "def main():\n    return 1\n" * 3
    (found,) = client.loglikelihood_rolling([asked(text)], disable_tqdm=True)
    own = scores(opened, text_windows(opened, text))
    assert found == pytest.approx(sum(one.logprob for one in own), abs=1e-3)


def test_texts_are_the_same(client: Any, writer: Path) -> None:
    prompts = [context for context, _ in PAIRS]
    found = client.generate_until(
        [asked(one, {"until": ["\n\n"], "max_gen_toks": 12}) for one in prompts], disable_tqdm=True
    )
    own = generate(writer, prompts, temperature=0, max_new_tokens=12, stop="\n\n", quiet=True)
    assert found == [one.completion for one in own]


def test_answers_are_the_same(live: Live, talker: Path) -> None:
    client = completions.LocalChatCompletion(
        base_url=f"{live.address}/v1/chat/completions", model="talker", num_concurrent=1, tokenizer_backend=None
    )
    questions = ["Say something.", "Which rivers are there?", "1 + 1 = ?"]
    contexts = [client.apply_chat_template([{"role": "user", "content": one}]) for one in questions]
    found = client.generate_until(
        [asked(one, {"until": ["\n\n"], "max_gen_toks": 12}) for one in contexts], disable_tqdm=True
    )
    opened = open_language_model(talker)
    for question, text in zip(questions, found, strict=True):
        talk = Conversation(opened, sampling=SamplingConfig(temperature=0.0, max_new_tokens=12, stop=("\n\n",)))
        assert text == "".join(event.text for event in talk.ask(question))
