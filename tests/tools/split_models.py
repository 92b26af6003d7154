"""Split files of tiny models, with the split points that a test asks for."""

from pathlib import Path

from powerinfer_formats.profile import Profile
from powerinfer_tools.conversion import ConvertOptions, convert
from powerinfer_tools.profiling import ProfileOptions, run_profile
from small_plans import plan_for
from tiny_models import CASES, make_tiny_model

GROUP = 16
CORPUS = "the cat sat on the mat; a quick brown fox jumps over the lazy dog. " * 12


class Prepared:
    """A tiny model with its profile, and split files of it on demand."""

    def __init__(self, folder: Path, case: str) -> None:
        self.folder = folder
        self.tiny = make_tiny_model(folder, CASES[case])
        text = folder / "corpus.txt"
        text.write_text(CORPUS)
        self.profile = folder / "tiny.profile.safetensors"
        run_profile(ProfileOptions(self.tiny.path, (text,), self.profile, window=64, threads=1))
        self.neurons = self.tiny.spec.neurons
        self.layers = self.tiny.spec.layers

    def save_plan(self, path: Path, hot: list[int], mode: str = "dense") -> None:
        """A plan with these hot counts."""
        profile = Profile.load(self.profile)
        plan_for(profile, hot, mode=mode, group=GROUP, width=self.tiny.spec.width).save(path)

    def split(self, hot: list[int], mode: str = "dense", quant: str | None = None) -> Path:
        """The split file with these hot counts."""
        name = f"split-{'-'.join(map(str, hot))}-{mode}-{quant}"
        plan = self.folder / f"{name}.plan.json"
        self.save_plan(plan, hot, mode)
        output = self.folder / f"{name}.powerinfer.gguf"
        convert(ConvertOptions(self.tiny.path, self.profile, plan, output, quant))
        return output
