"""Makes tests/data/sampling: what llama.cpp's samplers leave of given logits, in its order and in others.

    python scripts/llama_cpp_sampling.py PROGRAM

PROGRAM is scripts/llama_cpp_sampling.cpp, built against llama.cpp. Cases are drawn from a fixed seed, so that
the file changes only where llama.cpp does.
"""

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "sampling"
DEFAULT = "ekypmt"
VOCABULARY = 48
Case = dict[str, Any]


def drawn(rng: random.Random) -> Case:
    """Logits, tokens before, and options, most of them off in most cases."""
    spread = rng.choice((0.5, 2.0, 6.0))

    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.5 else off

    return {
        "logits": [round(rng.gauss(0, spread), 2) for _ in range(VOCABULARY)],
        "recent": [rng.randrange(VOCABULARY) for _ in range(rng.choice((0, 3, 40)))],
        "logit_bias": {
            rng.randrange(VOCABULARY): rng.choice((-math.inf, -2.5, 1.5, 100.0))
            for _ in range(rng.choice((0, 0, 1, 3)))
        },
        "repeat_last_n": rng.choice((0, 2, 64)),
        "repeat_penalty": maybe(rng.choice((0.8, 1.1, 1.7)), 1.0),
        "frequency_penalty": maybe(rng.choice((-0.4, 0.3, 1.1)), 0.0),
        "presence_penalty": maybe(rng.choice((-0.6, 0.2, 1.4)), 0.0),
        "top_k": rng.choice((-1, 0, 1, 5, 40)),
        "typical_p": maybe(rng.choice((0.3, 0.7, 0.95)), 1.0),
        "top_p": maybe(rng.choice((0.0, 0.4, 0.9)), 1.0),
        "min_p": maybe(rng.choice((0.02, 0.2, 0.7)), 0.0),
        "temperature": rng.choice((-1.0, 0.0, 1e-6, 0.1, 0.8, 1.0, 2.5)),
    }


def line(case: Case) -> str:
    """The case as the program reads it."""
    words: list[Any] = [VOCABULARY, len(case["logit_bias"])]
    for token, bias in case["logit_bias"].items():
        words += [token, bias]
    words += [
        case[name] for name in ("repeat_last_n", "repeat_penalty", "frequency_penalty", "presence_penalty")
    ]
    words += [len(case["recent"]), *case["recent"]]
    words += [case[name] for name in ("top_k", "typical_p", "top_p", "min_p", "temperature")]
    order = case.get("samplers", DEFAULT) or "-"
    return " ".join([*map(repr, words), order, *map(repr, case["logits"])])


def ordered(rng: random.Random) -> Case:
    """A case with all samplers in some order, or some of them, some twice. llama.cpp's typical-p makes NaN of
    a probability of 0, and no order of that: nothing is ruled out, and nothing is nearly so, where it is
    used."""
    case = drawn(rng)
    letters = rng.sample(DEFAULT, len(DEFAULT)) if rng.random() < 0.6 else rng.choices(DEFAULT, k=4)
    if "y" in letters and case["typical_p"] < 1:
        case["logit_bias"] = {token: bias for token, bias in case["logit_bias"].items() if abs(bias) < 9}
        case["temperature"] = max(case["temperature"], 0.8)
    return case | {"samplers": "".join(letters)}


def write(program: str, name: str, cases: list[Case]) -> None:
    """Ask for the figures of ``cases``, and write both."""
    text = "\n".join(line(case) for case in cases) + "\n"
    ended = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    for case, answer in zip(cases, ended.stdout.splitlines(), strict=True):
        words = answer.split()[1:]
        case["left"] = [[int(token), float(p)] for token, p in zip(words[::2], words[1::2], strict=True)]
        case["logit_bias"] = [[token, str(bias)] for token, bias in case["logit_bias"].items()]
    lines = ",\n".join(json.dumps(case) for case in cases)
    (FOLDER / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    rng = random.Random(1)  # noqa: S311
    write(sys.argv[1], "llama_cpp.json", [drawn(rng) for _ in range(64)])
    write(sys.argv[1], "llama_cpp_orders.json", [ordered(rng) for _ in range(96)])


if __name__ == "__main__":
    main()
