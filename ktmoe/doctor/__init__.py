"""`ktmoe doctor`: what this machine and this installation can do for ktmoe, and the remedy for what they cannot."""

from ktmoe.doctor.finding import Finding, Status
from ktmoe.doctor.report import diagnose, doctor


__all__ = ["Finding", "Status", "diagnose", "doctor"]
