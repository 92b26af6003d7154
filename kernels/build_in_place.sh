#!/bin/sh
# Builds the C extension beside its Python face, for running from the source tree. Only what changed is compiled.
# Usage: kernels/build_in_place.sh [cmake options]      PYTHON=... chooses the interpreter (default: .venv's)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
build="$root/build/kernels"
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
PATH="$(dirname "$python"):$PATH"
mkdir -p "$build"

if command -v flock >/dev/null 2>&1; then # two builds at once would write the same files
    exec 9>"$build/lock"
    flock 9
fi
if [ ! -f "$build/build.ninja" ] && [ ! -f "$build/Makefile" ] && command -v ninja >/dev/null 2>&1; then
    set -- -G Ninja "$@"
fi
cmake -S "$here" -B "$build" -DPython_EXECUTABLE="$python" "$@" >"$build/configure.log" 2>&1 || {
    cat "$build/configure.log" >&2
    exit 1
}
cmake --build "$build" --parallel
# Copied under another name and renamed, so that a process that has the old file loaded keeps it.
cp "$build/_kernels.abi3.so" "$here/powerinfer_kernels/_kernels.abi3.so.new"
mv "$here/powerinfer_kernels/_kernels.abi3.so.new" "$here/powerinfer_kernels/_kernels.abi3.so"
