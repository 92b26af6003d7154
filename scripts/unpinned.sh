#!/usr/bin/env bash
# What a user gets who installs without our pins: the newest version of every dependency that pyproject.toml allows.
# Each stage runs with --json, and each output has to be one JSON document. Usage: unpinned.sh MODEL
set -euo pipefail

model=$(realpath "$1")
folder=build/unpinned
rm -rf "$folder"
mkdir -p "$folder"
"${PYTHON:-python3}" -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet .
$pip list

ln -s "$model" "$folder/model.gguf"
cp powerinfer_tools/data/corpus/us-constitution.txt "$folder/text.txt"
cd "$folder"
# Nothing but JSON may reach standard output, from whichever library.
stage() {
    printf '$ powerinfer %s --json\n' "$*"
    venv/bin/powerinfer "$@" --json >"$1.json" 2>"$1.log" || { cat "$1.log" >&2; exit 1; }
    venv/bin/python -m json.tool "$1.json" >/dev/null || { head -c 2000 "$1.json" >&2; exit 1; }
}
export POWERINFER_HARDWARE=$PWD/hardware.toml
stage doctor --measure
stage profile -m model.gguf --corpus text.txt --tokens 2048
stage plan -m model.gguf --hardware pc-low --vram 40MiB --ctx 512
stage convert -m model.gguf
stage run -m model.powerinfer.gguf -p "The capital of France is" -n 8 --temp 0
stage eval -m model.powerinfer.gguf --text text.txt --chunks 1
stage bench -m model.powerinfer.gguf -p 32 -n 8 -r 1
stage inspect model.powerinfer.gguf
printf 'every stage wrote one JSON document, with the newest packages\n'
