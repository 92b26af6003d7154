"""profile → plan → convert → run on the demo model, as processes, by the interfaces that scripts rely on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from processes import Command, modules_loaded_by

TEXT = "The river was wide and slow, and the boats went down it with the evening. " * 40
PROMPT = "The capital of France is"
RUN_KEYS = {
    "text",
    "tokens",
    "prompt_tokens",
    "prompt_tokens_per_second",
    "decode_tokens_per_second",
    "bytes_per_token",
    "bandwidth_share",
    "density",
    "mode",
    "logits_hash",
    "timings",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A folder with the model and two texts."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "model.gguf").symlink_to(smollm2)
    (folder / "one.txt").write_text(TEXT)
    (folder / "two.txt").write_text("Some other words, " * 100)
    return folder


@pytest.fixture(scope="module")
def profile(powerinfer: Command, folder: Path) -> dict[str, Any]:
    """The summary of a profile of both texts."""
    ended = powerinfer("profile", "-m", "model.gguf", "--corpus", "one.txt", "two.txt", "--json", cwd=folder)
    assert ended.code == 0, ended.err
    return dict(ended.json)


@pytest.fixture(scope="module")
def plan(powerinfer: Command, folder: Path, profile: dict[str, Any]) -> dict[str, Any]:
    """A plan for the paper's smaller machine with room for a part of the neurons."""
    del profile
    ended = powerinfer(
        "plan",
        "-m",
        "model.gguf",
        "--vram",
        "72MiB",
        "--hardware",
        "pc-low",
        "--ctx",
        "1024",
        "--json",
        cwd=folder,
    )
    assert ended.code == 0, ended.err
    return dict(ended.json)


@pytest.fixture(scope="module")
def split(powerinfer: Command, folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The report of the conversion."""
    del plan
    ended = powerinfer("convert", "-m", "model.gguf", "--json", cwd=folder)
    assert ended.code == 0, ended.err
    return dict(ended.json)


@pytest.fixture
def answer(powerinfer: Command, folder: Path) -> Callable[..., dict[str, Any]]:
    """Runs a model greedily and gives the JSON object."""

    def run(*arguments: str, model: str = "model.gguf", **variables: str) -> dict[str, Any]:
        words = ["run", "--raw", "-m", model, "--temp", "0", "-n", "12", "--json", *arguments]
        if "-f" not in arguments and "-p" not in arguments:
            words += ["-p", PROMPT]
        ended = powerinfer(*words, cwd=folder, **variables)
        assert ended.code == 0, ended.err
        return dict(ended.json)

    return run


def test_profile_is_beside_the_model_and_summarised(folder: Path, profile: dict[str, Any]) -> None:
    assert profile["path"] == "model.profile.safetensors"
    assert (folder / "model.profile.safetensors").is_file()
    assert profile["tokens"] == sum(entry["tokens"] for entry in profile["corpus"])
    assert [entry["name"] for entry in profile["corpus"]] == ["one.txt", "two.txt"]
    assert len(profile["layers"]) == 30
    assert 0 < profile["density"] < 1


def test_shards_merge_into_the_profile_of_the_whole(
    powerinfer: Command, folder: Path, profile: dict[str, Any]
) -> None:
    del profile
    for name in ("one", "two"):
        made = powerinfer(
            "profile", "-m", "model.gguf", "--corpus", f"{name}.txt", "-o", f"{name}.st", cwd=folder
        )
        assert made.code == 0, made.err
    merged = powerinfer("profile", "merge", "two.st", "one.st", "-o", "merged.st", "--json", cwd=folder)
    assert merged.code == 0, merged.err
    assert (folder / "merged.st").read_bytes() == (folder / "model.profile.safetensors").read_bytes()


def test_a_corpus_cannot_be_merged_twice(powerinfer: Command, folder: Path, profile: dict[str, Any]) -> None:
    del profile
    name = "model.profile.safetensors"
    ended = powerinfer("profile", "merge", name, name, "-o", "twice.st", cwd=folder)
    assert ended.code == 1
    assert "would count twice" in ended.last_line
    assert not (folder / "twice.st").exists()


def test_plan_prints_its_file(powerinfer: Command, folder: Path, plan: dict[str, Any]) -> None:
    import json

    assert plan == json.loads((folder / "model.plan.json").read_text())
    assert plan["memory"]["vram_used"] <= 72 * 2**20
    assert any(layer["hot_neurons"] for layer in plan["layers"])
    again = powerinfer(
        "plan", "-m", "model.gguf", "--vram", "72MiB", "--hardware", "pc-low", "--ctx", "1024",
        "-o", "again.json", cwd=folder,
    )  # fmt: skip
    assert again.code == 0, again.err
    assert (folder / "again.json").read_bytes() == (folder / "model.plan.json").read_bytes()


def test_convert_reports_what_it_cost(folder: Path, split: dict[str, Any], plan: dict[str, Any]) -> None:
    assert split["nbytes"] == (folder / "model.powerinfer.gguf").stat().st_size
    assert split["hot_neurons"] == [layer["hot_neurons"] for layer in plan["layers"]]
    assert split["down_type"] == "Q8_0"
    assert 0 < split["mean_requantization_error"] < 0.01


def test_run_has_the_promised_keys(answer: Callable[..., dict[str, Any]]) -> None:
    shown = answer()
    assert not RUN_KEYS - set(shown)
    assert shown["tokens"] == len(shown["ids"]) == 12
    assert shown["mode"] == "dense"
    assert shown["density"] == 1.0
    assert shown["text"].startswith(" Paris")
    assert shown["decode_tokens_per_second"] > 0


def test_the_split_file_gives_the_same_bits_anywhere(
    answer: Callable[..., dict[str, Any]], split: dict[str, Any]
) -> None:
    del split
    model = "model.powerinfer.gguf"
    first = answer(model=model)
    for options in (["--threads", "1"], ["--threads", "3"], ["--mode", "dense"]):
        other = answer(*options, model=model)
        assert (other["ids"], other["logits_hash"]) == (first["ids"], first["logits_hash"]), options


def test_the_split_file_runs_with_its_hot_side_in_torch(
    answer: Callable[..., dict[str, Any]], split: dict[str, Any]
) -> None:
    del split
    vram = []
    for options in (["--device", "cpu"], ["--device", "cpu", "--vram", "4MiB"]):
        shown = answer(*options, model="model.powerinfer.gguf")
        assert shown["device"] == "cpu"
        # Sums in torch's order: equal within float tolerance (tested on logits), not to the bit where the two
        # likeliest tokens are nearly as likely. These tokens are far from that.
        assert shown["text"].startswith(" Paris.\n\nThe"), options
        vram.append(shown["memory"]["vram"])
    assert vram[1] < vram[0] <= 72 * 2**20


def test_a_seed_repeats_a_run(powerinfer: Command, folder: Path) -> None:
    words = ["run", "--raw", "-m", "model.gguf", "-p", PROMPT, "-n", "8", "--temp", "1.5", "--json", "--seed"]
    texts = [powerinfer(*words, seed, cwd=folder).json["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_may_come_from_a_file_or_standard_input(
    powerinfer: Command, folder: Path, answer: Callable[..., dict[str, Any]]
) -> None:
    (folder / "prompt.txt").write_text(PROMPT)
    expected = answer()["ids"]
    assert answer("-f", "prompt.txt")["ids"] == expected
    words = ["run", "--raw", "-m", "model.gguf", "--temp", "0", "-n", "12", "--json"]
    assert powerinfer(*words, stdin=PROMPT, cwd=folder).json["ids"] == expected
    assert powerinfer(*words, "-f", "-", stdin=PROMPT, cwd=folder).json["ids"] == expected


def test_text_streams_to_standard_output_and_the_summary_elsewhere(powerinfer: Command, folder: Path) -> None:
    words = ("run", "--raw", "-m", "model.gguf", "-p", PROMPT, "-n", "4", "--temp", "0")
    short, quiet, ended = (powerinfer(*words, *more, cwd=folder) for more in ((), ("-q",), ("-v",)))
    assert [run.code for run in (short, quiet, ended)] == [0, 0, 0]
    assert short.out == quiet.out == ended.out
    assert ended.out.startswith(" Paris")
    assert quiet.err == ""
    assert len(short.err.splitlines()) == 1
    assert "decode: 4 tokens at" in short.err
    for part in ("prompt: 5 tokens", "decode:", "GB/s measured", "density 1.000", "logits #"):
        assert part in ended.err


def test_a_stop_string_ends_the_text_before_it(answer: Callable[..., dict[str, Any]]) -> None:
    shown = answer("--stop", "\n", "-n", "200")
    assert shown["outcome"] == "stop"
    assert "\n" not in shown["text"]


def test_chat_reads_questions_from_a_pipe(powerinfer: Command, folder: Path) -> None:
    ended = powerinfer(
        "run", "-m", "model.gguf", "-i", "-n", "8", "--temp", "0", "-sys", "Be brief.", cwd=folder,
        stdin="Hello!\n/regen\n/save chat.json\n/exit\nnot asked\n",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert len(ended.out.strip().splitlines()) >= 2
    assert "wrote chat.json" in ended.err
    assert "not asked" not in (folder / "chat.json").read_text()


def test_run_on_the_cpu_loads_no_torch(folder: Path) -> None:
    modules = modules_loaded_by("run", "-m", folder / "model.gguf", "-p", "Hello", "-n", "1")
    assert "powerinfer_kernels" in modules
    assert not modules & {"torch", "transformers", "highspy", "matplotlib", "safetensors"}


def test_eval_has_the_promised_keys(powerinfer: Command, folder: Path) -> None:
    words = ["eval", "-m", "model.gguf", "--text", "one.txt", "--ctx", "128", "--chunks", "2", "--json"]
    ended = powerinfer(*words, cwd=folder)
    assert ended.code == 0, ended.err
    shown = ended.json
    assert (shown["chunks"], shown["tokens"]) == (2, 2 * (128 - 1 - 64))
    assert 1 < shown["perplexity"] < 100


def test_eval_against_the_source_measures_the_divergence(
    powerinfer: Command, folder: Path, split: dict[str, Any]
) -> None:
    del split
    ended = powerinfer(
        "eval", "-m", "model.powerinfer.gguf", "--against", "model.gguf", "--text", "one.txt", "--ctx", "128",
        "--chunks", "1", "--json", cwd=folder,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    divergence = ended.json["divergence"]
    assert 0 <= divergence["mean_kl"] < 0.01
    assert divergence["same_top"] > 0.9


def test_bench_rows(powerinfer: Command, folder: Path) -> None:
    ended = powerinfer("bench", "-m", "model.gguf", "-p", "32", "-n", "8", "-r", "2", "--json", cwd=folder)
    assert ended.code == 0, ended.err
    rows = ended.json
    assert [row["test"] for row in rows] == ["pp32", "tg8"]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["stddev"] >= 0
        assert row["bandwidth_share"] > 0


@pytest.mark.parametrize(("left_out", "expected"), [("-p", ["tg8"]), ("-n", ["pp8"])])
def test_bench_leaves_rows_of_zero_tokens_out(
    powerinfer: Command, folder: Path, left_out: str, expected: list[str]
) -> None:
    sizes = {"-p": "8", "-n": "8"} | {left_out: "0"}
    words = [word for pair in sizes.items() for word in pair]
    ended = powerinfer("bench", "-m", "model.gguf", "-r", "1", *words, "--csv", cwd=folder)
    assert ended.code == 0, ended.err
    heading, *rows = ended.out.splitlines()
    assert heading.startswith("test,")
    assert [row.split(",")[0] for row in rows] == expected


def test_inspect_knows_every_file_of_the_pipeline(
    powerinfer: Command, folder: Path, split: dict[str, Any]
) -> None:
    del split
    kinds = {
        "model.gguf": "model",
        "model.profile.safetensors": "profile",
        "model.plan.json": "plan",
        "model.powerinfer.gguf": "split file",
    }
    for name, kind in kinds.items():
        ended = powerinfer("inspect", name, "--json", cwd=folder)
        assert ended.code == 0, ended.err
        assert ended.json["kind"] == kind
        assert powerinfer("inspect", name, cwd=folder).code == 0


def test_inspect_tokenizes(powerinfer: Command, folder: Path) -> None:
    expected = [19556, 28, 905, 17]
    assert powerinfer("inspect", "model.gguf", "--tokenize", "Hello, world!", "--json", cwd=folder).json == {
        "ids": expected
    }
    piped = powerinfer("inspect", "model.gguf", "--tokenize", "-", stdin="Hello, world!", cwd=folder)
    assert piped.out.split() == [str(token) for token in expected]


def test_inspect_draws_the_curve(powerinfer: Command, folder: Path, profile: dict[str, Any]) -> None:
    del profile
    ended = powerinfer("inspect", "model.profile.safetensors", "--chart", "curve.svg", cwd=folder)
    assert ended.code == 0, ended.err
    assert "share of neurons, busiest first" in ended.out
    assert (folder / "curve.svg").read_text().startswith("<?xml")


def test_a_prompt_is_a_message_where_the_model_has_a_template(
    powerinfer: Command, answer: Callable[..., dict[str, Any]], folder: Path
) -> None:
    words = ("run", "-m", "model.gguf", "-p", PROMPT, "-n", "12", "--temp", "0", "--json")
    default, asked, raw = (
        powerinfer(*words, *more, cwd=folder).json for more in ((), ("--chat",), ("--raw",))
    )
    assert default["ids"] == asked["ids"] != raw["ids"]
    # A prompt with control tokens of its own is no message: here there are none, so it is the raw one.
    assert powerinfer(*words, "--special", cwd=folder).json["ids"] == raw["ids"]
    assert default["prompt_tokens"] > raw["prompt_tokens"] == answer()["prompt_tokens"]


def test_bench_compares_files_and_modes_in_turn(
    powerinfer: Command, folder: Path, split: dict[str, Any]
) -> None:
    del split
    files = ("model.gguf", "model.powerinfer.gguf@dense")
    rows = powerinfer("bench", *files, "-p", "4", "-n", "2", "-r", "3", "--json", cwd=folder).json
    assert [(row["test"], row["name"]) for row in rows] == [
        (test, name) for test in ("pp4", "tg2") for name in files
    ]
    assert all(row["ratio"] == 1.0 for row in rows[::2])
    assert all(row["least_ratio"] <= row["ratio"] <= row["largest_ratio"] for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bench", "model.gguf@fast", "model.gguf"), "'fast' is not a mode"),
        (("bench", "model.gguf", "model.gguf", "--csv"), "choose --json"),
        (("bench", "model.gguf", "-m", "model.gguf"), "choose one of FILE and --model"),
        (("bench", "model.gguf", "nothing.gguf"), "no such file"),
        (("run", "--raw", "-i", "-m", "model.gguf"), "choose one of them"),
        (("run", "-v", "-q", "-p", "x", "-m", "model.gguf"), "choose one of -v and -q"),
    ],
)
def test_contradictions_are_said(
    powerinfer: Command, folder: Path, words: tuple[str, ...], said: str
) -> None:
    ended = powerinfer(*words, cwd=folder)
    assert ended.code in (1, 2)
    assert said in " ".join(ended.err.split())
