"""Preparation of perturbation data."""

from __future__ import annotations

from pertura.data._collection import read_collection, to_collection

from ._check import check
from ._guides import call_guides
from ._qc import qc_flags

__all__ = ["call_guides", "check", "qc_flags", "read_collection", "to_collection"]
