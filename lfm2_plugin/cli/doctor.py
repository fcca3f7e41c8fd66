"""``lfm2 doctor``: print what lfm2_plugin.doctor finds."""

import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lfm2_plugin.doctor import Finding, diagnose, healthy, torch_companions, vllm_cpu

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "fault": "bold red"}


def run(as_json: bool, fix: bool) -> int:
    """Print the report, after mending what can be mended if asked; exit status 0 without a fault, else 1."""
    if fix:
        try:
            written, uninstalled = vllm_cpu.fix(), torch_companions.fix()
        except (OSError, torch_companions.UninstallFailed) as error:
            print(f"lfm2 doctor --fix: {error}", file=sys.stderr)
            return 1
        done = [f"wrote {written}"] * bool(written) + [f"uninstalled {n}" for n in uninstalled]
        print("\n".join(done) or "nothing to fix", file=sys.stderr)
    findings = diagnose()
    sound = healthy(findings)
    if as_json:
        print(json.dumps({"healthy": sound, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _show(findings, sound)
    return 0 if sound else 1


def _show(findings: list[Finding], sound: bool) -> None:
    console = Console(soft_wrap=False)
    area = ""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        if finding.area != area:
            area = finding.area
            table.add_row(Text(area, style="bold"))
        text = finding.text + (f"\n-> {finding.remedy}" if finding.remedy else "")
        status = Text(finding.status, style=STYLES[finding.status])
        table.add_row(f"  {finding.name}", status, Text(text, overflow="fold"))
    console.print(table)
    faults = [finding for finding in findings if finding.status == "fault"]
    if sound:
        console.print("\nNo faults.", style="green")
    else:
        console.print(
            f"\n{len(faults)} fault(s): {', '.join(f.name for f in faults)}", style="bold red"
        )
