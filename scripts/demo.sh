#!/usr/bin/env bash
# profile → plan → convert → run on a real model: the commands that a user would type, each shown before it runs.
# Usage: demo.sh MODEL     (DEMO_SHORT=1 profiles and scores only a small piece of the text)
set -euo pipefail

model=$1
stem=${model%.gguf}
corpus=powerinfer_tools/data/corpus
held_out="$corpus/newton-opticks-queries.txt"
if [[ ${DEMO_SHORT:-0} == 1 ]]; then
    profile_tokens=4096 chunks=2 answer=32
else
    profile_tokens=60000 chunks=8 answer=96
fi

step() {
    printf '\n\033[1m%s\033[0m\n' "$1"
}
show() {
    printf '$ %s\n' "${*@Q}" | sed "s/'\([A-Za-z0-9_.\/,:=+-]*\)'/\1/g"
    "$@"
}

step "1. What is this machine?"
export POWERINFER_HARDWARE="${model%/*}/hardware.toml"
printf '$ export POWERINFER_HARDWARE=%s\n' "$POWERINFER_HARDWARE"
show powerinfer doctor --measure

step "2. Which neurons does the model use? Read public-domain texts and count."
show powerinfer profile -m "$model" --tokens "$profile_tokens" \
    --corpus "$corpus/alice-in-wonderland.txt" "$corpus/us-constitution.txt" \
    "$corpus/us-declaration-of-independence.txt"
show powerinfer inspect "$stem.profile.safetensors"

step "3. What goes where, on a machine whose accelerator has only 40 MiB?"
show powerinfer plan -m "$model" --hardware pc-low --vram 40MiB --ctx 2048

step "4. Write the split file."
show powerinfer convert -m "$model"

step "5. Is it still the same model? Perplexity of a text that the profile has not seen, and divergence from the source."
show powerinfer eval -m "$stem.powerinfer.gguf" --against "$model" --text "$held_out" --chunks "$chunks"

step "6. Run it: the source, then the split file."
show powerinfer run -v --raw -m "$model" -p "The capital of France is" -n "$answer" --temp 0
show powerinfer run -v --raw -m "$stem.powerinfer.gguf" -p "The capital of France is" -n "$answer" --temp 0

step "7. Is it worth it here?"
show powerinfer advise -m "$model"

step "The next step is yours:  .venv/bin/powerinfer run -i"
