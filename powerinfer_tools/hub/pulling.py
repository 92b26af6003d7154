"""Fetching a model: the only module that talks to the hub."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerinfer_formats.records import parse_json, read_text
from powerinfer_tools.errors import HubError
from powerinfer_tools.hub.blobs import Blob, fetch
from powerinfer_tools.hub.faults import first_line, hub_error
from powerinfer_tools.hub.offers import INDEX_FILE, choose, offers
from powerinfer_tools.hub.reference import Reference
from powerinfer_tools.progress import Progress, Silent

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SECONDS = 20.0
_MAX_SHARDS = 1024


@dataclass(frozen=True)
class Pulled:
    """A model in the cache. ``path``: its file, the first of its shards, or its directory. Of its ``nbytes``,
    ``fetched_bytes`` came over the network."""

    reference: str
    path: Path
    commit: str
    files: tuple[str, ...]
    nbytes: int
    fetched_bytes: int


def pull(
    reference: Reference,
    progress: Progress | None = None,
    *,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Pulled:
    """Fetch the model's files that are not yet in the cache.

    ``endpoint`` and ``cache`` default to the settings of the hub's package: HF_ENDPOINT and HF_HUB_CACHE.
    Raises HubError: no network, no such model or file, no access, no space, damage in transit.
    """
    from huggingface_hub import constants, errors

    hub = _Hub(
        reference, endpoint or constants.ENDPOINT, cache or Path(constants.HF_HUB_CACHE), progress or Silent()
    )
    try:
        return hub.pull()
    except (OSError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise hub_error(error, reference.repository, hub.endpoint) or error from None


@dataclass(frozen=True)
class _Remote:
    """Size and hash of a file, as the hub gives them."""

    size: int
    digest: str

    @classmethod
    def of(cls, file: Any) -> "_Remote":
        """Size and hash from an entry of the hub's list. Raises ValueError for an entry with neither."""
        digest = file.lfs.sha256 if file.lfs is not None else file.blob_id
        if type(file.size) is not int or type(digest) is not str or not _DIGEST.fullmatch(digest):
            raise ValueError("a file without size and hash")
        return cls(file.size, digest)


class _Hub:
    """One repository, its newest commit, and the cache."""

    def __init__(self, reference: Reference, endpoint: str, cache: Path, progress: Progress) -> None:
        self.reference, self.endpoint, self.cache, self.progress = reference, endpoint, cache, progress
        self.commit = ""
        self.files: dict[str, _Remote] = {}

    def pull(self) -> Pulled:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's concern
        self._list()
        offer = choose(offers(self.files), self.reference)
        names = list(offer.files)
        fetched, paths = 0, []
        for name in names:  # the shards that an index names are added
            amount, path = self._file(name)
            fetched += amount
            paths.append(path)
            if name == INDEX_FILE:
                names += self._weights(path)
        folder = paths[0].parent
        return Pulled(
            str(self.reference) if self.reference.quant else f"{self.reference}:{offer.label}",
            folder if offer.is_folder else paths[0],
            self.commit,
            tuple(names),
            sum(self.files[name].size for name in names),
            fetched,
        )

    def _list(self) -> None:
        """The files of the newest commit, with sizes and hashes."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, library_name="powerinfer")
        try:
            info = api.model_info(
                self.reference.repository, revision="main", files_metadata=True, timeout=_SECONDS
            )
            self.files = {file.rfilename: _Remote.of(file) for file in info.siblings or ()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise HubError(
                f"{self.endpoint} does not answer as a hub does ({first_line(error)}); is HF_ENDPOINT right?"
            ) from None
        self.commit = str(info.sha)
        if not re.fullmatch("[0-9a-f]{40}", self.commit):
            raise HubError(f"{self.endpoint} names no commit of {self.reference.repository}")

    def _weights(self, index: Path) -> list[str]:
        """The files that the index of a directory names."""
        document = parse_json(read_text(index), index)
        weight_map = document.get("weight_map") if type(document) is dict else None
        named = sorted({str(name) for name in weight_map.values()}) if type(weight_map) is dict else []
        absent = [name for name in named if "/" in name or name not in self.files]
        if absent or not named or len(named) > _MAX_SHARDS:
            what = (
                f"{absent[0][:200]}, which {INDEX_FILE} names"
                if absent
                else f"an {INDEX_FILE} that can be used"
            )
            raise HubError(f"{self.reference.repository} does not have {what}")
        return named

    def _file(self, name: str) -> tuple[int, Path]:
        """Fetch one file. Returns the bytes that came over the network, and its path in the snapshot."""
        from huggingface_hub import constants, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        entry = self.files[name]
        fetched = 0
        if 0 < entry.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:  # beyond that, the hub has its own protocol
            url = hf_hub_url(self.reference.repository, name, revision=self.commit, endpoint=self.endpoint)
            blobs = self.cache / self.reference.folder_name / "blobs"
            blob = Blob(name, url, entry.size, entry.digest)
            fetched = fetch(blob, blobs, build_hf_headers(library_name="powerinfer"), self.progress)
        path = hf_hub_download(  # finds the blob, and makes a link to it in the snapshot
            self.reference.repository,
            name,
            revision="main",
            cache_dir=self.cache,
            endpoint=self.endpoint,
            library_name="powerinfer",
        )
        if self.commit not in Path(path).parts:
            raise HubError(f"{self.reference.repository} was changed while it was fetched; pull it again")
        return fetched, Path(path)
