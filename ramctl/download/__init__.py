"""Fetching what :mod:`ramctl.weights` describes: verified, resumable, atomic, safe beside another process.

``needs`` says which entries a scorer or a preset takes, ``http`` talks to servers, ``transfer`` brings one file,
``fetch`` brings entries.
"""

from ramctl.download.errors import DownloadError
from ramctl.download.fetch import Options, Outcome, Progress, Silent, estimate, fetch_all, plan_sizes, space_at
from ramctl.download.http import DEFAULT_HUB, Http, hub_address
from ramctl.download.needs import (
    Need,
    argument_for,
    everything,
    inventory,
    left_out,
    preset_needs,
    resolve,
    scorer_needs,
)

__all__ = [
    "DEFAULT_HUB",
    "DownloadError",
    "Http",
    "Need",
    "Options",
    "Outcome",
    "Progress",
    "Silent",
    "argument_for",
    "estimate",
    "everything",
    "fetch_all",
    "hub_address",
    "inventory",
    "left_out",
    "plan_sizes",
    "preset_needs",
    "resolve",
    "scorer_needs",
    "space_at",
]
