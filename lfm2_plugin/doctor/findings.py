"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: the part of the report it belongs to: versions, machine, engine or kernels.
        name: what was looked at.
        status: ok, note, warning or fault.
        text: what was found.
        remedy: what to do about it; empty where there is nothing to do.
    """

    area: str
    name: str
    status: Status
    text: str
    remedy: str = ""
