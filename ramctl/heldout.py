"""The held-out evaluations of one run and what is kept of them: rows, values per picture, pictures of fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ramctl.backbones.base import Backbone
from ramctl.config import Config
from ramctl.engine.distributed import World
from ramctl.engine.evaluation import Evaluation, evaluate
from ramctl.engine.metrics import paired_interval, reward_metrics
from ramctl.engine.policy import Policy
from ramctl.images import make_grid, save_png
from ramctl.observer import Observer
from ramctl.prompts import Prompt, spread_by_tag
from ramctl.report import Comparison, Grid
from ramctl.runfolder import RunFolder
from ramctl.scorers.composite import Reward

_GRID_SCALE_TO = 128


class HeldOut:
    """Held-out evaluations of one run and what is kept of them: rows, values per picture, pictures of fixed prompts."""

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        policy: Policy,
        prompts: Sequence[Prompt],
        reward: Reward,
        world: World,
        folder: RunFolder,
        observer: Observer,
    ) -> None:
        self.config, self.backbone, self.policy, self.reward = config, backbone, policy, reward
        self.prompts, self.world, self.folder, self.observer = list(prompts), world, folder, observer
        shown = {id(prompt) for prompt in spread_by_tag(self.prompts, config.evaluation.picture_prompts)}
        self.shown = [i for i, prompt in enumerate(self.prompts) if id(prompt) in shown]

    def _file(self, step: int) -> Path:
        return self.folder.path / "samples" / f"step-{step:06d}.npz"

    def _grid_file(self, step: int) -> Path:
        return self._file(step).with_suffix(".png")

    def grid_files(self, step: int) -> list[Path]:
        """The grid picture of an evaluation, for the tracker."""
        return [path] if (path := self._grid_file(step)).is_file() else []

    def done_at(self, step: int) -> bool:
        """Whether that step's evaluation is on disk already (or there is nothing to evaluate)."""
        done = not self.prompts or (
            self._file(step).is_file() and any(row["step"] == step for row in self.folder.rows("evaluations.jsonl"))
        )
        return bool(self.world.broadcast(done))

    def evaluate(self, which: Literal["reference", "evaluation"], step: int) -> dict[str, float] | None:
        """Draw and score the held-out prompts with one set of weights; the metrics row, None without prompts."""
        if not self.prompts:
            return None
        per_prompt = self.config.evaluation.images_per_prompt
        total = len(self.world.share(len(self.prompts) * per_prompt))
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self.observer.phase("evaluate", done, total)

        result = evaluate(
            self.backbone,
            self.policy.network(which),
            self.prompts,
            self.reward,
            self.config.evaluation,
            self.world,
            micro_batch=self.config.rollout.micro_batch,
            progress=progress,
        )
        pictures = self._fixed_pictures(result, per_prompt)
        if self.world.is_main:
            self._keep(result, pictures, step)
        return {"step": step, **reward_metrics(result, "eval")}

    def _fixed_pictures(self, result: Evaluation, per_prompt: int) -> NDArray[np.uint8]:
        wanted = {i * per_prompt for i in self.shown}
        mine = {row: result.images[row - result.share.start] for row in result.share if row in wanted}
        merged = {row: image for part in self.world.gather(mine) for row, image in part.items()}
        return np.stack([merged[i * per_prompt] for i in self.shown])

    def _keep(self, result: Evaluation, pictures: NDArray[np.uint8], step: int) -> None:
        path = self._file(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {"value": result.value, **({} if result.strict is None else {"strict": result.strict})}
        columns.update({name: column for name, column in result.details.items() if name == "official"})
        per_prompt = self.config.evaluation.images_per_prompt
        shown = np.array([result.value[i * per_prompt] for i in self.shown], dtype=np.float32)
        np.savez_compressed(path, allow_pickle=False, pictures=pictures, shown_value=shown, **columns)
        scale = max(1, _GRID_SCALE_TO // pictures.shape[1])
        save_png(make_grid(pictures, columns=min(4, len(pictures)), scale=scale), self._grid_file(step))

    def comparisons(self, step: int) -> list[Comparison]:
        """Held-out means before and at ``step``, with the bootstrap interval of the paired difference per prompt."""
        if step == 0 or not (self._file(0).is_file() and self._file(step).is_file()):
            return []
        found = []
        per_prompt = self.config.evaluation.images_per_prompt
        with np.load(self._file(0)) as before, np.load(self._file(step)) as after:
            for name in ("strict", "official", "value"):
                if name not in before or name not in after or before[name].shape != after[name].shape:
                    continue
                # Pictures of one prompt are no independent sample: the interval is over prompts.
                pair = [np.nanmean(part[name].reshape(-1, per_prompt), axis=1) for part in (before, after)]
                _, low, high = paired_interval(pair[0], pair[1])
                found.append(
                    Comparison(name, float(np.nanmean(pair[0])), float(np.nanmean(pair[1])), low, high, len(pair[0]))
                )
        return found

    def grids(self, step: int) -> list[Grid]:
        """The fixed prompts' pictures before and after."""
        prompts = [self.prompts[i].text for i in self.shown]
        grids = []
        for label, at in (("before", 0), ("after", step)):
            if self._file(at).is_file() and (at or label == "before"):
                with np.load(self._file(at)) as kept:
                    scores = [float(v) for v in kept["shown_value"]]
                    grids.append(Grid(label, at, prompts, kept["pictures"], scores))
        return grids
