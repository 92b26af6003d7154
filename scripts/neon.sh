#!/usr/bin/env bash
# The kernels' tests with NEON, in an emulator, on Debian or Ubuntu for x86-64. Needs, once, as root:
#   dpkg --add-architecture arm64 && apt-get update && apt-get install gcc-aarch64-linux-gnu qemu-user-static
# Downloads Python and NumPy for ARM into build/neon. NEON_TESTS chooses the tests, NEON_SETS those whose names say so.
set -euo pipefail
cd "$(dirname "$0")/.."

build=$PWD/build/neon
: "${CC:=aarch64-linux-gnu-gcc}" "${QEMU:=qemu-aarch64-static}"
read -ra tests <<<"${NEON_TESTS:-test_rows.py test_rows_few.py test_matmul.py test_vectors.py test_operations.py test_signs.py test_recurrent.py test_thresholded.py}"
for tool in "$CC" "$QEMU" dpkg; do
    command -v "$tool" >/dev/null || { echo "neon.sh: $tool is not installed; see the head of this file" >&2; exit 1; }
done
mkdir -p "$build"/{packages,root,objects,site,wheels}

if [ ! -e "$build/root/usr/bin/python3.11" ]; then
    echo "-- Python for ARM"
    (cd "$build/packages" && apt-get download -qq $(printf '%s:arm64 ' python3.11 python3.11-minimal libpython3.11-minimal \
        libpython3.11-stdlib libpython3.11-dev libc6 libexpat1 zlib1g libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 \
        libuuid1 libgcc-s1 libstdc++6 libcrypt1))
    for package in "$build"/packages/*.deb; do dpkg -x "$package" "$build/root"; done
fi

echo "-- kernels for NEON"
flags=(-O3 -std=c11 -ffp-contract=off -fno-strict-aliasing -fvisibility=hidden -fPIC -Wall -Wextra -D_GNU_SOURCE
    -DPy_LIMITED_API=0x030B0000 -DPI_HAS_SCALAR=1 -DPI_HAS_NEON=1 -I kernels/csrc -I "$build/root/usr/include/python3.11"
    -I "$build/root/usr/include")
compile() {  # compile SOURCE OBJECT FLAGS…
    "$CC" "${flags[@]}" "${@:3}" -c "$1" -o "$2"
}
for source in kernels/csrc/*.c; do compile "$source" "$build/objects/$(basename "$source" .c).o"; done
for body in kernels/csrc/*.inc; do
    for set in scalar neon; do
        unit=$build/objects/$(basename "$body" .inc)_$set
        printf '#define PI_ISA_%s 1\n#include "%s"\n' "${set^^}" "$(basename "$body")" >"$unit.c"
        if [ "$set" = neon ]; then compile "$unit.c" "$unit.o" -march=armv8.2-a+dotprod+fp16; else compile "$unit.c" "$unit.o" -O1; fi
    done
done

echo "-- tests, emulated"
site=$build/site
rm -rf "$site/powerinfer_kernels"
cp -r kernels/powerinfer_kernels "$site/"
rm -f "$site"/powerinfer_kernels/*.so
"$CC" -shared "$build"/objects/*.o -o "$site/powerinfer_kernels/_kernels.abi3.so" -lpthread -lm
numpy=$(.venv/bin/python -c 'import numpy; print(numpy.__version__)')
# Packages without compiled parts are those of this environment's versions.
.venv/bin/python -m pip download -q --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 --python-version 3.11 --implementation cp --abi cp311 -d "$build/wheels" "numpy==$numpy"
.venv/bin/python -m pip install -q --no-deps --upgrade --target "$site" --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 --only-binary=:all: --python-version 3.11 \
    --implementation cp --abi cp311 "$build"/wheels/numpy-*.whl
.venv/bin/python -m pip install -q --no-deps --upgrade --target "$site" pytest pluggy iniconfig packaging pygments gguf tqdm \
    requests urllib3 idna certifi
cd tests/kernels
PYTHONPATH="$site:$PWD" PYTHONDONTWRITEBYTECODE=1 exec "$QEMU" -cpu max -L "$build/root" "$build/root/usr/bin/python3.11" \
    -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . -k "${NEON_SETS:-not avx and not scalar}" "${tests[@]}"
