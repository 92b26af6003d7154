"""Whether model, profile and plan belong together: a plan's hot counts mean the order that its own profile
gives."""

from pathlib import Path

from powerinfer_formats.plan import Plan, PlanProvenance
from powerinfer_formats.profile import Profile
from powerinfer_tools.errors import ConvertError, OtherProfile
from powerinfer_tools.model.loading import Model

#: Digits of a hash that people are shown, and how many hashes.
_DIGITS, _SHOWN = 12, 3


def require_same_model(
    model: Model, profile: Profile, profile_file: Path, plan: Plan, plan_file: Path
) -> None:
    """Raise ConvertError for a profile of another model than ``model``, FormatError for such a plan."""
    if profile.fingerprint != model.fingerprint:
        raise ConvertError(
            f"{profile_file} was made for {profile.model_name!r}, not for {model.name!r} ({model.path}); "
            "make its own with powerinfer profile"
        )
    plan.require_model(model.fingerprint, model.name, plan_file)


def require_same_profile(profile: Profile, profile_file: Path, plan: Plan, plan_file: Path) -> None:
    """Raise OtherProfile, with what differs, where ``plan`` was made from another profile. A plan that was
    made without one takes any."""
    if differences := _differences(plan.provenance, profile):
        raise OtherProfile(
            f"{plan_file} was made from another profile than {profile_file}: {'; '.join(differences)}. Plan "
            "again with this profile, give the plan's own (--profile FILE), or, to have the hot counts of "
            "the plan in the order of this profile, --other-profile"
        )


def _differences(planned: PlanProvenance, profile: Profile) -> list[str]:
    if not planned.corpus_hashes:
        return []
    hashes = sorted(entry.sha256 for entry in profile.corpus)
    differences = []
    if sorted(planned.corpus_hashes) != hashes:
        differences.append(
            f"the plan's corpus is {_shown(sorted(planned.corpus_hashes))}, the profile's {_shown(hashes)}"
        )
    if planned.corpus_tokens != profile.tokens:
        differences.append(f"{planned.corpus_tokens:,} tokens were counted, here {profile.tokens:,}")
    if planned.counting not in ("", profile.counting):  # plans of earlier versions do not say it
        differences.append(f"the plan's profile counts {planned.counting}, this one {profile.counting}")
    return differences


def _shown(hashes: list[str]) -> str:
    some = [f"{digest[:_DIGITS]}…" for digest in hashes[:_SHOWN]]
    more = [f"{len(hashes) - _SHOWN} more"] if len(hashes) > _SHOWN else []
    return ", ".join([*some, *more])
