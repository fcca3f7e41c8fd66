"""What ``lfm2 doctor`` looks at: is everything here that serving needs, and is it ours that serves?

``diagnose()`` gathers findings; each is one line. A *fault* is what keeps LFM2-MoE from being served by this package,
and makes the command fail; a *warning* costs speed or was never tested; a *note* is worth knowing.
"""

from importlib import util

from lfm2_plugin.doctor.engines import engine_findings
from lfm2_plugin.doctor.findings import Finding, Status
from lfm2_plugin.doctor.machine import machine_findings, version_findings
from lfm2_plugin.doctor.torch_companions import companion_findings

__all__ = ["Finding", "Status", "diagnose", "healthy"]


def diagnose() -> list[Finding]:
    """Every finding, in the order of the report. Takes some seconds: it starts a process that imports the engine."""
    findings = [*version_findings(), *machine_findings(), *companion_findings(), *engine_findings()]
    if util.find_spec(
        "torch"
    ):  # an engine brings it; without one there is nothing to run kernels on
        from lfm2_plugin.doctor.kernels import kernel_findings

        findings += kernel_findings()
    return findings


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing is at fault."""
    return all(finding.status != "fault" for finding in findings)
