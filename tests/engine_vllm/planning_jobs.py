"""What runs inside the child: vLLM's planner on published models, no weights and no engine."""

from dataclasses import asdict
from typing import Any

from benchmarks.kv_plan import plan
from benchmarks.memory import Case
from benchmarks.sides import wrong_class


def plan_all(side: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fields of a plan for each case, of the side that the job's environment chooses."""
    plans = [asdict(plan(Case(**case))) for case in cases]
    assert not [wrong for p in plans if (wrong := wrong_class(side, p["model_class"]))]
    return plans
