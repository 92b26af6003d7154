#!/usr/bin/env bash
# The stages on a model with true zeros: relufy → profile → train → plan → convert → eval → run, each command shown
# before it runs. Usage: relu_demo.sh MODEL     (DEMO_SHORT=1 reads only a small piece of the texts)
set -euo pipefail

source=$1
stem=${source%.gguf}.relu
model=$stem.gguf
corpus=powerinfer_tools/data/corpus
held_out="$corpus/newton-opticks-queries.txt"
if [[ ${DEMO_SHORT:-0} == 1 ]]; then
    profile_tokens=8192 records=4096 chunks=2 answer=16
else
    profile_tokens=60000 records=4096 chunks=8 answer=96
fi

step() {
    printf '\n\033[1m%s\033[0m\n' "$1"
}
show() {
    printf '$ %s\n' "${*@Q}" | sed "s/'\([A-Za-z0-9_.\/,:=+-]*\)'/\1/g"
    "$@"
}

# Made by demo.sh, too; measured once.
export POWERINFER_HARDWARE="${source%/*}/hardware.toml"
printf '$ export POWERINFER_HARDWARE=%s\n' "$POWERINFER_HARDWARE"
[[ -f $POWERINFER_HARDWARE ]] || show powerinfer doctor --measure

step "1. A model with true zeros: the demo model with the FFN weights that relufy learned, bit for bit."
show powerinfer relufy -m "$source" --delta deltas/smollm2-135m-relu.delta.zst

step "2. Which neurons does it use? Count them, and sample what its FFNs read."
show powerinfer profile -m "$model" --tokens "$profile_tokens" --trace "$records" \
    --corpus "$corpus/alice-in-wonderland.txt" "$corpus/us-constitution.txt" \
    "$corpus/us-declaration-of-independence.txt"
show powerinfer inspect "$stem.profile.safetensors" --chart "$stem.curve.svg"

step "3. Predictors of which neurons will be active, before the gate is read."
show powerinfer train -m "$model" --recall 0.95 --chart "$stem.frontier.svg"

step "4. What goes where, if the accelerator had room for 30 % of the FFN (61.4 MB), beside scratch?"
show powerinfer plan -m "$model" --hardware pc-low --vram 30MiB --ctx 2048

step "5. Write the split file."
show powerinfer convert -m "$model"

step "6. What does each mode change? A text that neither relufy nor profile has seen."
show powerinfer eval -m "$stem.powerinfer.gguf" --text "$held_out" --chunks "$chunks" \
    --compare dense,gate-first,predicted

step "7. Run it in each mode: dense and gate-first end with the same logits; predicted need not."
for mode in dense gate-first predicted; do
    show powerinfer run -v --raw -m "$stem.powerinfer.gguf" --mode "$mode" -p "The capital of France is" -n "$answer" --temp 0
done

step "8. What has it earned? Whole tokens of each mode against the original model, in turn."
show powerinfer bench "$source" "$stem.powerinfer.gguf@dense" "$stem.powerinfer.gguf@gate-first" \
    "$stem.powerinfer.gguf@predicted" -p 0 -n "$answer" -r 5

step "The next step is yours:  .venv/bin/powerinfer run -m $stem.powerinfer.gguf -i"
