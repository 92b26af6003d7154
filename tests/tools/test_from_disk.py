"""Models larger than memory: the bits of the model in memory for every budget, the memory that was promised,
and what is said when the disk, or the memory, does not do."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import powerinfer
from expert_models import PreparedExperts
from hybrid_families import FAMILIES as FAMILIES_BESIDE
from hybrid_families import write_random_family
from powerinfer_formats.errors import FileChanged
from powerinfer_formats.profile import Profile
from powerinfer_kernels import Pool
from powerinfer_tools import detect
from powerinfer_tools.engine import Engine, from_disk
from powerinfer_tools.engine import weights as weights_module
from powerinfer_tools.engine.from_disk import FromDisk, RamOptions
from powerinfer_tools.engine.residency import Residency
from powerinfer_tools.engine.weights_on_disk import Budget
from powerinfer_tools.errors import ModelError, ProfileError
from powerinfer_tools.measure.synthetic.models import write_synthetic
from powerinfer_tools.measure.synthetic.shapes import Shape
from powerinfer_tools.measure.synthetic.topics import Topics, text
from powerinfer_tools.model.architectures import ARCHITECTURES
from powerinfer_tools.model.loading import Model, load_model
from random_families import write_random
from tiny_folders import FolderCase, make_folder
from tiny_models import CASES, TinyModel, make_tiny_model

FAMILIES = ("mixtral-Q4_0", "qwen2moe", "qwen3moe")


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("disk"), CASES[request.param])


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every model runs from disk, with the share of its experts in memory, and the batch, of the test."""
    wanted: dict[str, float] = {"share": 1.0, "batch": 512, "static": 0}

    def opened(model: Model, pool: Pool, options: RamOptions, *, batch: int, **_: object) -> FromDisk:
        residency = Residency(model, pool)
        nbytes = residency.readers_bytes + int(residency.whole_bytes * wanted["share"]) + 1
        tokens = int(min(batch, wanted["batch"]))
        use, _ = from_disk.expert_frequencies(model, options)
        budget = Budget(nbytes, tokens, use, bool(wanted["static"]))
        return FromDisk(residency, budget, ("from disk",))

    monkeypatch.setattr(weights_module, "open_from_disk", opened)
    return wanted


def logits(path: Path, tokens: list[int], **options: object) -> tuple[np.ndarray, Engine]:
    """After a prompt of half of the tokens, and after each of the others; the engine is closed."""
    half = len(tokens) // 2
    engine = Engine(load_model(path), threads=2, **options)  # type: ignore[arg-type]
    try:
        rows = [engine.prefill(tokens[:half]).copy(), *(engine.decode(t).copy() for t in tokens[half:])]
        return np.stack(rows), engine
    finally:
        engine.close()


def test_bits_are_those_in_memory_for_five_budgets(tiny: TinyModel, slots: dict[str, float]) -> None:
    tokens = tiny.tokens(40)
    model = load_model(tiny.path)
    routing, layers = model.hyper.routing, model.hyper.layers
    assert routing is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "open_from_disk", lambda *_, **__: None)
        expected, _ = logits(tiny.path, tokens)
    least = (routing.used + 0.5) / routing.experts / layers
    hits = []
    for share, batch in ((least, 1), (0.4, 1), (0.5, 3), (0.75, 512), (1.0, 512)):
        slots["share"], slots["batch"] = share, batch
        engine = Engine(load_model(tiny.path), threads=2)
        try:
            half = len(tokens) // 2
            rows = [engine.prefill(tokens[:half]).copy(), *(engine.decode(t).copy() for t in tokens[half:])]
            assert np.array_equal(np.stack(rows), expected)
            report = engine.report().disk
            assert report is not None
            hits.append(report.hit_share)
        finally:
            engine.close()
    # Between these it depends on when reads end, too.
    assert min(hits) == hits[0] < hits[-1] == max(hits)


def random_cases() -> list[str]:
    mixed = [name for name, family in FAMILIES_BESIDE.items() if "expert_count" in str(family.metadata)]
    return [*mixed, "qwen2moe", "qwen3moe", "olmoe"]


@pytest.mark.parametrize("family", random_cases())
def test_every_router(family: str, tmp_path: Path, slots: dict[str, float]) -> None:
    """Sigmoids, groups, biases, shared experts, routers that read a layer's input, dense first layers."""
    if family in FAMILIES_BESIDE:
        path = write_random_family(tmp_path / "random.gguf", FAMILIES_BESIDE[family])
    else:
        path = write_random(tmp_path / "random.gguf", ARCHITECTURES[family])
    tokens = [int(token) for token in np.random.default_rng(0).integers(3, 37, 16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "open_from_disk", lambda *_, **__: None)
        expected, _ = logits(path, tokens)
    slots["share"], slots["batch"] = 0.61, 1
    got, engine = logits(path, tokens)
    assert np.array_equal(got, expected)
    assert engine.stack.residency is not None


def test_split_files_and_placements(tmp_path: Path, slots: dict[str, float]) -> None:
    """A split file has the same bits in its own order; what stays by the profile is no longer read."""
    prepared = PreparedExperts(tmp_path, "qwen3moe")
    path = prepared.split([1] * prepared.layers)
    tokens = prepared.tiny.tokens(24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "open_from_disk", lambda *_, **__: None)
        expected, _ = logits(path, tokens)
    slots["share"], slots["batch"] = 0.8, 1
    read = {}
    for static in (0, 1):
        slots["static"] = static
        engine = Engine(
            load_model(path),
            threads=2,
            ram=RamOptions(None, "static" if static else "adaptive", prepared.profile),
        )
        try:
            rows = [engine.prefill(tokens[:12]).copy(), *(engine.decode(t).copy() for t in tokens[12:])]
            assert np.array_equal(np.stack(rows), expected)
            assert "of them in memory, as in the profile" in engine.notices[-1]
            read[static] = engine.report().disk
        finally:
            engine.close()
    assert all(report is not None and report.read_bytes > 0 for report in read.values())


def test_a_hugging_face_directory(tmp_path: Path, slots: dict[str, float]) -> None:
    """Experts are tensors of their own there, one by one."""
    sizes = {"hidden_size": 64, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes |= {"shared_expert_intermediate_size": 96}
    made = make_folder(tmp_path / "model", FolderCase("Qwen2Moe", "qwen2", sizes))
    tokens = [int(token) for token in np.random.default_rng(0).integers(3, 60, 16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "open_from_disk", lambda *_, **__: None)
        expected, _ = logits(made.path, tokens)
    slots["share"], slots["batch"] = 0.5, 1
    got, engine = logits(made.path, tokens)
    assert np.array_equal(got, expected)
    assert engine.stack.residency is not None


def test_a_profile_is_found_beside_the_model_and_must_be_its_own(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, slots: dict[str, float]
) -> None:
    prepared = PreparedExperts(tmp_path, "qwen3moe")
    other = make_tiny_model(tmp_path_factory.mktemp("other"), CASES["mixtral-Q4_0"])
    model = load_model(prepared.tiny.path)
    beside = from_disk.profile_beside(prepared.tiny.path)
    with pytest.raises(ModelError, match="and there is none beside it; powerinfer profile makes one"):
        from_disk.expert_frequencies(load_model(other.path), RamOptions(placing="static"))
    assert from_disk.expert_frequencies(load_model(other.path), RamOptions()) == (None, ())
    assert beside == prepared.profile
    use, notices = from_disk.expert_frequencies(model, RamOptions())
    assert use is not None
    np.testing.assert_allclose(use.sum(axis=1), prepared.routing.used)
    assert notices[0].startswith(f"experts are placed by {beside.name} (")
    with pytest.raises(ModelError, match="is one of another model"):
        from_disk.expert_frequencies(load_model(other.path), RamOptions(profile=prepared.profile))


def test_what_is_taken_is_learnt(tmp_path: Path, slots: dict[str, float]) -> None:
    """Two runs add up, as counts of the same model, to what both took; a model without experts is refused."""
    tiny = make_tiny_model(tmp_path, CASES["qwen3moe"])
    path, slots["share"], slots["batch"] = tmp_path / "learnt.safetensors", 0.7, 1
    total = 0
    for count in (12, 7):
        with powerinfer.load(tiny.path, threads=1, learn=path) as model, model.session() as session:
            session.stream(tiny.tokens(count), max_tokens=3, ignore_eos=True, temperature=0).finish()
        total += count + 2
        profile = Profile.load(path)
        assert profile.tokens == total
        used = CASES["qwen3moe"].experts_used
        assert all(profile.counts(layer).sum() == total * used for layer in range(profile.layers))
    assert len(profile.corpus) == 2
    dense = make_tiny_model(tmp_path_factory_folder(tmp_path), CASES["llama-Q4_0"])
    with pytest.raises(
        ProfileError, match="--learn counts experts, and neurons of split files, and this is neither"
    ):
        powerinfer.load(dense.path, learn=path)
    with pytest.raises(ProfileError, match="another model than"):
        powerinfer.load(
            make_tiny_model(tmp_path_factory_folder(tmp_path), CASES["qwen2moe"]).path, learn=path
        )


def test_a_pass_that_failed_is_not_learnt(synthetic: Path, tmp_path: Path, slots: dict[str, float]) -> None:
    """The error is that of the disk, and no profile is written."""
    path, learnt = tmp_path / "model.gguf", tmp_path / "learnt.safetensors"
    path.write_bytes(synthetic.read_bytes())
    slots["share"], slots["batch"] = 0.35, 1

    def fail() -> None:
        with powerinfer.load(path, learn=learnt) as model, model.session() as session:
            os.utime(path, ns=(1, 1))
            session.stream(list(range(100, 150)), max_tokens=1).finish()

    with pytest.raises(ModelError, match="could not be read while the model ran"):
        fail()
    assert not learnt.exists()


def tmp_path_factory_folder(tmp_path: Path) -> Path:
    folder = tmp_path / f"more{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return folder


def test_one_session_and_what_it_counts(tiny: TinyModel, slots: dict[str, float]) -> None:
    slots["share"], slots["batch"] = 0.7, 1
    engine = Engine(load_model(tiny.path), threads=1)
    try:
        with pytest.raises(ModelError, match="memory that a second session"):
            engine.weights.session()
        tokens = tiny.tokens(12)
        engine.prefill(tokens)
        residency, routing = engine.stack.residency, engine.model.hyper.routing
        assert residency is not None
        assert routing is not None
        counts = residency.taken()
        assert (counts.sum(axis=1) == routing.used * len(tokens)).all()
        report = engine.report()
        assert report.disk is not None
        assert report.disk.taken == counts.sum()  # one token a pass
        assert report.as_dict()["disk"]["hit_share"] == report.disk.hits / report.disk.taken
        assert 0 < residency.nbytes < report.memory.weights
        assert engine.read_bandwidth() == 0.0  # that would take memory of its own
    finally:
        engine.close()


def test_a_file_that_was_replaced_is_not_read(
    tiny: TinyModel, tmp_path: Path, slots: dict[str, float]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.path.read_bytes())
    model = load_model(path)
    other = tmp_path / "other"
    other.write_bytes(tiny.path.read_bytes())
    other.rename(path)
    with pytest.raises(FileChanged, match="was changed or replaced since it was opened"):
        Engine(model)


#: 1,536 experts are 128 here: some 50 MiB in all, of which a test can leave out half.
SHAPE = Shape("qwen3moe", 4, 512, 8, 2, 64, 384, 2048, 1e6, experts=32, used=4)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "moe.gguf"
    write_synthetic(path, "test", SHAPE, "Q4_0", topics=Topics(8.0, 0.5))
    return path


def test_a_file_that_is_written_to_ends_the_run_with_its_name(
    synthetic: Path, tmp_path: Path, slots: dict[str, float]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(synthetic.read_bytes())
    slots["share"], slots["batch"] = 0.35, 1
    engine = Engine(load_model(path), threads=2)
    try:
        engine.prefill([5, 6, 7])
        os.utime(path, ns=(1, 1))
        with pytest.raises(ModelError, match=r"model\.gguf: \d+ bytes at \d+ could not be read while"):
            engine.prefill(list(range(100, 150)))
    finally:
        engine.close()


def test_memory_is_what_was_asked_for(synthetic: Path) -> None:
    """--ram counts the whole process, and its peak is below it, while the model in memory takes more."""
    script = (
        "import sys, numpy as np\n"
        "from powerinfer_tools.engine import Engine\n"
        "from powerinfer_tools.engine.from_disk import RamOptions\n"
        "from powerinfer_tools.model.loading import load_model\n"
        "from powerinfer_tools.detect import resident_bytes\n"
        "path, ram = sys.argv[1], int(sys.argv[2]) or None\n"
        "model = load_model(path)\n"
        "ram = ram and resident_bytes() + ram\n"
        "engine = Engine(model, context=128, threads=2, ram=RamOptions(ram))\n"
        "engine.prefill(list(range(5, 37)))\n"
        "for token in range(64): logits = engine.decode(token + 7).copy()\n"
        "peak = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "from_disk = engine.stack.residency is not None\n"
        "print(int(peak[0]) * 1024, ram or 0, from_disk, logits.tobytes().hex()[:9])\n"
    )

    def run(ram: int) -> list[str]:
        command = [sys.executable, "-c", script, str(synthetic), str(ram)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    size = synthetic.stat().st_size
    peak, ram, disk, bits = run((24 << 20) + size // 2 + (12 << 20))
    assert disk == "True"
    assert int(peak) <= int(ram)
    whole_peak, _, whole_disk, whole_bits = run(0)
    assert whole_disk == "False"
    assert whole_bits == bits
    assert int(whole_peak) > int(ram)


def test_what_is_free_decides(synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not fit runs from disk without being told, and says so; a dense one is refused."""
    size = synthetic.stat().st_size
    monkeypatch.setattr(
        from_disk, "available_ram_bytes", lambda: from_disk.MARGIN + size * 2 // 3 + (48 << 20)
    )
    monkeypatch.setattr(from_disk, "resident_bytes", lambda: 0)
    engine = Engine(load_model(synthetic), context=64)
    engine.close()
    assert engine.stack.residency is None
    monkeypatch.setattr(from_disk, "available_ram_bytes", lambda: from_disk.MARGIN + size - (2 << 20))
    engine = Engine(load_model(synthetic), context=64)
    try:
        assert engine.stack.residency is not None
        assert "of 128 experts" in engine.notices[0]
        engine.prefill([1, 2, 3])
    finally:
        engine.close()
    monkeypatch.setattr(from_disk, "available_ram_bytes", lambda: from_disk.MARGIN + (25 << 20))
    with pytest.raises(ModelError, match="MiB are left for experts beside what every token needs"):
        Engine(load_model(synthetic), context=64)


def test_too_little_memory_and_hot_sides_are_refused(tmp_path: Path, synthetic: Path) -> None:
    dense = make_tiny_model(tmp_path, CASES["llama-Q4_0"])
    with pytest.raises(ModelError, match="0 MiB are left for FFNs beside what every token needs"):
        Engine(load_model(dense.path), ram=RamOptions(1 << 20))
    with pytest.raises(ModelError, match="with --device cpu nothing is read from disk"):
        Engine(load_model(synthetic), device="cpu", ram=RamOptions(1 << 20))


def test_resident_bytes_are_those_of_the_process(tmp_path: Path) -> None:
    assert detect.resident_bytes() > 1 << 20
    (tmp_path / "proc/self").mkdir(parents=True)
    assert detect.resident_bytes(tmp_path) == 0
    (tmp_path / "proc/self/status").write_text("Name:\tx\nVmRSS:\t    2048 kB\n")
    assert detect.resident_bytes(tmp_path) == 2 << 20


def test_a_text_stays_with_its_topics(synthetic: Path) -> None:
    """The experts of a token are more likely those of the tokens before than those of any token."""
    tokens = text(np.random.default_rng(1), 300, SHAPE.vocabulary, 50.0)
    topics = np.array(tokens) % 32
    assert 2 <= (np.diff(topics) != 0).sum() <= 20
    assert max(tokens) < SHAPE.vocabulary
