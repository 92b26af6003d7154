"""The planner: what is where, in which mode, and what speed to expect (one level per layer, chosen by a
MILP)."""

from typing import TYPE_CHECKING

from powerinfer_tools.stages.plan.report import render_plan
from powerinfer_tools.stages.plan.request import PlanRequest

if TYPE_CHECKING:
    from powerinfer_formats.plan import Plan

__all__ = ["PlanRequest", "make_plan", "render_plan"]


def make_plan(request: PlanRequest) -> "Plan":
    """The plan for ``request``; see :func:`powerinfer_tools.stages.plan.request.plan_request`."""
    from powerinfer_tools.stages.plan.request import plan_request

    return plan_request(request)
