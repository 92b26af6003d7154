"""Models in the hub's cache: found, listed and removed without any network.

The layout is the hub package's: ``models--OWNER--NAME`` with ``refs/main`` (the commit), ``snapshots/COMMIT``
(files by name, links) and ``blobs`` (their bytes).
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from powerinfer_tools.errors import HubError
from powerinfer_tools.hub.offers import INDEX_FILE, Offer, choose, offers
from powerinfer_tools.hub.reference import Reference


@dataclass(frozen=True)
class LocalModel:
    """A complete model in the cache. ``path``: file, first shard, or directory. ``current``: whether it
    belongs to the commit that was pulled last."""

    reference: str
    path: Path
    nbytes: int
    commit: str
    current: bool


def hub_cache() -> Path:
    """The cache's folder: HF_HUB_CACHE, else HF_HOME/hub, else the user's."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_cached(reference: Reference, cache: Path | None = None) -> Path | None:
    """The model's file, first shard or directory, if all of it has been fetched. Raises HubError if several
    models in the cache match."""
    folder = (cache or hub_cache()) / reference.folder_name
    commit = _text(folder / "refs/main").strip()
    snapshot = folder / "snapshots" / commit
    if not commit or "/" in commit or not snapshot.is_dir():
        return None
    offered = _whole(snapshot)
    try:
        offer = choose(offered, reference)
    except HubError:
        if reference.quant or not offered:
            return None
        raise
    return snapshot if offer.is_folder else snapshot / offer.files[0]


def list_models(cache: Path | None = None) -> list[LocalModel]:
    """All complete models, by name."""
    models = [model for _, _, model in _models(cache)]
    return sorted(models, key=lambda model: (model.reference.lower(), not model.current))


def incomplete_bytes(cache: Path | None = None) -> int:
    """Bytes of partially fetched files."""
    return sum(file.stat().st_size for file in (cache or hub_cache()).glob("models--*/blobs/*.incomplete"))


def remove(reference: Reference, *, everything: bool = False, cache: Path | None = None) -> int:
    """Remove the model, in all commits. If a repository has several models, the named one is removed, or all
    with ``everything``. Returns the number of bytes freed. Raises HubError."""
    cached = [(revision, offer) for revision, offer, model in _models(cache, reference.repository)]
    partial = (cache or hub_cache()) / reference.folder_name / "blobs"
    if not cached and not any(partial.glob("*.incomplete")):
        raise HubError(
            f"{reference.repository} is not in the cache; powerinfer list shows the models that are"
        )
    labels = {offer.label for _, offer in cached}
    if not reference.quant and (everything or len(labels) <= 1):
        return _remove_all(reference, cache)
    if not reference.quant:
        raise HubError(
            f"{reference.repository} is in the cache as {', '.join(sorted(labels))}: name one of them, or "
            "remove all (--all)"
        )
    matching = []
    for revision, offer in cached:
        with suppress(HubError):
            choose([offer], reference)
            matching.append((revision, offer))
    if not matching:
        there_are = f"there are: {', '.join(sorted(labels))}"
        raise HubError(f"{reference.repository} has no {reference.quant} in the cache; {there_are}")
    if len(matching) == len(cached):
        return _remove_all(reference, cache)
    return _remove_files(matching)


def _models(cache: Path | None, repository: str = "") -> Iterator[tuple[Any, Offer, LocalModel]]:
    """Every model in the cache: its revision, its offer, and its entry for users."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        information = scan_cache_dir(cache or hub_cache())
    except CacheNotFound:
        return
    for repo in information.repos:
        if repo.repo_type != "model" or (repository and repo.repo_id != repository):
            continue
        for revision in repo.revisions:
            for offer in _whole(revision.snapshot_path):
                path = revision.snapshot_path if offer.is_folder else revision.snapshot_path / offer.files[0]
                nbytes = sum((revision.snapshot_path / name).stat().st_size for name in offer.files)
                current = "main" in revision.refs
                reference = f"{repo.repo_id}:{offer.label}"
                yield revision, offer, LocalModel(reference, path, nbytes, revision.commit_hash, current)


def _whole(snapshot: Path) -> list[Offer]:
    """The models without missing files."""
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    whole = []
    for offer in offers(names):
        if offer.is_folder and INDEX_FILE in offer.files:
            weights = _named_weights(snapshot / INDEX_FILE)
            offer = Offer(offer.label, (*offer.files, *weights), tuple(set(weights) - set(names)))
            if not weights:
                continue
        if not offer.missing:
            whole.append(offer)
    return whole


def _named_weights(index: Path) -> list[str]:
    with suppress(OSError, ValueError, AttributeError):
        names = {str(name) for name in json.loads(_text(index))["weight_map"].values()}
        return sorted(name for name in names if "/" not in name)
    return []


def _remove_all(reference: Reference, cache: Path | None) -> int:
    from huggingface_hub import scan_cache_dir

    folder = (cache or hub_cache()) / reference.folder_name
    freed = 0
    for partial in folder.glob("blobs/*.incomplete"):
        freed += partial.stat().st_size
        partial.unlink()
    information = scan_cache_dir(cache or hub_cache())
    for repo in information.repos:
        if (repo.repo_type, repo.repo_id) != ("model", reference.repository):
            continue
        # The package takes the first repository that has the commit, and copies of a repository share theirs.
        only = replace(information, repos=frozenset({repo}))
        strategy = only.delete_revisions(*(revision.commit_hash for revision in repo.revisions))
        strategy.execute()
        freed += strategy.expected_freed_size
    return freed


def _remove_files(models: list[tuple[Any, Offer]]) -> int:
    """Unlink the files of ``models``, and the blobs to which no other name refers."""
    blobs = set()
    for revision, offer in models:
        for name in offer.files:
            link = revision.snapshot_path / name
            blobs.add(link.resolve() if not link.is_symlink() else link.parent / link.readlink())
            link.unlink()
    folder = models[0][0].snapshot_path.parents[1]
    kept = {path.resolve() for path in (folder / "snapshots").rglob("*") if path.is_file()}
    freed = 0
    for blob in blobs:
        if blob.resolve() not in kept and blob.exists():
            freed += blob.stat().st_size
            blob.unlink()
    return freed


def _text(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text("utf-8")
    return ""
