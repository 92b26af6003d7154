"""``powerinfer serve`` as a process: what it says, how it ends, and text that keeps to a form."""

import json
import re
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from processes import Command, command_line, environment
from tiny_models import TinyModel, TinySpec, make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), TinySpec(context=8192))


def test_a_server_says_where_it_listens_and_ends_in_order(tiny: TinyModel, tmp_path: Path) -> None:
    """A request that is under way when SIGTERM comes is answered; then the process ends with 0."""
    command = command_line("serve", "-m", tiny.path, "--port", "0", "-t", "1", "-c", "8192", "--json")
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    match = re.match(r"listening on (http://127\.0\.0\.1:\d+), loading ", process.stderr.readline())
    assert match is not None
    url = match[1]
    for line in process.stderr:
        if line.startswith("ready: "):
            break
    body = json.dumps({"prompt": "the road", "max_tokens": 300, "ignore_eos": True, "stream": True})
    request = urllib.request.Request(f"{url}/v1/completions", body.encode())
    with urllib.request.urlopen(request, timeout=60) as stream:
        first = stream.readline()
        process.send_signal(signal.SIGTERM)
        rest = stream.read()
    _, err = process.communicate(timeout=60)
    log.close()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert first.startswith(b"data: {")
    assert rest.endswith(b"data: [DONE]\n\n")
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (entry,) = [entry for entry in logged if entry["path"] == "/v1/completions"]
    assert (entry["status"], entry["completion_tokens"]) == (200, 300)


def test_what_cannot_be_served_is_one_line(powerinfer: Command, tiny: TinyModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    ended = powerinfer("serve", "-m", broken, "--port", "0")
    assert ended.code == 1
    assert ended.last_line.startswith("powerinfer: ")
    key = powerinfer("serve", "-m", tiny.path, "--tls-cert", tiny.path)
    assert key.code == 2
    assert "--tls-key" in key.err


def test_text_that_keeps_to_a_form(powerinfer: Command, tiny: TinyModel, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text('{"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}')
    grammar.write_text('root ::= "left" | "right"')
    run = ("run", "-m", tiny.path, "-p", "x", "-t", "1", "--seed", "3")
    assert json.loads(powerinfer(*run, "--json-schema", schema, "-n", "400").out)["n"] in (1, 22)
    assert powerinfer(*run, "--grammar", grammar).out.strip() in ("left", "right")
    both = powerinfer(*run, "--grammar", grammar, "--json-schema", schema)
    assert (both.code, "choose one of" in both.err) == (2, True)
    schema.write_text('{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}')
    nothing = powerinfer(*run, "--json-schema", schema)
    assert nothing.last_line.endswith("the grammar cannot be followed: it allows no token here, and no end")
    schema.write_text('{"type": "nothing"}')
    assert "is not valid" in powerinfer(*run, "--json-schema", schema).last_line
