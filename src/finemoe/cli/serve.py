"""`finemoe serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finemoe.cli.completion import complete_run
from finemoe.cli.output import WeightsOption

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="Run directories, checkpoints, imported or Hugging Face folders, GGUF files; NAME=PATH gives a name.",
        show_default=False,
        autocompletion=complete_run,
    ),
]
Size = Annotated[str | None, typer.Option(metavar="SIZE", help="For weights and caches of all models, such as 8GB.")]
Key = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="Clients must send the key that it holds.")
]
Below = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Let clients replace a model's weights (POST /update_weights_from_disk) by any of the same architecture "
        "and tokenizer that lie below this folder, and nowhere else. For a trainer whose answers come from here.",
        show_default="nobody may",
    ),
]


def serve(
    sources: Sources,
    host: Annotated[str, typer.Option(help="To listen at; others than this machine reach 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key_file: Key = None,
    on_demand: Annotated[bool, typer.Option("--on-demand", help="Open a model when it is first asked for.")] = False,
    memory: Size = None,
    cache_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of each model's cache.", show_default="a quarter of the free memory"),
    ] = None,
    weights: WeightsOption = "auto",
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Change a limit (docs/howto/serve.md lists them).")
    ] = None,
    weights_below: Below = None,
) -> None:
    """Serve models: a page to talk on, and OpenAI's API.

    The page is at the address itself, and shows the experts at work. Programs that speak to
    OpenAI need that address with /v1 as their base URL, and a name of GET /v1/models.
    Only this machine can connect unless --host says otherwise; then give a key, too: in a
    file (--api-key-file) or as FINEMOE_API_KEY. No prompt, answer or key is ever logged.
    Ctrl-C lets answers end and stops; a second one stops at once.

    \b
    Examples:
      finemoe serve runs/demo/arms/deepseek-moe/seed-0
      finemoe serve SmolLM2-135M-Instruct small=runs/tiny --port 9000
      finemoe serve A B C --on-demand --memory 8GB
      finemoe serve runs/tiny --limit max_new_tokens=512
    """
    from finemoe.cli.output import bytes_of, printable
    from finemoe.core.config import parse, with_overrides
    from finemoe.core.logs import console
    from finemoe.server import require
    from finemoe.server.models import Limits

    bounds = parse(Limits, with_overrides({}, limit or []), "--limit")
    require()
    from finemoe.server.models import Options
    from finemoe.server.run import LOOPBACK, key_from, named
    from finemoe.server.run import serve as run

    key = key_from(api_key_file)
    if host not in (LOOPBACK, "::1", "localhost") and key is None:
        console().print(
            f"warning: everybody who reaches {host} can use this server: give it a key (--api-key-file)", style="yellow"
        )
    sizes = bytes_of(cache_size, "--cache-size"), bytes_of(memory, "--memory")
    options = Options(weights, *sizes, bounds, weights_below)
    models = named(sources)

    def ready(address: str) -> None:
        console().print(f"page     {address}/")
        console().print(f"API      {address}/v1, models: {', '.join(printable(name) for name in models)}")
        console().print("stop     Ctrl-C")

    run(*sources, options=options, host=host, port=port, key=key, load=not on_demand, ready=ready)
