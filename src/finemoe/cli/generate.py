"""`finemoe generate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finemoe.cli.completion import complete_run
from finemoe.cli.output import Json, WeightsOption, bytes_of, print_json, printable

if TYPE_CHECKING:
    from finemoe.checkpoint.language_model import LanguageModel
    from finemoe.generation import Engine, Request, SamplingConfig, Sequence
    from finemoe.text.tokenizer import Tokenizer


Source = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A run directory or one checkpoint in it, an imported or Hugging Face folder, or a GGUF file.",
        show_default=False,
        autocompletion=complete_run,
    ),
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; repeatable.")
]
File = Annotated[
    str | None, typer.Option("--file", metavar="FILE", help='A prompt a line, or .jsonl with "prompt"; - is stdin.')
]
Chat = Annotated[
    str | None, typer.Option(metavar="TEXT", help="A message to answer, put into the model's chat template.")
]
Special = Annotated[
    bool, typer.Option("--special", help="Read control tokens that a prompt spells out as tokens, not as text.")
]
MinP = Annotated[
    float | None, typer.Option(help="Draw among tokens at least M times as likely as the best.", metavar="M")
]
Repetition = Annotated[
    float, typer.Option("--repetition-penalty", help="Divides scores of tokens that were there.", metavar="R")
]
Presence = Annotated[
    float, typer.Option("--presence-penalty", help="Taken from tokens of the text, once each.", metavar="A")
]
Frequency = Annotated[
    float, typer.Option("--frequency-penalty", help="The same, as often as each is there.", metavar="A")
]
Stops = Annotated[
    list[str] | None, typer.Option("--stop", help="Ends the text, which leaves it out; repeatable.", metavar="TEXT")
]
MinNewTokens = Annotated[int, typer.Option("--min-new-tokens", help="Before so many, the text does not end.")]

Samples = Annotated[int, typer.Option("--samples", "-s", help="Completions of each prompt, drawn apart.", metavar="N")]
Logprobs = Annotated[
    int, typer.Option(help="With --json: the K most probable tokens beside each one.", metavar="K", min=0)
]
Schema = Annotated[
    str | None, typer.Option(metavar="FILE", help="The completion is JSON of this schema, a file or the JSON itself.")
]
Regex = Annotated[str | None, typer.Option(metavar="RE", help="All of the completion matches this expression.")]
Choices = Annotated[
    list[str] | None, typer.Option("--choice", metavar="TEXT", help="The completion is one of these; repeatable.")
]
Guess = Annotated[
    str | None,
    typer.Option(
        metavar="text|module|MODEL",
        help="Guess next tokens, for speed: from the text, the prediction module, or a small model.",
    ),
]
GuessTokens = Annotated[
    int | None, typer.Option(help="Tokens guessed at a time.", metavar="N", show_default="2 of module, else 4")
]
CacheDtype = Annotated[
    Literal["fp32", "bf16", "fp8"] | None, typer.Option(help="Of the cache.", show_default="the weights'")
]
CacheSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Of the cache, such as 2GB.", show_default="a quarter of the free memory"),
]


def generate(
    source: Source,
    prompts: Prompts = None,
    file: File = None,
    chat: Chat = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="With --chat: the system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the K most probable tokens.", metavar="K")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest tokens that reach P.", metavar="P")] = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    stop: Stops = None,
    min_new_tokens: MinNewTokens = 0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.")] = 0,
    weights: WeightsOption = "auto",
    special: Special = False,
    samples: Samples = 1,
    logprobs: Logprobs = 0,
    json_schema: Schema = None,
    regex: Regex = None,
    choice: Choices = None,
    guess: Guess = None,
    guess_tokens: GuessTokens = None,
    cache_dtype: CacheDtype = None,
    cache_size: CacheSize = None,
    as_json: Json = False,
) -> None:
    """Continue prompts, or answer a message.

    One prompt streams as it is written; several run together, and each gets the text that it
    would get alone. A prompt that spells out control tokens, such as <|im_start|> or <think>,
    is read as the text that it is, and you are told; --special reads them as the tokens.
    --chat writes those of the chat template itself, and reads the message in the same way.
    --json-schema, --regex and --choice hold the model to a form, token by token.
    With --guess several tokens are tried in one pass; the text stays the same.
    With --json: a list of prompt, completion, finish_reason ("length" or "stop"), tokens
    (ids) and logprobs (nats, under the model itself), with --logprobs also "likely".

    \b
    Examples:
      finemoe generate runs/tiny --prompt "def main(" --top-p 0.95
      finemoe generate runs/tiny --prompt "def f(" --min-p 0.05 --stop "def "
      finemoe generate runs/tiny --file prompts.txt --json > completions.json
      finemoe generate SmolLM2-135M-Instruct --chat "Name three rivers." \\
        --temperature 0
      finemoe generate SmolLM2-135M-Instruct --chat "Is 7 prime?" --choice yes \\
        --choice no
      finemoe generate runs/mtp --prompt "def f(" --guess module --temperature 0
      finemoe generate SmolLM2-135M-Instruct --file turns-written-by-hand.jsonl \\
        --special
    """
    from finemoe.checkpoint.kinds import kind_of

    options = locals()
    texts = _read_prompts(prompts or [], file, chat, system)
    kind_of(source)  # a path that holds nothing is refused before a second of imports
    _generate(texts, options, _sampling(options))


def _generate(texts: list[str], options: Mapping[str, Any], sampling: SamplingConfig) -> None:
    from finemoe.checkpoint.language_model import open_language_model
    from finemoe.core.logs import logger
    from finemoe.generation import Request
    from finemoe.generation.generate import check_counts, complete, completion, engine_with, grammar_of

    chat, system, samples = options["chat"], options["system"], options["samples"]
    check_counts(samples, options["guess_tokens"])
    grammar = grammar_of(
        {**options, "json_schema": _schema(options["json_schema"]), "choice": options["choice"] or None}
    )
    cache_bytes = bytes_of(options["cache_size"], "--cache-size")
    opened = open_language_model(options["source"], options["weights"])
    given = texts if chat is None else [chat, *([system] if system is not None else [])]
    texts, ids = _encoded(opened, texts, chat, system, options["special"])
    if not options["special"]:
        _say_what_is_text(given, opened.tokenizer, "message" if chat is not None else "prompt")
    _say_what_is_odd(ids, sampling, opened)
    engine = engine_with(opened, options["guess"], options["guess_tokens"], options["cache_dtype"], cache_bytes)
    started = time.monotonic()
    if len(ids) * samples == 1 and not options["as_json"]:
        sequences = [_stream(engine, texts[0], Request(ids[0], sampling, grammar=grammar, continues=chat is None))]
    else:
        sequences = complete(engine, ids, sampling, n=samples, grammar=grammar, answers=chat is not None)
        records = [completion(texts[number // samples], one).to_dict() for number, one in enumerate(sequences)]
        _print(records, options["as_json"])
    _say_speed(sequences, time.monotonic() - started)
    if options["guess"] is not None:
        logger.info("%s", engine.acceptance)


def _sampling(options: Mapping[str, Any]) -> SamplingConfig:
    from finemoe.core.config import parse
    from finemoe.generation import SamplingConfig

    draw = {name: options[name] for name in SamplingConfig.model_fields if name in options}
    return parse(SamplingConfig, {**draw, "stop": options["stop"] or ()}, "finemoe generate")


def _read_prompts(prompts: list[str], file: str | None, chat: str | None, system: str | None) -> list[str]:
    """Prompts of the options, then those of the file; none beside a message to answer.

    Raises:
        ConfigError: there are none, or options that exclude each other.
        DataError: an unreadable file, or text that is not Unicode.
    """
    from finemoe.core.errors import ConfigError, DataError

    if system is not None and chat is None:
        raise ConfigError('--system goes with a message to answer: add --chat "..."')
    if chat is not None:
        if prompts or file is not None:
            raise ConfigError("--chat answers one message: give it without --prompt and --file")
        return []
    texts = [*prompts, *(_read_file(file) if file is not None else [])]
    if not texts:
        raise ConfigError('nothing to continue: give --prompt "...", --file FILE or --chat "..."')
    for number, text in enumerate(texts, 1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"prompt {number} is not valid Unicode: {error.reason}") from error
    return texts


def _read_file(name: str) -> list[str]:
    from finemoe.core.errors import DataError
    from finemoe.core.logs import logger

    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else None
        reason = found.lower() if found else "it is not UTF-8 text; save it as such"
        raise DataError(f"--file {name}: cannot be read: {reason}") from error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    blank = text.rstrip("\n").count("\n") + 1 - len(numbered) if text.strip() else 0
    if blank:
        logger.warning("--file %s: skipped %d blank line%s", name, blank, "s" * (blank > 1))
    if not numbered:
        raise DataError(f"--file {name}: no prompt in it; write one a line")
    if not name.endswith(".jsonl"):
        return [line.removesuffix("\r") for _, line in numbered]
    return [_prompt_of(line, f"--file {name}, line {number}") for number, line in numbered]


def _prompt_of(line: str, source: str) -> str:
    from finemoe.core.errors import DataError

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{source}: not JSON: {reason}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f'{source}: needs {{"prompt": "text"}}')
    return prompt


def _schema(given: str | None) -> str | None:
    """What --json-schema names: the text of a file, or the JSON that it is itself."""
    from finemoe.core.errors import ConfigError

    if given is None or given.lstrip().startswith(("{", "true", "false")):
        return given
    try:
        return Path(given).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--json-schema {given}: it is not UTF-8 text; save it as such") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"--json-schema {given}: cannot be read: {reason}; give a file, or the JSON itself"
        ) from error


def _encoded(
    opened: LanguageModel, texts: list[str], chat: str | None, system: str | None, special: bool
) -> tuple[list[str], list[tuple[int, ...]]]:
    """What the model continues, as text and as ids: `texts`, or the message in its template.

    Raises:
        DataError: a message without a template, or a template that is damaged or fails.
    """
    _ = opened.template  # a damaged one is told whether it is needed or not
    if chat is None:
        return texts, [tuple(opened.encode(text, special=special)) for text in texts]
    spoken = [("system", system), ("user", chat)]
    messages = [{"role": role, "content": words} for role, words in spoken if words is not None]
    text, ids = opened.encode_chat(messages, special=special)
    return [text], [tuple(ids)]


def _say_what_is_text(texts: list[str], tokenizer: Tokenizer, what: str) -> None:
    """Control tokens that somebody spelt out and that are read as text, and how to have them read as tokens."""
    from finemoe.core.logs import logger
    from finemoe.text.control import spelt_in

    found = [spelt_in(tokenizer, text) for text in texts]
    names = list(dict.fromkeys(name for spelt in found for name in spelt))
    if not names:
        return
    holding = sum(map(bool, found))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    logger.warning(
        "%s %s out control tokens of this model (%s), which are read as text: --special reads them as the tokens",
        f"the {what}" if len(texts) == 1 else f"{holding} of {len(texts)} {what}s",
        "spells" if holding == 1 else "spell",
        shown,
    )


def _say_what_is_odd(ids: list[tuple[int, ...]], sampling: SamplingConfig, opened: LanguageModel) -> None:
    """Empty prompts, and sequences longer than the model is made for. Nothing is ever truncated."""
    from finemoe.core.logs import logger

    for number, prompt in enumerate(ids, 1):
        if not prompt:
            logger.warning("prompt %d is empty: the model begins a text of its own", number)
    longest = max(len(prompt) for prompt in ids) + sampling.max_new_tokens
    if opened.reach is not None and longest > opened.reach:
        logger.warning(
            "prompt and completion may reach %d tokens; the model was %s %d and gets worse beyond. Nothing is cut off",
            longest,
            "trained on" if opened.own else "made for",
            opened.reach,
        )


def _stream(engine: Engine, text: str, request: Request) -> Sequence:
    """Write the prompt and its completion to stdout, token by token; of an answer, the answer alone."""
    engine.submit(request)
    if request.continues:
        _write(text, bold=True)
    for event in engine.events():
        _write(event.text)
    _write("\n")
    return event.sequence


def _print(records: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(records)
        return
    for number, record in enumerate(records, 1):
        _write(f"--- {number} of {len(records)}\n")
        _write(record["prompt"], bold=True)
        _write(record["completion"] + "\n")


def _write(text: str, bold: bool = False) -> None:
    """To stdout at once; on a terminal without control characters, which a model may write by chance."""
    if sys.stdout.isatty():
        text = printable(text)
        text = typer.style(text, bold=True) if bold and text else text
    sys.stdout.write(text)
    sys.stdout.flush()


def _say_speed(sequences: list[Sequence], seconds: float) -> None:
    from finemoe.core.logs import logger

    tokens = sum(len(sequence.completion) for sequence in sequences)
    strings = sum(sequence.stopped_by is not None for sequence in sequences)
    stopped = sum(sequence.finish_reason == "stop" for sequence in sequences) - strings
    limited = len(sequences) - stopped - strings
    ending = f"{stopped} ended by the model, " + (f"{strings} by --stop, " if strings else "")
    ending += f"{limited} by --max-new-tokens"
    if len(sequences) == 1:
        ending = "ended by " + ("the model" if stopped else "--stop" if strings else "--max-new-tokens")
    logger.info("%d tokens in %.2g s (%.0f tokens/s), %s", tokens, seconds, tokens / max(seconds, 1e-9), ending)
