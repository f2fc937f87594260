from __future__ import annotations

from pathlib import Path

import pytest

from ramctl import resources, settings
from ramctl.config_keys import ALIASES, find_keys, parse_overrides, resolve_key, toml_value
from ramctl.errors import ConfigError, UsageError
from ramctl.settings import (
    Settings,
    all_keys,
    config_differences,
    explain,
    list_presets,
    load_settings,
    settings_toml,
    write_settings,
)

MINIMAL = """
name = "mine"
[model]
path = "some/model"
[prompts]
train = "prompts.jsonl"
[reward.scorers.ocr]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    return path


def preset(folder: Path, text: str, name: str = "bad.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def complaint(preset: str, *overrides: tuple[str, str], config_file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(preset, config_file=config_file, overrides=overrides)
    text = str(caught.value)
    assert len(text.splitlines()) <= 2
    return text


class TestPrecedence:
    def test_default_then_preset_then_file_then_command_line(self, tmp_path: Path) -> None:
        file = tmp_path / "my.toml"
        file.write_text("[optimizer]\nbeta1 = 0.8\nlr = 2e-3\n[train]\nsteps = 7\n")
        loaded = load_settings("geneval-tiny", config_file=file, overrides=[("lr", "1e-4")])
        config, source = loaded.config, loaded.provenance
        assert (config.optimizer.beta2, source["optimizer.beta2"]) == (0.99, "default")
        assert (config.model.resolution, source["model.resolution"]) == (64, "preset geneval-tiny")
        assert (config.optimizer.beta1, source["optimizer.beta1"]) == (0.8, f"file {file}")
        assert (config.train.steps, source["train.steps"]) == (7, f"file {file}")
        assert (config.optimizer.lr, source["optimizer.lr"]) == (1e-4, "command line")

    def test_every_value_has_a_source_and_nothing_else_has(self) -> None:
        loaded = load_settings("geneval-tiny")
        fixed = {key for key in all_keys() if not any(part.isupper() for part in key.split("."))}
        scorer = {f"reward.scorers.geneval.{key}" for key in ("weight", "offset", "scale", "output")}
        options = {f"reward.scorers.geneval.options.{key}" for key in ("detector", "partial")}
        assert set(loaded.provenance) == fixed | scorer | options

    def test_provenance_cannot_be_changed(self) -> None:
        with pytest.raises(TypeError):
            load_settings("geneval-tiny").provenance["x"] = "y"  # type: ignore[index]

    def test_a_later_override_of_the_same_key_wins(self) -> None:
        pairs = [("lr", "1e-4"), ("optimizer.lr", "2e-4")]
        assert load_settings("geneval-tiny", overrides=pairs).config.optimizer.lr == 2e-4

    def test_a_preset_may_be_a_path(self, mine: Path) -> None:
        loaded = load_settings(str(mine))
        assert loaded.config.name == "mine"
        assert loaded.provenance["model.path"] == f"file {mine}"
        assert loaded.config.reward.scorers["ocr"].weight == 1.0

    def test_a_byte_order_mark_is_no_error(self, mine: Path) -> None:
        mine.write_text("\ufeff" + MINIMAL, encoding="utf-8")
        assert load_settings(str(mine)).config.name == "mine"

    def test_whole_numbers_serve_as_floats_and_lists_as_tuples(self, mine: Path) -> None:
        mine.write_text(MINIMAL + '[optimizer]\nlr = 1\n[lora]\ntarget_modules = ["a"]\n')
        config = load_settings(str(mine)).config
        assert isinstance(config.optimizer.lr, float)
        assert config.lora.target_modules == ("a",)


class TestExtends:
    def test_base_lies_below_and_keeps_its_label(self, tmp_path: Path) -> None:
        path = preset(tmp_path, 'name = "gpu"\nextends = "geneval-tiny"\n[optimizer]\nlr = 5e-4\n')
        loaded = load_settings(path)
        assert loaded.config.optimizer.lr == 5e-4
        assert loaded.provenance["optimizer.lr"] == f"file {path}"
        assert loaded.config.optimizer.max_grad_norm == 1.0
        assert loaded.provenance["optimizer.max_grad_norm"] == "preset geneval-tiny"

    def test_chain_of_files_beside_one_another(self, mine: Path) -> None:
        folder = mine.parent
        preset(folder, 'name = "b"\nextends = "./mine.toml"\n[train]\nsteps = 5\nseed = 4\n', "b.toml")
        top = preset(folder, 'name = "c"\nextends = "./b.toml"\n[train]\nsteps = 6\n', "c.toml")
        train = load_settings(top).config.train
        assert (train.steps, train.seed) == (6, 4)

    def test_name_is_not_inherited(self, tmp_path: Path) -> None:
        path = preset(tmp_path, 'extends = "geneval-tiny"\n')
        text = complaint(path)
        assert text.startswith(f"name is missing (file {path})")

    def test_circle_is_named(self, tmp_path: Path) -> None:
        first = preset(tmp_path, 'name = "a"\nextends = "./b.toml"\n', "a.toml")
        preset(tmp_path, 'name = "b"\nextends = "./a.toml"\n', "b.toml")
        text = complaint(first)
        assert "circle" in text
        assert text.count("a.toml") == 2
        assert text.count("b.toml") == 1

    @pytest.mark.parametrize(
        ("base", "words"),
        [
            ('"geneval-tinny"', "Did you mean 'geneval-tiny'"),
            ('"./no.toml"', "no.toml does not exist"),
            ("3", "extends must be the name of one preset, got 3"),
            ('["geneval-tiny"]', "extends must be the name of one preset"),
        ],
    )
    def test_wrong_base(self, tmp_path: Path, base: str, words: str) -> None:
        assert words in complaint(preset(tmp_path, f'name = "a"\nextends = {base}\n'))

    def test_config_file_cannot_extend(self, tmp_path: Path) -> None:
        file = Path(preset(tmp_path, 'extends = "geneval-tiny"\n'))
        assert "works in presets only" in complaint("geneval-tiny", config_file=file)


class TestFiles:
    def test_unknown_preset_lists_the_near_and_all(self) -> None:
        text = complaint("geneval-tinny")
        assert text.startswith("There is no preset 'geneval-tinny'. Did you mean 'geneval-tiny'")
        assert "The presets are geneval, geneval-24gb, geneval-tiny" in text

    def test_option_in_the_place_of_the_preset(self) -> None:
        assert "The preset comes first" in complaint("--lr")

    def test_absent_file(self, tmp_path: Path) -> None:
        assert complaint(str(tmp_path / "no.toml")).endswith("no.toml does not exist.")
        assert "my.toml does not exist" in complaint("geneval-tiny", config_file=tmp_path / "my.toml")

    def test_folder_in_the_place_of_a_file(self, tmp_path: Path) -> None:
        assert "cannot be read: Is a directory" in complaint(f"{tmp_path}/")

    def test_syntax_error_has_its_line(self, tmp_path: Path) -> None:
        path = preset(tmp_path, 'name = "a"\n\n[train\nsteps = 1\n')
        assert f"file {path} is not valid TOML, line 3: " in complaint(path)

    def test_key_given_twice(self, tmp_path: Path) -> None:
        assert "line 2" in complaint(preset(tmp_path, 'name = "a"\nname = "b"\n'))

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "x.toml"
        path.write_bytes(b"\xff\xfe\x00")
        assert "not a text file in UTF-8" in complaint(str(path))


class TestBadKeysAndValues:
    @pytest.mark.parametrize(
        ("toml", "words"),
        [
            (
                "[ram]\nreward_multipler = 3",
                "Unknown key 'ram.reward_multipler' in file {}. Did you mean 'ram.re",
            ),
            ("[ram]\nlr = 3", "Unknown key 'ram.lr' in file {}. Did you mean 'optimizer.lr'?"),
            ("[optimiser]\nlr = 3", "Unknown key 'optimiser' in file {}. Did you mean 'optimizer'?"),
            ("[evaluate]\nevery = 3", "Unknown key 'evaluate' in file {}. Did you mean 'evaluation'?"),
            ("[optimizer]\nlearning_rate = 3", "Did you mean 'optimizer.lr'?"),
            ("[qqqq]\nx = 3", "Unknown key 'qqqq' in file {}. The sections are model, lora,"),
            ("[ram]\nqqqq = 3", "`ramctl presets explain ram` lists the keys of [ram]."),
            ("[reward.scorers.ocr2]\noptoins = {{}}", "Did you mean 'reward.scorers.ocr2.options'?"),
            ("[train]\nsteps = 'ten'", 'train.steps must be a whole number, got "ten" (file {}).'),
            ("[train]\nsteps = 10.0", "train.steps must be a whole number, got 10.0 (file {})."),
            ("[train]\nsteps = true", "train.steps must be a whole number, got true (file {})."),
            ("[train]\nguard = 1", "train.guard must be true or false, got 1 (file {})."),
            ("[optimizer]\nlr = [1]", "optimizer.lr must be a number, got [1] (file {})."),
            ("[optimizer.lr]\nx = 1", "optimizer.lr must be a number, got a table (file {})."),
            ("[optimizer]\nlr = 2020-01-01", "optimizer.lr must be a number, got 2020-01-01 (file {})."),
            ("[optimizer]\nlr = nan", "optimizer.lr must be a finite number, got nan (file {})."),
            (
                "[optimizer]\nmax_grad_norm = 'x'",
                'optimizer.max_grad_norm must be a number, or none, got "x"',
            ),
            ("[lora]\ntarget_modules = 'a'", "lora.target_modules must be a list of texts such as"),
            ("[lora]\ntarget_modules = ['a', 2]", 'such as ["a", "b"], got ["a", 2] (file {}).'),
            ("[reward.scorers.ocr2.options]\na = [1]", "reward.scorers.ocr2.options.a must be text, a whole"),
            (
                "[rollout]\nimages_per_prompt = 1",
                "rollout.images_per_prompt must be at least 2, got 1 (file {}).",
            ),
            ("[optimizer]\nlr = 0", "optimizer.lr must be above 0, got 0 (file {})."),
            ("[train]\nseed = 9223372036854775808", "train.seed must be at least 0 and below 9223372036854775808, got"),
            (
                "[train]\nseed = 9223372036854775808",
                "train.seed must be at least 0 and below 9223372036854775808, got 9",
            ),
            (
                "[optimizer]\nbeta1 = 1.0",
                "optimizer.beta1 must be at least 0 and below 1, got 1.0 (file {}).",
            ),
            (
                "[tracking]\nkind = 'wandb'",
                'tracking.kind must be one of "mlflow", "none", got "wandb" (file {}).',
            ),
        ],
    )
    def test_message(self, mine: Path, toml: str, words: str) -> None:
        mine.write_text(MINIMAL + toml.replace("{{}}", "{}"))
        assert words.replace("{}", str(mine)).replace("{{}}", "{}") in complaint(str(mine))

    def test_section_given_as_a_value(self, mine: Path) -> None:
        mine.write_text("ram = 3\n" + MINIMAL)
        assert complaint(str(mine)) == f"ram must be a table, got 3 (file {mine})."

    def test_key_at_the_top_that_belongs_in_a_section(self, mine: Path) -> None:
        mine.write_text("lr = 3\n" + MINIMAL)
        assert f"Unknown key 'lr' in file {mine}. Did you mean 'optimizer.lr'?" in complaint(str(mine))

    def test_missing_value_and_section(self, tmp_path: Path) -> None:
        text = complaint(preset(tmp_path, 'name = "a"\n[prompts]\n[reward.scorers.ocr]\n[model]\npath = "x"\n'))
        assert text.startswith("prompts.train is missing (file ")
        text = complaint(preset(tmp_path, 'name = "a"\n[prompts]\ntrain = "x"\n[reward.scorers.ocr]\n'))
        assert text.startswith("The table [model] is missing (file ")
        assert "model.path" in text

    def test_reward_without_a_scorer(self, mine: Path) -> None:
        mine.write_text(MINIMAL.replace(".ocr]", "]"))
        assert "at least one scorer is needed, e.g. [reward.scorers.geneval]" in complaint(str(mine))

    def test_bad_name_in_plain_words(self) -> None:
        text = complaint("geneval-tiny", ("name", "my run"))
        assert text.startswith("name must be letters, digits")
        assert 'got "my run" (command line).' in text

    def test_misspelled_key_comes_before_what_is_missing(self, mine: Path) -> None:
        mine.write_text(MINIMAL.replace("train =", "trian ="))
        text = complaint(str(mine))
        assert text.startswith("Unknown key 'prompts.trian'")
        assert text.endswith("(1 more problem after this one)")

    def test_several_problems_are_counted(self) -> None:
        text = complaint("geneval-tiny", ("lr", "x"), ("steps", "0"), ("rank", "-1"))
        assert text.endswith("(2 more problems after this one)")

    def test_rule_between_keys_names_both_sources(self) -> None:
        text = complaint("geneval-tiny", ("updates_per_step", "9"))
        assert "updates_per_step (9) cannot exceed noisings_per_image (8)" in text
        assert "updates_per_step: command line" in text
        assert "noisings_per_image: preset geneval-tiny" in text
        text = complaint("geneval-tiny", ("lora.rank", "0"), ("model.dtype", "bfloat16"), ("precision", "float32"))
        assert text.startswith("lora.rank = 0 trains float32 weights")
        assert "(model.dtype: command line; lora.rank: command line; runtime.precision: command line)." in text
        text = complaint("geneval-tiny", ("guidance_min_noise", "0.9"), ("guidance_max_noise", "0.2"))
        assert "[rollout] guidance_min_noise must not be above guidance_max_noise" in text

    def test_source_is_the_layer_that_set_the_value(self, tmp_path: Path) -> None:
        base = preset(tmp_path, MINIMAL + "[train]\nsteps = 0\n", "base.toml")
        top = preset(tmp_path, 'name = "top"\nextends = "./base.toml"\n[train]\nseed = 1\n', "top.toml")
        assert complaint(top).endswith(f"got 0 (file {Path(base)}).")

    def test_long_values_are_cut(self) -> None:
        assert len(complaint("geneval-tiny", ("lr", "x" * 5000))) < 200


class TestOverrides:
    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("optimizer.lr", "1e-4", 1e-4),
            ("lr", "1", 1.0),
            ("reward-multiplier", "50", 50.0),
            ("ram.reward_multiplier", "50", 50.0),
            ("train.steps", "1_000", 1000),
            ("path_cost", "True", True),
            ("use-t5", "false", False),
            ("negative_prompt", '"quoted", as it stands', '"quoted", as it stands'),
            ("experiment", "none", "none"),
            ("evaluation.prompts", "12", 12),
            ("prompts.evaluation", "none", None),
            ("max_grad_norm", "null", None),
            ("advantage-clip", "5", 5.0),
            ("advantage_scale", "none", "none"),
            ("target_modules", '["attn.to_q", "x"]', ("attn.to_q", "x")),
            ("reward.scorers.geneval.weight", "0.5", 0.5),
            ("reward.scorers.geneval.options.partial", "clamped", "clamped"),
            ("reward.scorers.geneval.options.flag", "true", True),
            ("reward.scorers.geneval.options.side", "64", 64),
            ("reward.scorers.geneval.options.side", '"64"', "64"),
        ],
    )
    def test_value_is_read_by_the_type_of_its_key(self, key: str, text: str, value: object) -> None:
        loaded = load_settings("geneval-tiny", overrides=[(key, text)])
        path = resolve_key(key)
        found: object = loaded.config.model_dump()
        for part in path:
            assert isinstance(found, dict)
            found = found[part]
        assert found == value
        assert type(found) is type(value)
        assert loaded.provenance[".".join(path)] == "command line"

    def test_preferred_names_are_real_keys(self) -> None:
        assert set(ALIASES.values()) <= set(all_keys())
        config = load_settings("geneval-tiny", overrides=[("seed", "3"), ("steps", "4")]).config
        assert (config.train.seed, config.evaluation.seed, config.train.steps) == (3, 1234, 4)

    def test_a_scorer_may_be_added(self) -> None:
        pairs = [("reward.scorers.jpeg-compressibility.weight", "0.1")]
        scorers = load_settings("geneval-tiny", overrides=pairs).config.reward.scorers
        assert list(scorers) == ["geneval", "jpeg-compressibility"]
        assert scorers["jpeg-compressibility"].weight == 0.1

    @pytest.mark.parametrize("name", ["micro_batch", "every", "guidance_scale", "sampling-steps", "images_per_prompt"])
    def test_ambiguous_name_lists_the_full_keys(self, name: str) -> None:
        text = complaint("geneval-tiny", (name, "1"))
        wanted = [key for key in all_keys() if key.split(".")[-1] == name.replace("-", "_")]
        assert len(wanted) == 2
        assert all(key in text for key in wanted)

    @pytest.mark.parametrize(
        ("key", "words"),
        [
            (
                "rewad_multiplier",
                "Unknown key 'rewad_multiplier' on the command line. Did you mean 'ram.reward_",
            ),
            ("train.stepz", "Did you mean 'train.steps'?"),
            ("weight", "give reward.scorers.NAME.weight"),
            ("reward.scorers.NAME.weight", "Unknown key"),
            ("ram", "'ram' is a section, not a key"),
            ("reward.scorers.geneval", "is a section, not a key"),
            ("", "Unknown key ''"),
            ("optimizer.", "Unknown key 'optimizer.'"),
            ("extends", "Unknown key 'extends'"),
        ],
    )
    def test_bad_key(self, key: str, words: str) -> None:
        assert words in complaint("geneval-tiny", (key, "1"))

    @pytest.mark.parametrize(
        ("key", "text", "words"),
        [
            ("lr", "fast", 'optimizer.lr must be a number, got "fast" (command line).'),
            ("steps", "1.5", "train.steps must be a whole number, got 1.5 (command line)."),
            ("guard", "yes", 'train.guard must be true or false, got "yes" (command line).'),
            ("lr", "none", "optimizer.lr must be a number, got none (command line)."),
            ("lr", "inf", "optimizer.lr must be a finite number, got inf (command line)."),
            ("steps", "", 'train.steps must be a whole number, got "" (command line).'),
            ("target_modules", "a,b", 'got "a,b" (command line).'),
            (
                "device",
                "tpu",
                'runtime.device must be one of "auto", "cpu", "cuda", got "tpu" (command line).',
            ),
            ("rollout.images_per_prompt", "1", "must be at least 2, got 1 (command line)."),
        ],
    )
    def test_bad_value(self, key: str, text: str, words: str) -> None:
        assert words in complaint("geneval-tiny", (key, text))


class TestParseOverrides:
    @pytest.mark.parametrize(
        ("words", "pairs"),
        [
            (["--lr", "1e-4"], [("optimizer.lr", "1e-4")]),
            (["--lr=1e-4", "--seed", "3"], [("optimizer.lr", "1e-4"), ("train.seed", "3")]),
            (["--path-cost"], [("ram.path_cost", "true")]),
            (["--path-cost", "--lr", "1"], [("ram.path_cost", "true"), ("optimizer.lr", "1")]),
            (["--path-cost", "false"], [("ram.path_cost", "false")]),
            (["--no-guard"], [("train.guard", "false")]),
            (["--negative-prompt="], [("evaluation.negative_prompt", "")]),
            (["--lora.rank", "-1"], [("lora.rank", "-1")]),
            ([], []),
        ],
    )
    def test_pairs(self, words: list[str], pairs: list[tuple[str, str]]) -> None:
        assert parse_overrides(words) == pairs

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--lr"], "--lr needs a value: a number."),
            (["--lr", "--seed", "3"], "--lr needs a value"),
            (["extra"], "Unexpected argument 'extra'"),
            (["--path-cost", "extra"], "Unexpected argument 'extra'"),
            (["-x"], "Unexpected argument '-x'"),
            (["--"], "Unexpected argument '--'"),
            (["--fresf"], "Unknown option --fresf. Did you mean --fresh?"),
            (["--lrr", "1"], "Unknown key 'lrr' on the command line. Did you mean 'optimizer.lr'?"),
            (["--no-lr"], "Unknown key 'no-lr'"),
            (["--every", "1"], "evaluation.every or checkpoint.every"),
        ],
    )
    def test_usage_error(self, words: list[str], message: str) -> None:
        with pytest.raises(UsageError) as caught:
            parse_overrides(words, options=("--fresh", "--dry-run"))
        assert message in str(caught.value)


class TestWriting:
    @pytest.mark.parametrize("name", [item.name for item in list_presets()])
    def test_reads_back_equal(self, name: str, tmp_path: Path) -> None:
        loaded = load_settings(name)
        write_settings(loaded, tmp_path / "config.toml", ["ramctl", "two\nlines"])
        again = load_settings(str(tmp_path / "config.toml"))
        assert again.config == loaded.config
        assert list(tmp_path.iterdir()) == [tmp_path / "config.toml"]

    def test_unusual_values_read_back_equal(self, mine: Path) -> None:
        odd = 'a "b" \\ \t ü # \u2028 \x7f'
        pairs = [
            ("negative_prompt", odd),
            ("target_modules", '["x#y", "z\\"w"]'),
            ("max_grad_norm", "none"),
            ("epsilon", "1e-12"),
            ("reward.scorers.jpeg-compressibility.options.a", "true"),
            ("reward.scorers.jpeg-compressibility.options.b", "1.0"),
        ]
        loaded = load_settings("geneval-tiny", overrides=pairs)
        write_settings(loaded, mine, [])
        again = load_settings(str(mine)).config
        assert again == loaded.config
        assert again.evaluation.negative_prompt == odd
        assert again.optimizer.max_grad_norm is None

    def test_a_scorer_with_an_odd_name_reads_back_equal(self, mine: Path) -> None:
        mine.write_text(MINIMAL + '[reward.scorers."a.b c"]\nweight = 2.0\n')
        loaded = load_settings(str(mine))
        assert loaded.provenance['reward.scorers."a.b c".weight'] == f"file {mine}"
        write_settings(loaded, mine)
        assert load_settings(str(mine)).config == loaded.config

    def test_each_line_says_where_its_value_came_from(self) -> None:
        text = settings_toml(load_settings("geneval-tiny", overrides=[("lr", "1e-4")]), ["made by a test"])
        lines = text.splitlines()
        assert lines[0] == "# made by a test"
        assert "lr = 0.0001  # command line" in lines
        assert "resolution = 64  # preset geneval-tiny" in lines
        assert "beta1 = 0.9  # default" in lines
        assert '# revision = "none"  # default' in lines

    def test_a_line_break_in_a_file_name_stays_in_the_comment(self, mine: Path) -> None:
        loaded = load_settings(str(mine))
        broken = Settings(loaded.config, dict.fromkeys(loaded.provenance, "file a\nname = 'b'"))
        mine.write_text(settings_toml(broken))
        assert load_settings(str(mine)).config == loaded.config

    def test_none_in_a_file_takes_a_value_away(self, tmp_path: Path) -> None:
        file = tmp_path / "my.toml"
        file.write_text('[optimizer]\nmax_grad_norm = "none"\n')
        assert load_settings("geneval-tiny").config.optimizer.max_grad_norm == 1.0
        assert load_settings("geneval-tiny", config_file=file).config.optimizer.max_grad_norm is None

    def test_a_failed_write_leaves_the_old_file(self, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: Path, *_: object, **__: object) -> int:
            self.touch()
            raise OSError(28, "No space left on device")

        loaded = load_settings(str(mine))
        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            write_settings(loaded, mine)
        assert mine.read_text() == MINIMAL
        assert list(mine.parent.iterdir()) == [mine]


class TestDifferences:
    def test_none_for_equal(self) -> None:
        config = load_settings("geneval-tiny").config
        assert config_differences(config, config) == []

    def test_changed_added_and_unset_keys(self) -> None:
        a = load_settings("geneval-tiny").config
        pairs = [("lr", "0.0005"), ("max_grad_norm", "none"), ("reward.scorers.ocr.weight", "2")]
        b = load_settings("geneval-tiny", overrides=pairs).config
        assert config_differences(a, b) == [
            "optimizer.lr: 0.001 → 0.0005",
            "optimizer.max_grad_norm: 1.0 → none",
            "reward.scorers.ocr.weight: absent → 2.0",
            'reward.scorers.ocr.output: absent → "value"',
            "reward.scorers.ocr.offset: absent → 0.0",
            "reward.scorers.ocr.scale: absent → 1.0",
        ]

    def test_a_change_of_type_is_a_change(self) -> None:
        key = "reward.scorers.geneval.options.x"
        a = load_settings("geneval-tiny", overrides=[(key, "1")]).config
        b = load_settings("geneval-tiny", overrides=[(key, "true")]).config
        assert config_differences(a, b) == [f"{key}: 1 → true"]


class TestListing:
    def test_presets(self) -> None:
        first = {item.name: item for item in list_presets()}["geneval-tiny"]
        assert first.description.startswith("GenEval")
        assert first.path.is_file()

    def test_a_broken_preset_does_not_hide_the_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(settings, "resource_dir", lambda kind: tmp_path)
        preset(tmp_path, "not toml", "broken.toml")
        preset(tmp_path, 'description = "fine"', "good.toml")
        assert [(item.name, item.description[:14]) for item in list_presets()] == [
            ("broken", "cannot be read"),
            ("good", "fine"),
        ]

    def test_no_presets_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(settings, "resource_dir", lambda kind: tmp_path)
        assert f"There are none in {tmp_path}" in complaint("geneval-tiny")

    def test_presets_are_found_from_any_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert resources.resource_dir("presets").is_absolute()
        assert load_settings("geneval-tiny").config.name == "geneval-tiny"

    def test_explain(self) -> None:
        info = explain("reward-multiplier")
        assert (info.key, info.type, info.default, info.range) == (
            "ram.reward_multiplier",
            "a number",
            "100.0",
            "at least 0",
        )
        assert "reference" in info.description
        assert explain("max_grad_norm").type == "a number, or none"
        assert explain("max_sequence_length").range == "at least 1 and at most 512"
        assert explain("model.path").default == "required"
        assert explain("negative_prompt").default == "empty"
        assert explain("dtype").type == 'one of "float32", "bfloat16"'
        assert explain("reward.scorers.ocr.options.side").type == "text, a whole number, a number, true or false"

    def test_every_key_can_be_explained(self) -> None:
        for key in all_keys():
            assert explain(key.replace("NAME", "ocr").replace("OPTION", "x")).description

    def test_find_keys(self) -> None:
        assert [item.key for item in find_keys("seed")] == ["train.seed", "evaluation.seed"]
        assert [item.key for item in find_keys("checkpoint")] == ["checkpoint.every", "checkpoint.keep"]
        assert [item.key for item in find_keys("lr")] == ["optimizer.lr"]
        assert len(find_keys("reward")) == 7
        with pytest.raises(ConfigError, match=r"optimizer\.lr"):
            find_keys("lrr")

    def test_explain_rejects_what_is_not_one_key(self) -> None:
        for text in ("ram", "micro_batch", "nothing_like_it"):
            with pytest.raises(ConfigError):
                explain(text)


def test_toml_value_stays_on_one_line() -> None:
    for value in (None, "a\nb", ["a\nb", 1], {"x y": [1.5, True]}):
        assert "\n" not in toml_value(value)
