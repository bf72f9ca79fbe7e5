"""/openapi.json is true: what it allows is answered as it says, and what it forbids is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.conftest import Live


def test_every_path_is_described(live: Live) -> None:
    found = live.client.get("/openapi.json").json()
    assert set(found["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/models/{model}/experts",
        "/update_weights_from_disk",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/metrics",
    }
    for methods in found["paths"].values():
        for operation in methods.values():
            assert operation["summary"] or operation["description"]
            assert {"400", "401", "404", "413", "429", "500", "503"} <= operation["responses"].keys()
            assert "422" not in operation["responses"]  # FastAPI's own, which never comes


@pytest.mark.parametrize(
    ("path", "examples"),
    [
        ("completions", 2),  # each of which is answered by a model
        ("embeddings|models|tokenize|health|ready|metrics", 15),
        pytest.param("completions", 15, marks=pytest.mark.slow),
    ],
)
def test_schemathesis_finds_nothing(live: Live, path: str, examples: int) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{live.address}/openapi.json",
        "--max-examples",
        str(examples),
    ]
    command += ["--include-path-regex", path, "--seed", "1", "--no-color", "--request-timeout", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
