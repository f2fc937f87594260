from __future__ import annotations

import pytest
from pydantic import ValidationError

from ramctl.config import Config, LoraSection, OptimizerSection
from ramctl.config_keys import all_keys, leaves
from ramctl.resources import resource_dir
from ramctl.settings import load_settings

# Frozen on purpose: a key is a promise to everyone who has a preset, so a change is made here, too.
KEYS = """
name description
model.path model.family model.revision model.resolution model.dtype model.use_t5 model.max_sequence_length
model.text_encoders
lora.rank lora.alpha lora.target_modules lora.init
prompts.train prompts.evaluation
reward.scorers.NAME.weight reward.scorers.NAME.output reward.scorers.NAME.offset reward.scorers.NAME.scale
reward.scorers.NAME.options.OPTION
reward.max_failed_share reward.self_test
rollout.prompts_per_step rollout.images_per_prompt rollout.sampling_steps rollout.sampler
rollout.guidance_scale rollout.guidance_min_noise rollout.guidance_max_noise
rollout.float8 rollout.micro_batch
ram.reward_multiplier ram.noisings_per_image ram.updates_per_step ram.time_power ram.time_grid ram.stratify_times
ram.min_time ram.max_time ram.advantage_scale ram.advantage_epsilon ram.advantage_clip ram.old_ema_decay
ram.old_ema_warmup ram.old_ema_offset ram.path_cost ram.path_cost_min_time
optimizer.lr optimizer.warmup_steps optimizer.lr_half_life optimizer.beta1 optimizer.beta2 optimizer.epsilon
optimizer.weight_decay optimizer.max_grad_norm
train.steps train.seed train.micro_batch train.sweep_micro_batch train.gradient_checkpointing train.guard
evaluation.every evaluation.prompts evaluation.images_per_prompt evaluation.sampling_steps
evaluation.sampler evaluation.guidance_scale evaluation.negative_prompt evaluation.seed evaluation.ema_decay
evaluation.ema_warmup evaluation.picture_prompts
checkpoint.every checkpoint.keep
tracking.kind tracking.uri tracking.experiment
runtime.device runtime.precision runtime.compile runtime.threads
"""

PRESETS = sorted(path.stem for path in resource_dir("presets").glob("*.toml"))


def test_keys_are_frozen() -> None:
    assert all_keys() == KEYS.split()


def test_every_key_says_what_it_is() -> None:
    assert [leaf.path for leaf in leaves() if not leaf.field.description] == []


@pytest.mark.parametrize("name", PRESETS)
def test_every_shipped_preset_loads_and_is_called_like_its_file(name: str) -> None:
    config = load_settings(name).config
    assert config.name == name
    assert config.description


def test_there_are_presets() -> None:
    assert "geneval-tiny" in PRESETS


def test_derived_sizes_are_totals() -> None:
    config = load_settings("geneval-tiny", overrides=[("prompts_per_step", "3")]).config
    rollout = config.rollout
    assert config.images_per_step == 3 * rollout.images_per_prompt
    assert config.items_per_step == config.images_per_step * config.ram.noisings_per_image


def test_sections_are_strict_and_immutable() -> None:
    with pytest.raises(ValidationError):
        OptimizerSection(lr="0.1")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        OptimizerSection(learning_rate=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        OptimizerSection().lr = 1.0


def test_a_list_serves_as_the_tuple_of_target_modules_but_its_items_stay_strict() -> None:
    assert LoraSection(target_modules=["a", "b"]).target_modules == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        LoraSection(target_modules=["a", 1])  # type: ignore[arg-type]


def test_config_survives_json() -> None:
    config = load_settings("geneval-tiny").config
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert Config.model_validate(config.model_dump(mode="json")) == config
