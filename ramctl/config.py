"""The schema of a preset: every key, its type, its range and what it means.

All sizes are totals over all processes; micro-batches are per process. ``ramctl presets explain KEY`` prints
the description of a key. Reading TOML, overrides and provenance are in :mod:`ramctl.settings`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
MicroBatch = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The model that is post-trained."""

    path: str = Field(description="Diffusers folder or hub id of the base model")
    family: Literal["sd3"] = Field(default="sd3", description="Backbone family, one module in ramctl/backbones")
    revision: str | None = Field(default=None, description="Hub revision, for a hub id")
    resolution: Positive = Field(default=512, description="Side of the square pictures, pixels")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Storage of the base weights; LoRA weights are always float32"
    )
    use_t5: bool = Field(
        default=True, description="Load the third (T5) text encoder; without it no zero padding is computed"
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = Field(default=256, description="T5 tokens per prompt")
    text_encoders: Literal["auto", "resident", "parked"] = Field(
        default="auto",
        description="parked keeps them in main memory and brings them to the GPU while prompts are embedded; auto does "
        "so on a GPU with less than 60 GB",
    )


class LoraSection(Section):
    """Which weights are trained."""

    rank: Annotated[int, Field(ge=0)] = Field(
        default=32, description="LoRA rank; 0 trains all weights of the transformer"
    )
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=64.0, description="LoRA alpha; the update is scaled by alpha / rank"
    )
    target_modules: tuple[str, ...] = Field(
        default=(
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
        ),
        description="Suffixes of the names of the linear layers that get a LoRA",
        # TOML and JSON have lists, not tuples; the items stay strict.
        strict=False,
    )
    init: Literal["gaussian", "default"] = Field(
        default="gaussian", description="Initialisation of A; B is always zero"
    )


class PromptsSection(Section):
    """Where prompts come from."""

    train: str = Field(description="JSONL file of training prompts")
    evaluation: str | None = Field(default=None, description="JSONL file of held-out prompts")


class RewardTerm(Section):
    """One scorer of the reward."""

    weight: float = Field(default=1.0, description="Factor of this scorer in the reward")
    output: str = Field(
        default="value",
        description="Which of the scorer's numbers is rewarded: value (partial credit, where there is such), strict "
        "(1 for a right picture, else 0), or one of its details by name",
    )
    offset: float = Field(default=0.0, description="Subtracted from that number: weight · (output − offset) / scale")
    scale: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="That number, less the offset, is divided by this before weighting"
    )
    options: dict[str, str | int | float | bool] = Field(default_factory=dict, description="Options of the scorer")


class RewardSection(Section):
    """What is rewarded: a weighted sum of scorers."""

    scorers: dict[str, RewardTerm] = Field(description="Scorer name → weight, output, offset, scale, options")
    max_failed_share: Share = Field(
        default=0.1, description="Stop when a larger share of a step's pictures cannot be scored"
    )
    self_test: bool = Field(
        default=True, description="Before training, let each scorer judge pictures with known answers"
    )

    @model_validator(mode="after")
    def _some(self) -> RewardSection:
        if not self.scorers:
            raise ValueError("at least one scorer is needed, e.g. [reward.scorers.geneval]")
        return self


class RolloutSection(Section):
    """How endpoints are drawn from the current model."""

    prompts_per_step: Positive = Field(default=48, description="Different prompts per step, over all processes")
    images_per_prompt: Annotated[int, Field(ge=2)] = Field(default=24, description="Group size: pictures per prompt")
    sampling_steps: Positive = Field(default=20, description="Steps of the sampler")
    sampler: Literal["euler", "dpm2m"] = Field(
        default="euler", description="Solver: euler (the paper's), or dpm2m, second order, for fewer steps"
    )
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        default=2.0, description="Classifier-free guidance of the rollouts; 1 is none"
    )
    guidance_min_noise: Share = Field(
        default=0.0, description="Lowest noise level at which to guide; below, a step is one pass instead of two"
    )
    guidance_max_noise: Share = Field(
        default=1.0, description="Highest noise level at which to guide; 1 is pure noise, the first step"
    )
    float8: bool = Field(
        default=False,
        description="On a GPU that has them (Ada, Hopper and later), with runtime.compile: draw the training pictures "
        "with 8-bit matrix products. Faster; the velocities that are learnt from, and evaluations, stay as they are",
    )
    micro_batch: MicroBatch = Field(default=0, description="Pictures sampled at once per process; 0 chooses")

    @model_validator(mode="after")
    def _ordered(self) -> RolloutSection:
        if self.guidance_min_noise > self.guidance_max_noise:
            raise ValueError("guidance_min_noise must not be above guidance_max_noise")
        return self

    @property
    def guidance_interval(self) -> tuple[float, float]:
        """Lowest and highest noise level at which to guide."""
        return self.guidance_min_noise, self.guidance_max_noise


class RamSection(Section):
    """Reinforce Adjoint Matching itself."""

    reward_multiplier: Annotated[float, Field(ge=0)] = Field(
        default=100.0, description="m, the weight of the reward against the reference"
    )
    noisings_per_image: Positive = Field(default=8, description="K, re-noisings per picture")
    updates_per_step: Positive = Field(
        default=1, description="Optimizer updates per step; each takes its share of the noisings"
    )
    time_power: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Noise times are drawn from p(t) ∝ t^time_power"
    )
    time_grid: Literal["continuous", "shifted", "sampler"] = Field(
        default="continuous",
        description="Draw noise times from all of [0, 1], from the model's 1,000 shifted training times, or from the "
        "rollout sampler's own steps; p(t) weighs them",
    )
    stratify_times: bool = Field(default=False, description="Spread the K times of a picture over K quantiles of p(t)")
    min_time: Annotated[float, Field(ge=0, lt=1)] = Field(default=1e-3, description="Smallest noise time")
    max_time: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="Largest noise time")
    advantage_scale: Literal["pooled_std", "none"] = Field(
        default="pooled_std", description="Divide advantages by the std of all rewards of the step, or not"
    )
    advantage_epsilon: Annotated[float, Field(ge=0)] = Field(default=1e-4, description="Added to that std")
    advantage_clip: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Bound on |advantage|; none by default"
    )
    old_ema_decay: Decay = Field(default=0.9, description="Largest decay of the old weights")
    old_ema_warmup: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="The old weights' decay at step k is min(warmup·(k + offset), old_ema_decay)"
    )
    old_ema_offset: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Offset of k there; with 0 the first step copies the trained weights whole"
    )
    path_cost: bool = Field(
        default=False, description="Use the path-cost-corrected target (removes RAM's bias, 7/5 of the cost)"
    )
    path_cost_min_time: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.02, description="Smallest intermediate time of the correction"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RamSection:
        if self.updates_per_step > self.noisings_per_image:
            raise ValueError(
                f"updates_per_step ({self.updates_per_step}) cannot exceed "
                f"noisings_per_image ({self.noisings_per_image})"
            )
        if self.min_time >= self.max_time:
            raise ValueError(f"min_time ({self.min_time}) must be below max_time ({self.max_time})")
        return self


class OptimizerSection(Section):
    """AdamW."""

    lr: Annotated[float, Field(gt=0)] = Field(default=3e-4, description="Learning rate after the warm-up")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="Steps of linear learning-rate warm-up")
    lr_half_life: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Steps in which the learning rate halves; none (the paper's) keeps it constant"
    )
    beta1: Decay = Field(default=0.9, description="AdamW β1")
    beta2: Decay = Field(default=0.99, description="AdamW β2")
    epsilon: Annotated[float, Field(gt=0)] = Field(default=1e-8, description="AdamW ε")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=1e-4, description="AdamW weight decay")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Gradient clipping; none by default"
    )


class TrainSection(Section):
    """How long, and from which seed."""

    steps: Positive = Field(default=500, description="Steps: rollout, score, regress, update")
    seed: Seed = Field(default=0, description="Seed of prompts, noise and times")
    micro_batch: MicroBatch = Field(default=0, description="Items per gradient pass and process; 0 chooses")
    sweep_micro_batch: MicroBatch = Field(default=0, description="Items per no-gradient pass and process; 0 chooses")
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations: less memory, more time")
    guard: bool = Field(
        default=True, description="Stop when the reward falls far below its best while the drift explodes"
    )


class EvaluationSection(Section):
    """The held-out check during training, and the defaults of `ramctl evaluate`."""

    every: Annotated[int, Field(ge=0)] = Field(
        default=50, description="Steps between evaluations; 0 evaluates at start and end only"
    )
    prompts: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Held-out prompts of the checks during training, spread over the tags; 0 takes all, as "
        "`ramctl evaluate` does",
    )
    images_per_prompt: Positive = Field(default=1, description="Pictures per held-out prompt")
    sampling_steps: Positive = Field(default=40, description="Steps of the sampler")
    sampler: Literal["euler", "dpm2m"] = Field(default="euler", description="Solver, as rollout.sampler")
    guidance_scale: Annotated[float, Field(ge=0)] = Field(default=4.5, description="Classifier-free guidance")
    negative_prompt: str = Field(default="", description="Negative prompt of the guided pass")
    seed: Seed = Field(default=1234, description="Seed of the evaluation's noise")
    ema_decay: Decay = Field(default=0.9, description="Decay of the evaluation weights' EMA")
    ema_warmup: bool = Field(default=False, description="Use min(ema_decay, (1+k)/(10+k)) instead of a constant decay")
    picture_prompts: Positive = Field(default=8, description="Fixed prompts shown in grids and in the report")


class CheckpointSection(Section):
    """When state is saved."""

    every: Positive = Field(default=10, description="Steps between checkpoints")
    keep: Annotated[int, Field(ge=1)] = Field(
        default=3, description="Newest checkpoints kept; the best one always stays"
    )


class TrackingSection(Section):
    """Where metrics go besides the run folder."""

    kind: Literal["mlflow", "none"] = Field(default="mlflow", description="Tracker")
    uri: str | None = Field(
        default=None, description="MLflow tracking URI; none is a local store in the working directory"
    )
    experiment: str = Field(default="ramctl", description="MLflow experiment")


class RuntimeSection(Section):
    """The machine."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes CUDA where there is one")
    precision: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Autocast of forward passes; targets, losses and LoRA stay float32"
    )
    compile: bool = Field(
        default=False,
        description="On a GPU: fuse the transformer's blocks and the decoder with torch.compile, twice as fast steps "
        "after a first one that takes some two minutes longer",
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        default=0, description="CPU threads per process; 0 shares the cores among the processes"
    )


class Config(Section):
    """A whole experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Name of the preset; the run folder is outputs/<name>"
    )
    description: str = Field(default="", description="One line for `ramctl presets`")
    model: ModelSection
    lora: LoraSection = LoraSection()
    prompts: PromptsSection
    reward: RewardSection
    rollout: RolloutSection = RolloutSection()
    ram: RamSection = RamSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    runtime: RuntimeSection = RuntimeSection()

    @model_validator(mode="after")
    def _computable(self) -> Config:
        if not self.lora.rank and self.model.dtype == "bfloat16" and self.runtime.precision == "float32":
            raise ValueError(
                "lora.rank = 0 trains float32 weights, which cannot read a bfloat16 model's embeddings without "
                "autocast; set runtime.precision = bfloat16 or model.dtype = float32"
            )
        if self.rollout.float8 and not (self.runtime.compile and self.runtime.precision == "bfloat16"):
            raise ValueError(
                "rollout.float8 pays in compiled blocks only, and rounds more than float32 is meant to; set "
                "runtime.compile = true and runtime.precision = bfloat16"
            )
        return self

    @property
    def images_per_step(self) -> int:
        """Endpoints of one step, over all processes."""
        return self.rollout.prompts_per_step * self.rollout.images_per_prompt

    @property
    def items_per_step(self) -> int:
        """Regression items of one step, over all processes."""
        return self.images_per_step * self.ram.noisings_per_image
