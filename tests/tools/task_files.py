"""Small task files of lm-eval in the formats of PIQA, Winogrande, RTE and COPA, with random questions."""

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("the", "a", "cat", "dog", "mat", "log", "sat", "ran", "on", "quick", "lazy", "fox", "river", "boat")
METRICS = "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
BODIES = {
    "piqa": 'doc_to_text: "Question: {{goal}}\\nAnswer:"\n'
    'doc_to_choice: "{{[sol1, sol2]}}"\ndoc_to_target: label\n'
    + METRICS
    + "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n",
    "winogrande": "doc_to_text: !function winogrande.answer\ndoc_to_choice: !function winogrande.contexts\n"
    "doc_to_target: !function winogrande.ending\n" + METRICS,
    "rte": 'doc_to_text: "{{premise}}\\nQuestion: {{hypothesis}} True or False?\\nAnswer:"\n'
    'doc_to_choice: ["True", "False"]\ndoc_to_target: label\n' + METRICS,
    "copa": 'doc_to_text: "{{premise}} because"\ndoc_to_choice: "{{[choice1, choice2]}}"\n'
    "doc_to_target: label\n" + METRICS,
}
WINOGRANDE = '''"""Winogrande: the gap of a sentence is filled with each option, and its end is scored."""


def answer(doc):
    return int(doc["answer"]) - 1


def contexts(doc):
    return [doc["sentence"].split("_")[0] + doc[name] for name in ("option1", "option2")]


def ending(doc):
    return doc["sentence"].split("_")[1].strip()
'''


def questions(name: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Documents as the data set of that name has them."""
    rng = np.random.default_rng([seed, sorted(BODIES).index(name)])

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(least, most))))

    documents: list[dict[str, Any]] = []
    for _ in range(count):
        label = int(rng.integers(2))
        match name:
            case "piqa":
                documents.append({"goal": text(3, 8), "sol1": text(1, 6), "sol2": text(1, 6), "label": label})
            case "winogrande":
                sentence = f"{text(2, 6)} _ {text(2, 5)}"
                options = {"option1": text(1, 2), "option2": text(1, 2)}
                documents.append({"sentence": sentence, **options, "answer": str(label + 1)})
            case "rte":
                documents.append({"premise": text(4, 9), "hypothesis": text(3, 6), "label": label})
            case _:
                choices = {"choice1": text(2, 6), "choice2": text(2, 6)}
                documents.append({"premise": text(3, 7), **choices, "label": label})
    return documents


def write_tasks(folder: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """Write a task file and its questions for each of the four; the questions by name."""
    (folder / "winogrande.py").write_text(WINOGRANDE)
    made = {name: questions(name, count) for name in BODIES}
    for name, documents in made.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{validation: {data}}}\n"
            f"validation_split: validation\noutput_type: multiple_choice\n{BODIES[name]}"
            "metadata: {version: 1.0}\n"
        )
    return made


def pairs(name: str, document: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """(context, continuation) of each choice, and which is right."""
    match name:
        case "piqa":
            context = f"Question: {document['goal']}\nAnswer:"
            return [(context, " " + document[key]) for key in ("sol1", "sol2")], document["label"]
        case "winogrande":
            before, after = document["sentence"].split("_")
            ends = [(before + document[key], " " + after.strip()) for key in ("option1", "option2")]
            return ends, int(document["answer"]) - 1
        case "rte":
            context = f"{document['premise']}\nQuestion: {document['hypothesis']} True or False?\nAnswer:"
            return [(context, " True"), (context, " False")], document["label"]
        case _:
            context = f"{document['premise']} because"
            return [(context, " " + document[key]) for key in ("choice1", "choice2")], document["label"]
