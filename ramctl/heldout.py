"""The held-out evaluations of one run and what is kept of them: rows, values per picture, pictures of fixed prompts."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ramctl.backbones.base import Backbone
from ramctl.config import Config
from ramctl.engine.distributed import World
from ramctl.engine.evaluation import Evaluation, evaluate
from ramctl.engine.metrics import Column, paired_interval, reward_metrics
from ramctl.engine.policy import Policy
from ramctl.engine.trainer import phase_batch
from ramctl.errors import ScorerError
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
        self.batch = phase_batch(config, backbone, "sample")
        self.shown = self._selection(config.evaluation.picture_prompts)
        lines = json.dumps([prompt.to_json() for prompt in self.prompts], sort_keys=True)
        self.digest = hashlib.sha256(lines.encode()).hexdigest()

    def _selection(self, count: int) -> list[int]:
        """Which prompts are shown where ``count`` are, in the order of the file."""
        shown = {id(prompt) for prompt in spread_by_tag(self.prompts, count)}
        return [i for i, prompt in enumerate(self.prompts) if id(prompt) in shown]

    def _file(self, step: int) -> Path:
        return self.folder.path / "samples" / f"step-{step:06d}.npz"

    def _grid_file(self, step: int) -> Path:
        return self._file(step).with_suffix(".png")

    def grid_files(self, step: int) -> list[Path]:
        """The grid picture of an evaluation, for the tracker."""
        return [path] if (path := self._grid_file(step)).is_file() else []

    def done_at(self, step: int) -> bool:
        """Whether that step's evaluation is on disk already (or there is nothing to evaluate)."""
        done = not self.prompts or (self.world.is_main and self._row(step) is not None and self._kept(step))
        return bool(self.world.broadcast(done))

    def mean_at(self, step: int) -> float | None:
        """The mean held-out value in that step's row; None where there is no row, or no picture was scored."""
        row = self._row(step) if self.world.is_main else None
        mean: float | None = self.world.broadcast(None if row is None else row["eval/mean"])
        return mean

    def _row(self, step: int) -> dict[str, Any] | None:
        return next((row for row in self.folder.rows("evaluations.jsonl") if row["step"] == step), None)

    def _kept(self, step: int) -> bool:
        """Whether that step's values are on disk, and those of these prompts (older files do not say of which)."""
        try:
            with np.load(self._file(step)) as kept:
                return "prompts_sha256" not in kept or str(kept["prompts_sha256"]) == self.digest
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):  # absent or damaged
            return False

    def evaluate(self, which: Literal["reference", "evaluation"], step: int) -> dict[str, float] | None:
        """Draw and score the held-out prompts with one set of weights; the metrics row, None without prompts.

        Raises:
            ScorerError: a larger share of the pictures than ``reward.max_failed_share`` could not be scored; nothing
                is kept of them.
        """
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
            micro_batch=self.batch,
            progress=progress,
        )
        self._refuse_failures(result, step)
        pictures = self._fixed_pictures(result, per_prompt)
        if self.world.is_main:
            self._keep(result, pictures, step)
        return {"step": step, **reward_metrics(result, "eval")}

    def _refuse_failures(self, result: Evaluation, step: int) -> None:
        failed = np.flatnonzero(result.failed)
        if len(failed) > self.config.reward.max_failed_share * len(result.failed):
            first = int(failed[0])
            raise ScorerError(
                f"Held-out evaluation at step {step}: {len(failed)} of {len(result.failed)} pictures could not be "
                f"scored; the first one, for {result.prompts[first].text!r}: {result.errors[first]}"
            )

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
        texts = np.array([self.prompts[i].text for i in self.shown])
        # Renamed when whole, so that a kill leaves no half file; in the run's folder, where leftovers are swept.
        temporary = self.folder.path / f".{path.stem}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as stream:
                np.savez_compressed(
                    stream,
                    allow_pickle=False,
                    pictures=pictures,
                    shown_value=shown,
                    shown_prompts=texts,
                    prompts_sha256=np.array(self.digest),
                    **columns,
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        scale = max(1, _GRID_SCALE_TO // pictures.shape[1])
        save_png(make_grid(pictures, columns=min(4, len(pictures)), scale=scale), self._grid_file(step))

    def comparisons(self, step: int) -> list[Comparison]:
        """Held-out means before and at ``step``, with the bootstrap interval of the paired difference per prompt.

        Compared are prompts with a scored picture in both; a column without such a prompt is left out.
        """
        if step == 0 or not (self._file(0).is_file() and self._file(step).is_file()):
            return []
        found = []
        per_prompt = self.config.evaluation.images_per_prompt
        with np.load(self._file(0)) as before, np.load(self._file(step)) as after:
            for name in ("strict", "official", "value"):
                if name not in before or name not in after or before[name].shape != after[name].shape:
                    continue
                # Pictures of one prompt are no independent sample: the interval is over prompts.
                pair = np.stack([_mean_per_prompt(part[name], per_prompt) for part in (before, after)])
                pair = pair[:, np.isfinite(pair).all(axis=0)]
                if not pair.shape[1]:
                    continue
                _, low, high = paired_interval(pair[0], pair[1])
                found.append(Comparison(name, float(pair[0].mean()), float(pair[1].mean()), low, high, pair.shape[1]))
        return found

    def grids(self, step: int) -> list[Grid]:
        """The fixed prompts' pictures before and after."""
        grids = []
        for label, at in (("before", 0), ("after", step)):
            if self._file(at).is_file() and (at or label == "before"):
                with np.load(self._file(at)) as kept:
                    scores = [float(v) for v in kept["shown_value"]]
                    grids.append(Grid(label, at, self._shown_prompts(kept), kept["pictures"], scores))
        return grids

    def _shown_prompts(self, kept: Mapping[str, NDArray[Any]]) -> list[str]:
        """The texts that a file's pictures belong to; of a file without them, those that so many pictures had."""
        if "shown_prompts" in kept:
            return [str(text) for text in kept["shown_prompts"]]
        return [self.prompts[i].text for i in self._selection(len(kept["pictures"]))]


def _mean_per_prompt(values: Column, per_prompt: int) -> Column:
    """Mean [N / per_prompt] of the finite ones of each prompt's ``per_prompt`` values [N]; NaN where none is."""
    groups = values.reshape(-1, per_prompt)
    good = np.isfinite(groups)
    count = good.sum(axis=1)
    sums = np.where(good, groups, 0).sum(axis=1)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan).astype(np.float32)
