"""A scheduler that also remembers what it scheduled (given to the engine as ``scheduler_cls``)."""

from vllm.v1.core.sched.scheduler import Scheduler


class RecordingScheduler(Scheduler):
    """The engine's scheduler; ``steps`` holds {request: tokens} and the preempted, per step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps: list[dict] = []

    def schedule(self, *args, **kwargs):
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            self.steps.append(
                {
                    "tokens": dict(output.num_scheduled_tokens),
                    "preempted": sorted(output.preempted_req_ids or ()),
                }
            )
        return output
