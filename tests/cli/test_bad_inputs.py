"""Bad input: one clear line on standard error, the right exit code, no traceback."""

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from powerinfer_cli.app import create_app
from processes import Command, command_line, environment
from tiny_models import FAMILY_CASES, make_tiny_model

APP = create_app()
WRONG_USE = [
    ("run --json -i", "a chat has no JSON form"),
    ("run -p a -f b", "choose one of -p and -f"),
    ("run -p a --temp warm", "--temp"),
    ("run -p a --temp nan", "--temp"),
    ("run -p a --top-p 1.5", "--top-p"),
    ("run -p a -n -2", "--predict"),
    ("run -p a --threads 0", "--threads"),
    ("run -p a --vram 12x", "'12x' is not an amount of memory"),
    ("run -p a --device tpu", "--device"),
    ("run -p a --mode sparse", "--mode"),
    ("run -p a --reasoning maybe", "Invalid value for '--reasoning': 'maybe' is not one of 'show', 'hide'"),
    ("bench --shape smollm2-135m --mode predicted", "say with --density"),
    ("bench -m a --layers 2", "is for --shape"),
    ("bench -m a --type q8_0", "is for --shape and --ffn"),
    ("bench --ffn 64x64 --skew 1", "is for --shape"),
    ("bench --shape smollm2-135m --skew 1", "needs --density"),
    ("run -p a --no-such-option", "--no-such-option"),
    ("eval -m x", "--text"),
    ("bench --csv --json", "choose one of --csv and --json"),
    ("bench -r 0", "--repetitions"),
    ("bench -p 0 -n 0", "nothing to measure"),
    ("bench -m x --shape mistral-7b", "choose one of --model and --shape"),
    ("bench --shape mistral-7b --ffn 64x64", "choose one of --shape and --ffn"),
    ("bench --ffn 4096", "is not WIDTHxNEURONS"),
    ("bench --ffn 64x0", "is not WIDTHxNEURONS"),
    ("bench --ffn 64x64 --density 0.1,2", "--density"),
    ("bench --ffn 64x64 --type q9_k", "'q9_k' is not one of"),
    ("bench --shape mistral-7b --density 0.1,0.5", "one share"),
    ("bench --density 0.1", "is for --shape and --ffn"),
    ("bench --keep x.gguf", "is for --shape"),
    ("plan --objective beauty", "--objective"),
    ("plan --vram -1GiB", "-1GiB"),
    ("profile", "name at least one text file"),
    ("profile --corpus a --density 0", "--density"),
    ("profile merge -o out", "FILE"),
    ("relufy", "name at least one text file"),
    ("relufy --corpus a --density 0", "--density"),
    ("relufy --corpus a --activation silu", "--activation"),
    ("relufy --corpus a --rank -1", "--rank"),
    ("convert --quant Q3_K", "--quant"),
    ("quantize --type Q3_K", "--type"),
    ("inspect", "FILE"),
    ("trian", "No such command 'trian'"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG_USE, ids=[case[0] for case in WRONG_USE])
def test_wrong_usage_is_2(arguments: str, said: str) -> None:
    ended = CliRunner().invoke(APP, arguments.split())
    assert ended.exit_code == 2
    assert ended.stdout == ""
    assert said in ended.stderr


MODELS: dict[str, bytes | None] = {
    "gone.gguf": None,
    "empty.gguf": b"",
    "text.gguf": b"This is not a model.\n" * 100,
    "magic.gguf": b"GGUF",
    "zeros.gguf": b"GGUF\x03\x00\x00\x00" + bytes(1000),
    "big-endian.gguf": b"GGUF\x00\x00\x00\x03" + bytes(100),
}


@pytest.fixture
def bad_model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A file that is no usable model."""
    path = tmp_path / request.param
    content = MODELS[request.param]
    if content is not None:
        path.write_bytes(content)
    return path


def one_line(ended_err: str) -> str:
    lines = ended_err.splitlines()
    assert len(lines) == 1, ended_err
    assert lines[0].startswith("powerinfer: ")
    assert "internal error" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("command", "bad_model"),
    [("run -p Hello -m", name) for name in MODELS]
    + [(command, "magic.gguf") for command in ("bench -m", "inspect", "eval --text corpus.txt -m")],
    indirect=["bad_model"],
)
def test_a_file_that_is_no_model_is_1(
    powerinfer: Command, command: str, bad_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "corpus.txt").write_text("Some text.")
    ended = powerinfer(*command.split(), bad_model, cwd=tmp_path)
    assert (ended.code, ended.out) == (1, "")
    assert bad_model.name in one_line(ended.err)


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.5, 0.999])
def test_a_truncated_model_is_1(powerinfer: Command, smollm2: Path, tmp_path: Path, share: float) -> None:
    whole = smollm2.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    ended = powerinfer("run", "-m", path, "-p", "Hello", "-n", "1")
    assert (ended.code, ended.out) == (1, "")
    assert "cut.gguf" in one_line(ended.err)


def test_a_truncated_model_is_not_described(powerinfer: Command, smollm2: Path, tmp_path: Path) -> None:
    """Beyond its error, as what its header says is not what is there; but for programs (--json)."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(smollm2.read_bytes()[:2_000_000])
    ended = powerinfer("inspect", path)
    assert (ended.code, ended.out) == (1, "")
    assert "the file is incomplete: fetch or copy it again" in one_line(ended.err)


def test_a_directory_is_no_model(powerinfer: Command, tmp_path: Path) -> None:
    ended = powerinfer("run", "-m", tmp_path, "-p", "Hello")
    assert ended.code == 1
    assert "is a directory without config.json" in one_line(ended.err)


def test_no_model_anywhere_says_how_to_name_one(powerinfer: Command, tmp_path: Path) -> None:
    ended = powerinfer("run", "-p", "Hello", cwd=tmp_path, HOME=str(tmp_path), XDG_DATA_HOME=str(tmp_path))
    assert ended.code == 1
    assert "-m FILE or $POWERINFER_MODEL" in one_line(ended.err)


def test_an_empty_message_has_no_answer(powerinfer: Command, smollm2: Path) -> None:
    ended = powerinfer("run", "-m", smollm2, "-p", " ", "-n", "1")
    assert (ended.code, ended.out) == (1, "")
    assert "the message is empty" in one_line(ended.err)


MISSING_INPUTS = [
    ("convert -m", "make it with: powerinfer plan"),
    ("plan --vram 40MiB -m", "make it with: powerinfer profile"),
]


@pytest.mark.parametrize(("command", "said"), MISSING_INPUTS, ids=[case[0] for case in MISSING_INPUTS])
def test_a_stage_without_its_input_names_the_command_that_makes_it(
    powerinfer: Command, smollm2: Path, tmp_path: Path, command: str, said: str
) -> None:
    (tmp_path / "model.gguf").symlink_to(smollm2)
    ended = powerinfer(*command.split(), "model.gguf", cwd=tmp_path)
    assert (ended.code, ended.out) == (1, "")
    assert said in one_line(ended.err)


@pytest.mark.parametrize("content", [None, ""])
def test_a_corpus_without_text_is_1(
    powerinfer: Command, smollm2: Path, tmp_path: Path, content: str | None
) -> None:
    (tmp_path / "model.gguf").symlink_to(smollm2)
    if content is not None:
        (tmp_path / "corpus.txt").write_text(content)
    ended = powerinfer("profile", "-m", "model.gguf", "--corpus", "corpus.txt", cwd=tmp_path)
    assert (ended.code, ended.out) == (1, "")
    one_line(ended.err)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_text_shorter_than_a_window_is_1(powerinfer: Command, smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    ended = powerinfer("eval", "-m", smollm2, "--text", tmp_path / "short.txt", "--ctx", "64")
    assert (ended.code, ended.out) == (1, "")
    assert "fewer than one window of 64" in one_line(ended.err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--repeat-penalty 5000", "repeat_penalty"),
        ("--ctx 1000000", "context"),
        ("-c 4", "do not fit"),
        ("--mode gate-first", "no exact zeros"),
        ("--mode predicted", "no exact zeros"),
        ("--stop=", "stop string is empty"),
    ],
)
def test_options_that_the_model_cannot_meet_are_1(
    powerinfer: Command, smollm2: Path, arguments: str, said: str
) -> None:
    ended = powerinfer(
        "run", "--raw", "-m", smollm2, "-p", "One two three four five six.", *arguments.split()
    )
    assert (ended.code, ended.out.strip()) == (1, "")
    assert said in one_line(ended.err)


@pytest.mark.parametrize(
    ("place", "said"), [("gone/trace.json", "No such file or directory"), (".", "it is a directory")]
)
def test_a_timeline_that_cannot_be_written_is_1_before_any_text(
    powerinfer: Command, smollm2: Path, tmp_path: Path, place: str, said: str
) -> None:
    ended = powerinfer("run", "-m", smollm2, "-p", "Hello", "-n", "3", "--trace", tmp_path / place)
    assert (ended.code, ended.out) == (1, "")
    assert said in one_line(ended.err)


def test_train_says_at_once_that_a_model_has_no_zeros(
    powerinfer: Command, smollm2: Path, tmp_path: Path
) -> None:
    """Not to profile it with a trace first, which profile would refuse."""
    (tmp_path / "model.gguf").symlink_to(smollm2)
    ended = powerinfer("train", "-m", "model.gguf", cwd=tmp_path)
    assert (ended.code, ended.out) == (1, "")
    said = one_line(ended.err)
    for part in ("silu has no exact zeros", "powerinfer threshold", "powerinfer relufy"):
        assert part in said
    assert "--trace" not in said


@pytest.mark.parametrize("stage", ["train", "relufy"])
@pytest.mark.parametrize(
    ("chart", "said"),
    [("chart.gif", "written as .png or .svg, not .gif"), ("none/chart.svg", "there is no folder")],
)
def test_a_chart_that_cannot_be_drawn_is_1_before_any_work(
    powerinfer: Command, tmp_path: Path, stage: str, chart: str, said: str
) -> None:
    model = make_tiny_model(tmp_path, FAMILY_CASES["llama-relu" if stage == "train" else "llama"])
    corpus = ("--corpus", model.path) if stage == "relufy" else ()
    trace = tmp_path / "t.trace.zst"
    trace.touch()
    given = (*corpus, "--trace", trace) if stage == "train" else corpus
    ended = powerinfer(stage, "-m", model.path, *given, "--chart", tmp_path / chart)
    assert (ended.code, ended.out) == (1, "")
    assert said in one_line(ended.err)


def test_an_unknown_instruction_set_names_the_known(powerinfer: Command, smollm2: Path) -> None:
    ended = powerinfer("run", "-m", smollm2, "-p", "Hello", POWERINFER_ISA="mmx")
    assert ended.code == 1
    assert "scalar" in one_line(ended.err)


def test_debug_shows_where(tmp_path: Path) -> None:
    command = command_line("run", "-m", tmp_path, "-p", "x", "--debug")
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("powerinfer: ")
