"""How the velocities of a step are computed and kept: in 8 bits for drawing only, and without loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.float8 import Float8Linear
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.engine.rollout import Endpoints
from tests.engine.steps import Build, build_fixture, gradients, pristine_fixture  # noqa: F401

FLOAT8 = ("rollout.float8", "true"), ("runtime.compile", "true"), ("precision", "bfloat16")


@pytest.mark.parametrize(("autocast", "dtype"), [(torch.bfloat16, torch.bfloat16), (None, torch.float32)])
def test_the_dtype_said_holds_a_velocity_exactly(
    build: Build, autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    trainer = build()
    backbone, network = trainer.backbone, trainer.policy.network("old")
    backbone._autocast_dtype = autocast
    text = backbone.encode(["a photo of a red circle"])
    x = torch.randn(1, *backbone.latent_shape)
    velocity = backbone.velocity(network, x, torch.tensor([0.7]), text)
    assert velocity.dtype == torch.float32 and backbone.velocity_dtype == dtype
    assert torch.equal(velocity.to(dtype).float(), velocity)


def test_narrow_velocities_change_no_bit_of_the_step(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = build(("path_cost", "true")), build(("path_cost", "true"))
    for trainer in (narrow, wide):
        trainer.backbone._autocast_dtype = torch.bfloat16
        trainer.step()  # then the three weight sets differ
    one = narrow.step()
    kept: list[torch.dtype] = []
    sweep = wide._sweep

    def noted(endpoints: Endpoints, share: range) -> object:
        result = sweep(endpoints, share)
        kept.append(result.v_ref.dtype)
        return result

    monkeypatch.setattr(StableDiffusion3, "velocity_dtype", torch.float32)
    monkeypatch.setattr(wide, "_sweep", noted)
    other = wide.step()
    assert kept == [torch.float32]
    assert one.metrics["loss"] == other.metrics["loss"] and one.metrics["drift"] == other.metrics["drift"] > 0
    assert torch.equal(gradients(narrow), gradients(wide))


def test_pictures_are_drawn_in_8_bits_and_targets_are_not(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(*FLOAT8)
    sampling, calls = False, set()
    velocity, sample = trainer.backbone.velocity, trainer.backbone.sample

    def noted(network: nn.Module, x_t: Tensor, t: Tensor, text: TextEmbeddings) -> Tensor:
        calls.add((sampling, any(isinstance(module, Float8Linear) for module in network.modules())))
        return velocity(network, x_t, t, text)

    def sampled(*arguments: object, **options: object) -> Tensor:
        nonlocal sampling
        sampling = True
        try:
            return sample(*arguments, **options)  # type: ignore[arg-type]
        finally:
            sampling = False

    monkeypatch.setattr(trainer.backbone, "velocity", noted)
    monkeypatch.setattr(trainer.backbone, "sample", sampled)
    plain = build(("precision", "bfloat16"))
    for one in (trainer, plain):
        one.backbone._autocast_dtype = torch.bfloat16
    eight, sixteen = trainer.step(), plain.step()
    assert calls == {(True, True), (False, False)}
    difference = abs(eight.images.astype(int) - sixteen.images).mean()
    assert 0 < difference < 3  # of 255
