"""Split files of tiny models, with the split points that a test asks for."""

from collections.abc import Sequence
from pathlib import Path

from powerinfer_formats.profile import Profile
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from small_plans import plan_for
from tiny_models import CASES, TinySpec, make_tiny_model

GROUP = 16
CORPUS = "the cat sat on the mat; a quick brown fox jumps over the lazy dog. " * 12


class Profiled:
    """A tiny model with its profile."""

    def __init__(self, folder: Path, case: str | TinySpec) -> None:
        self.folder = folder
        self.tiny = make_tiny_model(folder, CASES[case] if isinstance(case, str) else case)
        text = folder / "corpus.txt"
        text.write_text(CORPUS)
        self.profile = folder / "tiny.profile.safetensors"
        run_profile(ProfileOptions(self.tiny.path, (text,), self.profile, window=64, threads=1))
        self.neurons, self.layers = self.tiny.spec.neurons, self.tiny.spec.layers


class Prepared(Profiled):
    """A tiny model with its profile, and split files of it on demand."""

    def save_plan(
        self,
        path: Path,
        hot: list[int],
        mode: str = "dense",
        attention: Sequence[int] = (),
        *,
        head: bool = False,
    ) -> None:
        """A plan with these hot counts, the attention of these layers and the head on the hot device."""
        profile, width = Profile.load(self.profile), self.tiny.spec.width
        plan = plan_for(profile, hot, mode=mode, group=GROUP, width=width, attention=attention, head=head)
        plan.save(path)

    def split(
        self,
        hot: list[int],
        mode: str = "dense",
        quant: str | None = None,
        attention: Sequence[int] = (),
        *,
        head: bool = False,
    ) -> Path:
        """The split file with these hot counts, and all else where it is asked for."""
        placed = f"{'-'.join(map(str, hot))}-a{'-'.join(map(str, attention))}{'-head' * head}"
        name = f"split-{placed}-{mode}-{quant}"
        plan = self.folder / f"{name}.plan.json"
        self.save_plan(plan, hot, mode, attention, head=head)
        output = self.folder / f"{name}.powerinfer.gguf"
        convert(ConvertOptions(self.tiny.path, self.profile, plan, output, quant))
        return output
