"""profile on Ray: shards of the corpus as tasks on many machines, whose profiles merge into that of one run.

Ray places the tasks, and runs those of a lost worker again. Every machine needs powerinfer, the model and the
corpus under the same paths; what comes back is the profile of a shard, as the bytes of its file.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from powerinfer_formats.errors import FormatError
from powerinfer_formats.profile import Profile
from powerinfer_formats.scratch import scratch_folder
from powerinfer_tools.errors import CorpusError, PowerInferError, ProfileError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.profile.corpus import CorpusFile, find_files, shard_of
from powerinfer_tools.stages.profile.profiling import ProfileOptions, run_profile

#: A shard is run again so often where its worker is lost.
RETRIES = 8
#: Shards for each machine: few enough that loading the model costs little, enough that all end together.
_SHARDS_EACH = 8

Shard = tuple[int, int]


def profile_shard(options: ProfileOptions) -> bytes:
    """The profile of one shard, as the bytes of its file. Runs in a worker."""
    with scratch_folder("shard") as folder:
        output = folder / "shard.safetensors"
        run_profile(replace(options, output=output))
        return output.read_bytes()


def run_profile_on_ray(
    options: ProfileOptions,
    address: str,
    progress: Progress | None = None,
    work: Callable[[ProfileOptions], bytes] = profile_shard,
) -> Profile:
    """Make the profile on the Ray cluster at ``address`` ("local": one that is started for it here) and write
    it to ``options.output``; the same bytes as :func:`run_profile` writes.

    A task takes ``options.threads`` cores, or all that the smallest machine has. Shards that are done wait
    beside ``options.output``, and are not done again when the same call is repeated. Raises what
    :func:`run_profile` raises, and ProfileError where Ray is missing, cannot be reached or gives up.
    """
    progress = progress or Silent()
    files = find_files(options.corpus)
    with _connected(address) as ray:
        cores = _cores(ray)
        threads = options.threads or min(cores)
        machines = sum(count // threads for count in cores)
        if machines < 1:
            raise ProfileError(f"no machine of the cluster has {threads} cores, which -t asks for")
        count = min(len(files), _SHARDS_EACH * machines)
        shards = {number: shard_of(files, number, count) for number in range(1, count + 1)}
        kept = _Kept(options, count)
        pending = [number for number in shards if not kept.has(number, shards[number])]
        progress.start("profile", sum(file.nbytes for file in files), "bytes")
        sizes = {number: sum(file.nbytes for file in part) for number, part in shards.items()}
        progress.advance(sum(size for number, size in sizes.items() if number not in pending))
        task = ray.remote(num_cpus=threads, max_retries=RETRIES)(work)
        tasks = {
            task.remote(replace(options, threads=threads, shard=(number, count))): number
            for number in pending
        }
        for number, data in _results(ray, tasks):
            kept.add(number, data, shards[number])
            progress.advance(sizes[number])
        progress.finish()
    profile = Profile.merge([kept.load(number) for number in shards])
    profile.save(options.output)
    kept.remove()
    return profile


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise ProfileError(
            "--ray needs Ray, which is not installed: in the folder of powerinfer's sources, pip install "
            "'.[ray]'"
        ) from None
    local = address == "local"
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        if local:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ProfileError(f"the Ray cluster at {address} cannot be reached: {error}"[:300]) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _cores(ray: Any) -> list[int]:
    """Cores of each machine."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cores = [count for count in cores if count]
    if not cores:
        raise ProfileError("the Ray cluster has no machine with a free core")
    return cores


def _results(ray: Any, tasks: dict[Any, int]) -> Iterator[tuple[int, bytes]]:
    """(shard, bytes) as they are done. Leaving early cancels the others."""
    from ray.exceptions import RayError, RayTaskError

    left = list(tasks)
    try:
        while left:
            done, left = ray.wait(left)
            for reference in done:
                yield tasks[reference], ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        raise (
            cause if isinstance(cause, PowerInferError) else ProfileError(f"a task failed: {cause}")
        ) from None
    except RayError as error:
        raise ProfileError(f"a shard was lost {RETRIES + 1} times: {type(error).__name__}") from None
    finally:
        for reference in left:
            ray.cancel(reference, force=True)


class _Kept:
    """Profiles of shards that are done, in files beside the output."""

    def __init__(self, options: ProfileOptions, count: int) -> None:
        self._options, self._count = options, count
        model = load_model(options.model)
        self._fingerprint = model.fingerprint
        model.close()

    def path(self, number: int) -> Path:
        """Where the profile of a shard waits."""
        name = self._options.output.name.removesuffix(".safetensors").removesuffix(".profile")
        return self._options.output.with_name(f"{name}.ray-{number}-of-{self._count}.profile.safetensors")

    def has(self, number: int, files: Sequence[CorpusFile]) -> bool:
        """Whether it was done by an earlier call for the same work."""
        if self._options.restart or not self.path(number).exists():
            return False
        try:
            self._check(self.load(number), files)
        except (FormatError, CorpusError, ProfileError):
            return False
        return True

    def load(self, number: int) -> Profile:
        """The profile of a shard."""
        return Profile.load(self.path(number))

    def add(self, number: int, data: bytes, files: Sequence[CorpusFile]) -> None:
        """Keep what a worker sent, once it is checked. Raises FormatError, CorpusError and ProfileError."""
        with scratch_folder("shard") as folder:
            part = folder / "shard.safetensors"
            part.write_bytes(data)
            profile = Profile.load(part)
        self._check(profile, files)
        profile.save(self.path(number))

    def remove(self) -> None:
        """They are merged."""
        for number in range(1, self._count + 1):
            self.path(number).unlink(missing_ok=True)

    def _check(self, profile: Profile, files: Sequence[CorpusFile]) -> None:
        """Refuse the profile of another model or of other text: a machine may have other files."""
        if profile.fingerprint != self._fingerprint:
            raise ProfileError(f"a machine has another model at {self._options.model}")
        if profile.target_density != self._options.target_density:
            raise ProfileError("a shard was counted for another density")
        hashes = {file.name: file.sha256 for file in files}
        for corpus in profile.corpus:
            if hashes.get(corpus.name) != corpus.sha256:
                raise CorpusError(f"a machine has another {corpus.name} in its corpus")
