"""The former place of :mod:`pertura.effects._contexts`."""

from pertura.effects._contexts import Asked, Conditions

__all__ = ["Asked", "Conditions"]
