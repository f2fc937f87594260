"""Model families by name. Adding one is a module in this folder and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ramctl.config import Config, ModelSection

if TYPE_CHECKING:
    import torch

    from ramctl.backbones.base import Backbone


def load_backbone(config: Config, device: torch.device) -> Backbone:
    """Load the preset's model on a device; see :meth:`Backbone.load` for what it raises."""
    return load_model(config.model, device, precision=config.runtime.precision)


def load_model(spec: ModelSection, device: torch.device, *, precision: str) -> Backbone:
    """Load a model; forward passes run in ``precision`` ("float32" is the weights' own dtype, "bfloat16" autocast)."""
    import torch

    from ramctl.backbones.sd3 import StableDiffusion3

    families: dict[str, type[Backbone]] = {"sd3": StableDiffusion3}
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    return families[spec.family].load(spec, device, autocast)
