"""Model families by name. Adding one is a module in this folder and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ramctl.config import Config

if TYPE_CHECKING:
    import torch

    from ramctl.backbones.base import Backbone


def load_backbone(config: Config, device: torch.device) -> Backbone:
    """Load the preset's model on a device; see :meth:`Backbone.load` for what it raises."""
    import torch

    from ramctl.backbones.sd3 import StableDiffusion3

    families: dict[str, type[Backbone]] = {"sd3": StableDiffusion3}
    autocast = torch.bfloat16 if config.runtime.precision == "bfloat16" else None
    return families[config.model.family].load(config.model, device, autocast)
