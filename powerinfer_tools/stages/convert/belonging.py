"""Whether model, profile and plan belong together: a plan's hot counts mean the order that its own profile
gives."""

from dataclasses import dataclass
from pathlib import Path

from powerinfer_formats.plan import Plan, PlanProvenance
from powerinfer_formats.profile import ROUTING, Profile
from powerinfer_tools.errors import ConvertError, OtherProfile
from powerinfer_tools.model.counted_units import suits
from powerinfer_tools.model.loading import Model

#: Digits of a hash that people are shown, and how many hashes.
_DIGITS, _SHOWN = 12, 3


@dataclass(frozen=True)
class Inputs:
    """What convert starts from."""

    model: Model
    profile: Profile
    plan: Plan

    def require_together(self, profile_file: Path, plan_file: Path, *, other_profile: bool) -> None:
        """Raise ConvertError for a profile of another model or of other units, or a plan of others;
        FormatError for a plan of another model; and unless ``other_profile`` is allowed, OtherProfile, with
        what differs, for a plan that was made from another one. A plan that was made without takes any."""
        model, profile, plan = self.model, self.profile, self.plan
        if profile.fingerprint != model.fingerprint:
            raise ConvertError(
                f"{profile_file} was made for {profile.model_name!r}, not for {model.name!r} ({model.path}); "
                "make its own with powerinfer profile"
            )
        plan.require_model(model.fingerprint, model.name, plan_file)
        differences = [] if other_profile else _differences(plan.provenance, profile)
        if differences:
            raise OtherProfile(
                f"{plan_file} was made from another profile than {profile_file}: {'; '.join(differences)}. "
                "Plan again with this profile, give the plan's own (--profile FILE), or, to have the hot "
                "counts of the plan in the order of this profile, --other-profile"
            )
        self._require_counted_units()
        self._require_planned_units()

    def _require_counted_units(self) -> None:
        hyper, routing, profile = self.model.hyper, self.model.hyper.routing, self.profile
        units = "neurons" if routing is None else "experts"
        if (profile.activation == ROUTING) != (routing is not None) or profile.layers != hyper.layers:
            raise ConvertError(
                f"the profile counts {profile.activation} in {profile.layers} layers, not the {units} of "
                f"{hyper.layers}; make one with powerinfer profile"
            )
        for layer, facts in enumerate(hyper.facts):
            beside = routing is not None and facts.ffn == "dense"
            count = facts.neurons if facts.ffn == "dense" else 1
            if routing is not None and facts.ffn == "experts":
                count = routing.experts
            if not suits(profile, layer, count, beside_experts=beside):
                raise ConvertError(
                    f"the profile counts {profile.neurons(layer)} {'neurons' if beside else units} in layer "
                    f"{layer}, {self.model.name} has {count}; make one with powerinfer profile"
                )

    def _require_planned_units(self) -> None:
        """A dense FFN is one expert, whose neurons are placed in groups."""
        hyper, routing, plan = self.model.hyper, self.model.hyper.routing, self.plan
        experts, shared = (1, 0) if routing is None else (routing.experts, routing.shared_neurons)
        sizes = (hyper.layers, routing is not None, experts, hyper.neurons, shared)
        of_plan = plan.model.experts
        count, planned_shared = (1, 0) if of_plan is None else (of_plan.count, of_plan.shared_neurons)
        neurons = plan.model.neurons // count
        if (plan.model.layers, of_plan is not None, count, neurons, planned_shared) != sizes:
            raise ConvertError(
                f"the plan has {_sizes(of_plan is not None, count, neurons)} in {plan.model.layers} layers, "
                f"{self.model.name} has {_sizes(routing is not None, experts, hyper.neurons)} in "
                f"{hyper.layers}; plan again"
            )
        each = [0 if facts.ffn == "none" else facts.neurons for facts in hyper.facts]
        sizes_differ = any(
            plan.neurons_of(index) != each[index]
            for index, facts in enumerate(hyper.facts)
            if facts.ffn != "experts"
        )
        dense = tuple(
            i for i, facts in enumerate(hyper.facts) if routing is not None and facts.ffn == "dense"
        )
        planned = of_plan.dense if of_plan is not None else None
        in_part = planned is not None and not self.model.exact_zeros and planned.group != planned.neurons
        if (() if planned is None else planned.layers) != dense or sizes_differ or in_part:
            raise ConvertError(
                f"the plan has experts in other layers than {self.model.name}, or other numbers or "
                "other groups of neurons in those without; plan again"
            )


def _sizes(routed: bool, count: int, neurons: int) -> str:
    return f"{count} experts of {neurons} neurons" if routed else f"{neurons} neurons"


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
