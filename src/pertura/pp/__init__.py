"""Preparation of perturbation data."""

from __future__ import annotations

from ._check import check
from ._guides import call_guides
from ._qc import qc_flags

__all__ = ["call_guides", "check", "qc_flags"]
