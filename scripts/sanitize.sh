#!/usr/bin/env bash
# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, and the thread pool and units on disk under
# ThreadSanitizer.
# Needs GCC (its sanitizers are loaded before Python). SANITIZE_TESTS chooses the tests, SANITIZE_ISAS the instruction
# sets ("scalar;avx2").
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/sanitize
mkdir -p "$build"
: "${CC:=gcc}"
read -ra tests <<<"${SANITIZE_TESTS:-tests/kernels}"

tsan() {  # tsan NAME SOURCES…: builds and runs tests/kernels/sanitize/NAME.c with sources of the kernels
    local name=$1
    shift
    "$CC" -std=c11 -D_GNU_SOURCE -g -O1 -fsanitize=thread -Wall -Wextra -Werror -I kernels/csrc \
        "tests/kernels/sanitize/$name.c" "${@/#/kernels/csrc/}" -o "$build/$name" -pthread -lm
    TSAN_OPTIONS=halt_on_error=1 "$build/$name"
}
echo "-- thread pool and units on disk, ThreadSanitizer"
tsan pool_threads pool.c
tsan unit_threads units.c unit_readers.c disk_read.c memory.c quantize_pack.c transcode.c

echo "-- kernels, AddressSanitizer and UndefinedBehaviorSanitizer"
PATH="$PWD/.venv/bin:$PATH" cmake -S kernels -B "$build/cmake" -G Ninja -DCMAKE_BUILD_TYPE=None \
    -DCMAKE_C_COMPILER="$CC" -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DPOWERINFER_SANITIZE=ON -DPOWERINFER_WERROR=ON \
    -DPOWERINFER_ISAS="${SANITIZE_ISAS:-}" >/dev/null
PATH="$PWD/.venv/bin:$PATH" ninja -C "$build/cmake"

# The Python face from the sources beside the extension just built; the installed package stays as it is.
rm -rf "$build/package"
mkdir -p "$build/package"
cp -r kernels/powerinfer_kernels "$build/package/"
rm -f "$build"/package/powerinfer_kernels/*.so
cp "$build"/cmake/_kernels*.so "$build/package/powerinfer_kernels/"
# One test compares the sets that are built with the machine's.
[ -z "${SANITIZE_ISAS:-}" ] ||
    tests+=(--deselect tests/kernels/test_face.py::test_instruction_sets_are_those_that_the_kernel_reports)
# Python itself leaks on purpose at its end. Triton's kernels are Python here and have nothing to sanitize.
LD_PRELOAD="$("$CC" -print-file-name=libasan.so) $("$CC" -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    .venv/bin/python -m pytest -q -p no:cacheprovider --ignore-glob='*triton*' \
    -o "pythonpath=$build/package . cli formats tests/formats tests/kernels tests/tools" "${tests[@]}"
