"""Rewards and metrics: one interface in :mod:`ramctl.scorers.base`, made by name in ``registry``."""
