"""The configuration: what it accepts, what it refuses, and the one line it says then."""

from pathlib import Path

import pytest

import wasi_export
from wasi_export.config import Config, Thresholds
from wasi_export.errors import ConfigError
from wasi_export.settings import Frozen, validated


def write(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(text: str, folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_toml(write(folder, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder / 'my.toml'}: ")


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert Config.from_toml(write(tmp_path, "")) == Config()


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    config = Config.from_toml(write(tmp_path, "[train.dense]\nepochs = 7\n[subspace]\nfraction = 0.3\n"))
    assert config.train.dense.epochs == 7
    assert config.subspace.fraction == 0.3
    assert config.train.subspace == Config().train.subspace
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[subspace]\nepslon = 0.9", "unknown key 'subspace.epslon', did you mean 'epsilon'?"),
        ("[train.dense]\nepoch = 3", "unknown key 'train.dense.epoch', did you mean 'epochs'?"),
        ("[modle]\nname = 'x'", "unknown key 'modle', did you mean 'model'?"),
        ("[train]\nzzz = 1", "unknown key 'train.zzz', known keys: dense, subspace"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(
    tmp_path: Path, text: str, message: str
) -> None:
    assert refusal(text, tmp_path) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[subspace]\nepsilon = 1.7", "subspace.epsilon: Input should be less than or equal to 1, got 1.7"),
        ("[subspace]\nepsilon = 0", "subspace.epsilon: Input should be greater than 0, got 0"),
        ("[subspace]\nrank = 0", "subspace.rank: Input should be greater than or equal to 1, got 0"),
        ("[subspace]\nfraction = 1.0", "subspace.fraction: Input should be less than 1, got 1.0"),
        ("[model]\nin_chans = 2", "model.in_chans: Input should be 1 or 3, got 2"),
        (
            "[subspace]\nmethod = 'svd'",
            "subspace.method: Input should be 'sequential', 'whitened' or 'plain', got 'svd'",
        ),
        ("[train.dense]\nlr = nan", "train.dense.lr must be a finite number"),
        ("[data]\nscale = [0.5, inf]", "data.scale must be a finite number"),
        ("[model]\nkwargs = { drop_rate = nan }", "model.kwargs.drop_rate must be a finite number"),
        (
            "[model]\nkwargs = { depth = 1979-05-27 }",
            "model.kwargs.depth must not be a date or a time, got 1979-05-27: text goes in quotes, "
            """as 'model.kwargs.depth="1979-05-27"'""",
        ),
    ],
)
def test_a_wrong_value_is_shown_with_its_key_and_its_bound(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(text, tmp_path) == message


def test_a_value_of_another_kind_is_no_unknown_key(tmp_path: Path) -> None:
    message = refusal("[model]\npretrained = 'maybe'", tmp_path)
    assert message.startswith("model.pretrained: Input should be a valid boolean")
    assert message.endswith(", got 'maybe'")


def test_an_unknown_key_of_a_section_that_may_be_left_out_has_its_nearest_one() -> None:
    class Inner(Frozen):
        size: int = 1

    class Outer(Frozen):
        inner: Inner | None = None

    with pytest.raises(ConfigError, match=r"^here: unknown key 'inner\.sise', did you mean 'size'\?$"):
        validated(Outer, {"inner": {"sise": 2}}, origin="here")


@pytest.mark.parametrize("text", ["seed = " + "9" * 5000, "model = " + "[" * 100_000])
def test_what_python_cannot_read_is_no_toml(tmp_path: Path, text: str) -> None:
    assert "is not TOML" in refusal(text, tmp_path)


def test_an_override_that_python_cannot_read_is_a_string() -> None:
    for text in ("9" * 5000, "[" * 100_000):
        assert Config.from_mapping({}, [f"model.name={text}"]).model.name == text


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal("[data]\nbatch_size = 0\nwokers = 2\n[train.dense]\nlr = -1", tmp_path)
    assert message.count("; ") == 2
    assert "data.batch_size" in message
    assert "did you mean 'workers'?" in message
    assert "train.dense.lr" in message


@pytest.mark.parametrize("pair", [("epsilon", "fraction"), ("fraction", "rank"), ("epsilon", "rank")])
def test_two_measures_of_rank_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    values = {"epsilon": "0.9", "fraction": "0.4", "rank": "64"}
    text = "[subspace]\n" + "\n".join(f"{key} = {values[key]}" for key in pair)
    expected = f"subspace: give one of epsilon, fraction and rank, got {pair[0]} and {pair[1]}"
    assert refusal(text, tmp_path) == expected


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 3\n[train.dense]\nepochs = 7\n")
    config = Config.from_toml(path, ["train.dense.epochs=1", "train.subspace.lr=2e-3"])
    assert (config.seed, config.train.dense.epochs, config.train.subspace.lr) == (3, 1, 2e-3)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.name=vit_small_patch16_224", "vit_small_patch16_224"),
        ("model.name='quoted'", "quoted"),
        ("model.name = spaced", "spaced"),
    ],
)
def test_an_override_that_is_not_toml_is_a_string(override: str, value: str) -> None:
    assert Config.from_mapping({}, [override]).model.name.strip() == value


def test_an_override_of_one_measure_of_rank_replaces_another(tmp_path: Path) -> None:
    config = Config.from_toml(write(tmp_path, "[subspace]\nfraction = 0.4\n"), ["subspace.rank=64"])
    assert (config.subspace.rank, config.subspace.fraction) == (64, None)


def test_an_override_takes_lists_and_tables() -> None:
    config = Config.from_mapping({}, ["subspace.include=['*fc1', '*fc2']", "model.kwargs={depth = 2}"])
    assert config.subspace.include == ("*fc1", "*fc2")
    assert config.model.kwargs == {"depth": 2}


@pytest.mark.parametrize("override", ["seed", "=3", ".seed=3", "data.=3", ""])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"an override reads section\.key=value, got"):
        Config.from_mapping({}, [override])


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"seed\.x: seed is a value, not a section"):
        Config.from_mapping({"seed": 1}, ["seed.x=3"])


def test_an_override_leaves_the_given_mapping_as_it_was() -> None:
    values = {"train": {"dense": {"epochs": 7}}}
    Config.from_mapping(values, ["train.dense.epochs=1"])
    assert values == {"train": {"dense": {"epochs": 7}}}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*absent\.toml: check the path"):
        Config.from_toml(tmp_path / "absent.toml")


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        Config.from_toml(tmp_path)


def test_broken_toml_is_shown_with_its_line(tmp_path: Path) -> None:
    assert "is not TOML" in (message := refusal("[data\nsource = 1", tmp_path))
    assert "line 1" in message


def test_a_file_of_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read .*my\.toml"):
        Config.from_toml(tmp_path / "my.toml")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


def test_thresholds_are_read_from_toml(tmp_path: Path) -> None:
    thresholds = Thresholds.from_toml(write(tmp_path, "min_accuracy = 0.9\nmax_size_mb = 20\n"))
    assert thresholds == Thresholds(min_accuracy=0.9, max_size_mb=20)
    assert thresholds.max_parity_error == 1e-5


def test_a_mistyped_threshold_is_refused_and_not_left_unchecked(tmp_path: Path) -> None:
    message = r"my\.toml: unknown key 'min_acuracy', did you mean 'min_accuracy'\?"
    with pytest.raises(ConfigError, match=message):
        Thresholds.from_toml(write(tmp_path, "min_acuracy = 0.9\n"))


TINY = 1e-300
WITHIN = {
    "max_parity_error": (TINY, 2.0),
    "min_accuracy": (None, 0.0, 0.5, 1.0),
    "max_accuracy_drop": (None, -1.0, 0.0, 0.5, 1.0),
    "accuracy_confidence": (None, 0.8, 0.999),
    "max_latency_ratio": (None, TINY, 2.0),
    "max_size_mb": (None, TINY, 2.0),
    "max_memory_mb": (None, TINY, 2.0),
}
BEYOND = {
    "max_parity_error": (0.0, -TINY),
    "min_accuracy": (-TINY, 1.001),
    "max_accuracy_drop": (-1.001, 1.001),
    "accuracy_confidence": (0.799, 1.0),
    "max_latency_ratio": (0.0, -TINY),
    "max_size_mb": (0.0, -TINY),
    "max_memory_mb": (0.0, -TINY),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WITHIN for value in WITHIN[name]])
def test_a_threshold_within_its_bounds_is_one(name: str, value: float | None) -> None:
    values = {"max_accuracy_drop": 0.1, name: value}
    assert Thresholds.model_validate(values).model_dump()[name] == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BEYOND for value in BEYOND[name]])
def test_a_threshold_beyond_its_bounds_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^thresholds: {name}: Input should be .*, got {value}$"):
        Thresholds.from_toml(None, {"max_accuracy_drop": 0.1, name: value})


def test_every_threshold_has_its_bounds() -> None:
    assert set(WITHIN) == set(BEYOND) == set(Thresholds.model_fields)


@pytest.mark.parametrize("names", [(), ("min_accuracy",), ("max_accuracy_drop",)])
def test_a_confidence_is_of_a_threshold(names: tuple[str, ...]) -> None:
    values = dict.fromkeys((*names, "accuracy_confidence"), 0.9)
    if names:
        assert Thresholds.from_toml(None, values).accuracy_confidence == 0.9
        return
    with pytest.raises(
        ConfigError, match=r"^thresholds: accuracy_confidence is how sure .*: set one of them"
    ):
        Thresholds.from_toml(None, values)


def test_thresholds_given_apart_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "min_accuracy = 0.9\nmax_size_mb = 20\n")
    assert Thresholds.from_toml(path, {"min_accuracy": 0.5}) == Thresholds(min_accuracy=0.5, max_size_mb=20)


def test_what_has_a_default_can_be_switched_off(tmp_path: Path) -> None:
    config = Config.from_toml(write(tmp_path, '[train.dense]\nclip_grad = "off"\n'), ["adapt.clip_grad=off"])
    assert config.train.dense.clip_grad is config.adapt.clip_grad is None
    assert config.train.subspace.clip_grad == 1.0
    assert refusal("[adapt]\nclip_grad = 0", tmp_path).startswith("adapt.clip_grad: Input should be greater")
    assert Config.from_mapping({}, ["adapt.clip_grad=0.5"]).adapt.clip_grad == 0.5


@pytest.mark.parametrize("value", ["on", "never", "OFF"])
def test_nothing_but_off_switches_off(tmp_path: Path, value: str) -> None:
    message = refusal(f"[adapt]\nclip_grad = '{value}'", tmp_path)
    assert message.startswith("adapt.clip_grad: Input should be a valid number")


def test_a_wrong_threshold_without_a_file_is_shown_with_its_bound() -> None:
    with pytest.raises(ConfigError, match=r"thresholds: min_accuracy: Input should be less .*, got 1\.7"):
        Thresholds.from_toml(None, {"min_accuracy": 1.7})


@pytest.mark.parametrize(
    "overrides", [[], ["subspace.epsilon=0.9", "model.checkpoint='weights.pth'", "adapt.clip_grad=off"]]
)
def test_the_built_in_configuration_survives_being_written_as_toml(
    tmp_path: Path, overrides: list[str]
) -> None:
    demo = Config.from_toml(Path(wasi_export.__path__[0]) / "demo.toml", overrides)
    assert Config.from_toml(write(tmp_path, demo.to_toml())) == demo


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["subspace.max_params=5"], 'max_params needs allocation = "output_error", got "uniform"'),
        (
            ["subspace.allocation=perplexity"],
            'allocation = "perplexity" chooses compressed activations within a memory: set activation_mem',
        ),
    ],
)
def test_a_key_that_needs_another_names_it(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_mapping({}, overrides)


def test_a_measure_and_a_budget_exclude_one_another() -> None:
    values = {"subspace": {"fraction": 0.4, "max_params": 5, "allocation": "output_error"}}
    with pytest.raises(ConfigError, match=r"give a measure or budgets, got fraction and max_params$"):
        Config.from_mapping(values)


def test_a_budget_given_as_override_replaces_the_measure_and_joins_other_budgets() -> None:
    overrides = ["subspace.allocation=output_error", "subspace.max_macs=7", "subspace.max_params=5"]
    subspace = Config.from_mapping({"subspace": {"fraction": 0.4}}, overrides).subspace
    assert (subspace.fraction, subspace.budgets) == (None, ("max_params", "max_macs"))
    again = Config.from_mapping(
        {"subspace": {"max_params": 5, "allocation": "output_error"}}, ["subspace.rank=8"]
    )
    assert (again.subspace.rank, again.subspace.budgets) == (8, ())


def test_a_board_augments_as_training_did_where_nothing_else_is_said():
    config = Config.from_mapping({"data": {"hflip": 0.0, "scale": [0.5, 0.9]}})
    assert (config.on_board.hflip, config.on_board.scale) == (0.0, (0.5, 0.9))
    own = Config.from_mapping({"data": {"hflip": 0.0}, "adapt": {"hflip": 0.25, "scale": [0.3, 0.4]}})
    assert (own.on_board.hflip, own.on_board.scale) == (0.25, (0.3, 0.4))
