"""Preparation of perturbation data."""

from __future__ import annotations

from ._guides import call_guides

__all__ = ["call_guides"]
