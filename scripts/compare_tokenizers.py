"""Compares token ids with those of llama.cpp's llama-tokenize, for a text that is hard to cut into words.

``compare_tokenizers.py LLAMA_TOKENIZE VOCABULARY.gguf …`` compares each vocabulary. With ``--every-pre`` the
first one, which has to be byte-level BPE, is read under every supported name of ``tokenizer.ggml.pre``.
Exit status 1 where ids differ. The text is that of tests/data/golden/pre_tokenizers.json.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in (".", "formats", "kernels")]

from powerinfer_formats.gguf_layout import ValueType  # noqa: E402
from powerinfer_formats.gguf_shards import open_gguf  # noqa: E402
from powerinfer_tools.errors import TokenizerError  # noqa: E402
from powerinfer_tools.text import Tokenizer  # noqa: E402
from powerinfer_tools.text.pretokenizers import pre_tokenizer, supported_names  # noqa: E402

GOLDEN = ROOT / "tests/data/golden/pre_tokenizers.json"
PRE = "tokenizer.ggml.pre"
#: Names that are ours alone.
OWN = ("gpt2",)


def main() -> int:
    """Compare, and print a line for each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("vocabularies", type=Path, nargs="+")
    parser.add_argument("--every-pre", action="store_true")
    options = parser.parse_args()
    text = json.loads(GOLDEN.read_text(encoding="utf-8"))["text"]
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "text.txt"
        given.write_bytes(text.encode())
        if options.every_pre:
            names = [name for name in supported_names() if name not in OWN and not pre_tokenizer(name).raw]
            files = ((name, renamed(options.vocabularies[0], name, Path(folder))) for name in names)
        else:
            files = ((path.name, path) for path in options.vocabularies)
        same = [agrees(options.program, name, path, text, given) for name, path in files]
        return int(not all(same))


def agrees(program: Path, name: str, path: Path, text: str, given: Path) -> bool:
    """Whether the ids are the same; says so."""
    with open_gguf(path) as gguf:
        try:
            ours = Tokenizer.from_gguf(gguf).encode(text, add_bos=False)
        except TokenizerError as error:
            print(f"{name:40} refused: {str(error)[:120]}")
            return True
    words = (
        "-m",
        path,
        "-f",
        given,
        "--ids",
        "--no-bos",
        "--no-parse-special",
        "--no-escape",
        "--log-disable",
    )
    ended = subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=True)
    theirs = json.loads(ended.stdout.strip().splitlines()[-1])
    first = next(
        (index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None
    )
    same = ours == theirs
    print(f"{name:40} {f'{len(ours)} ids, the same' if same else f'DIFFERS at id {first}'}")
    return same


def renamed(vocabulary: Path, pre: str, folder: Path) -> Path:
    """A copy whose pre-tokeniser is called ``pre``."""
    with open_gguf(vocabulary) as gguf:
        entries = [data for entry, data in gguf.metadata_bytes() if entry.key != PRE]
    entries.append(string(PRE) + struct.pack("<I", ValueType.STRING) + string(pre))
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)
    path = folder / "renamed.gguf"
    path.write_bytes(data + bytes(-len(data) % 32))
    return path


def string(text: str) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


if __name__ == "__main__":
    sys.exit(main())
