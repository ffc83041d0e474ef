"""Preparation of perturbation data."""

from __future__ import annotations

from ._guides import call_guides
from ._qc import qc_flags

__all__ = ["call_guides", "qc_flags"]
