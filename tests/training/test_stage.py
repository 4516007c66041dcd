import shutil

import pytest
import torch
from safetensors.torch import load_file

from wasi_export.errors import ArtifactExistsError, ConfigError, IntegrityError, UsageError
from wasi_export.interrupt import TrainingInterrupted
from wasi_export.manifest import CONFIG
from wasi_export.ranks import Plan
from wasi_export.run_folder import FACTS, OPTIMIZER, PLAN, WEIGHTS
from wasi_export.subspace.inject import subspace_layers
from wasi_export.training.beginning import first_model
from wasi_export.training.checkpoint import load_run, read_facts
from wasi_export.training.data import make_loader
from wasi_export.training.loop import METRICS, evaluate
from wasi_export.training.profile import PROFILE, TRACED_STEPS, WARMUP_STEPS, Profile
from wasi_export.training.resume import CHECKPOINT
from wasi_export.training.stage import Profiling, train_run

pytestmark = pytest.mark.slow


class Counted:
    """A `Track` that remembers the labels of the work done."""

    def __init__(self):
        self.labels = []

    def __call__(self, items, label, total):
        self.labels.append(label)
        return items


def interrupted(items, label, total):
    if label == "epoch 2/2":
        raise TrainingInterrupted
    return items


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """Returns the folder of a dense run and that of the subspace run from it; to be read only."""
    folder = tmp_path_factory.mktemp("runs")
    train_run(tiny(), "dense", folder / "dense")
    train_run(tiny(), "subspace", folder / "subspace", init=folder / "dense")
    return folder


@pytest.fixture
def dense(finished):
    return finished / "dense"


@pytest.mark.parametrize(("method", "files"), [("dense", set()), ("subspace", {PLAN})])
def test_a_finished_run_is_these_files(finished, method, files):
    found = {path.name for path in (finished / method).iterdir()}
    assert found == {FACTS, WEIGHTS, CONFIG, METRICS} | files


@pytest.mark.parametrize("method", ["dense", "subspace"])
def test_a_loaded_run_is_as_accurate_as_it_says(finished, digits, method):
    run = load_run(finished / method)
    loader = make_loader(digits[1], run.facts.input, run.config.data, training=False)
    result = evaluate(run.model, loader)
    assert (result.accuracy, result.loss) == (
        run.facts.metrics["val_accuracy"],
        run.facts.metrics["val_loss"],
    )
    assert run.facts.parameters == sum(p.numel() for p in run.model.parameters())
    assert run.facts.method == method
    assert not run.model.training


def test_a_subspace_run_has_the_planned_layers_and_no_dense_twin(finished):
    run = load_run(finished / "subspace")
    assert {name for name, _ in subspace_layers(run.model)} == {layer.name for layer in run.plan.factored}
    assert len(run.plan.factored) == 8
    assert Plan.load(finished / "subspace" / PLAN) == run.plan
    names = run.model.state_dict()
    assert "blocks.0.mlp.fc1.left" in names
    assert "blocks.0.mlp.fc1.weight" not in names


def test_the_configuration_of_a_run_is_the_one_it_was_trained_with(finished, tiny):
    assert load_run(finished / "dense").config == tiny()


def test_a_finished_run_is_not_trained_again(finished, tiny):
    work = Counted()
    facts = train_run(tiny("data.workers=3"), "dense", finished / "dense", track=work)
    assert facts == read_facts(finished / "dense")
    assert work.labels == []


def test_a_finished_run_of_another_configuration_is_kept(finished, tiny):
    with pytest.raises(ArtifactExistsError, match=r"holds a finished run of another configuration.*--force"):
        train_run(tiny("train.dense.lr=2e-3"), "dense", finished / "dense")


def test_force_and_replace_train_anew(tiny, tmp_path):
    short = "train.dense.epochs=1"
    first = train_run(tiny(short), "dense", tmp_path / "run")
    work = Counted()
    again = train_run(tiny(short), "dense", tmp_path / "run", force=True, track=work)
    assert "epoch 1/1" in work.labels
    assert again.weights_sha256 == first.weights_sha256
    other = train_run(tiny(short, "seed=1"), "dense", tmp_path / "run", replace=True)
    assert other.weights_sha256 != first.weights_sha256


@pytest.mark.parametrize("method", ["dense", "subspace"])
def test_an_interrupted_run_resumes_to_the_same_weights(finished, dense, tiny, tmp_path, method):
    init = dense if method == "subspace" else None
    with pytest.raises(TrainingInterrupted):
        train_run(tiny(), method, tmp_path / "run", init=init, track=interrupted)
    assert (tmp_path / "run" / CHECKPOINT).exists()
    with pytest.raises(IntegrityError, match="unfinished run: the same train command resumes"):
        load_run(tmp_path / "run")
    work = Counted()
    facts = train_run(tiny(), method, tmp_path / "run", init=init, track=work)
    assert work.labels == ["epoch 2/2", "evaluate"]
    assert facts.weights_sha256 == read_facts(finished / method).weights_sha256


def test_an_unfinished_run_of_another_configuration_is_kept_without_force(tiny, tmp_path):
    with pytest.raises(TrainingInterrupted):
        train_run(tiny(), "dense", tmp_path / "run", track=interrupted)
    with pytest.raises(ConfigError, match=r"of another configuration or start.*--force"):
        train_run(tiny("seed=1"), "dense", tmp_path / "run")
    train_run(tiny("seed=1", "train.dense.epochs=1"), "dense", tmp_path / "run", force=True)


@pytest.mark.parametrize("method", ["dense", "subspace"])
def test_a_profile_is_written_and_changes_no_weight(dense, tiny, tmp_path, method):
    config, init = tiny("data.batch_size=8"), dense if method == "subspace" else None
    plain = train_run(config, method, tmp_path / "plain", init=init)
    profiling = Profiling(tmp_path / "trace.json")
    facts = train_run(config, method, tmp_path / "run", init=init, profiling=profiling)
    assert facts.weights_sha256 == plain.weights_sha256
    profile = Profile.model_validate_json((tmp_path / "run" / PROFILE).read_bytes())
    assert profile.steps == 22 - WARMUP_STEPS - TRACED_STEPS
    assert [phase.name for phase in profile.phases] == [
        "data", "forward", "backward", "clipping", "update", "other",
    ]  # fmt: skip
    assert sum(phase.share for phase in profile.phases) == pytest.approx(1)
    kinds = {part.name for part in profile.parts if part.forward_ms and part.backward_ms}
    assert {"attention", "mlp", "norm", "dense linear"} <= kinds
    assert ("factored linear" in kinds) == (method == "subspace")
    shares = {phase.name: phase.share for phase in profile.phases}  # of sums, as means are and medians not
    forward, backward = sum(p.forward_ms for p in profile.parts), sum(p.backward_ms for p in profile.parts)
    assert forward / backward == pytest.approx(shares["forward"] / shares["backward"])
    assert (tmp_path / "trace.json").exists()


def test_a_finished_run_has_nothing_to_profile(finished, tiny):
    with pytest.raises(UsageError, match="is finished, no step is left to profile: give --force"):
        train_run(tiny(), "dense", finished / "dense", profiling=Profiling())


def test_no_epochs_give_a_run_with_the_initial_weights(tiny, tmp_path):
    facts = train_run(tiny("train.dense.epochs=0"), "dense", tmp_path / "run")
    initial = first_model(tiny(), tuple("0123456789"))
    assert torch.equal(load_run(tmp_path / "run").model.head.weight, initial.head.weight)
    assert facts.metrics["val_accuracy"] <= 0.5


def test_a_flipped_byte_in_the_weights_is_found(tiny, tmp_path):
    train_run(tiny("train.dense.epochs=0"), "dense", tmp_path / "run")
    path = tmp_path / "run" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors has sha256 .*run\.json says"):
        load_run(tmp_path / "run")


def test_a_state_of_an_optimiser_that_is_damaged_is_named(finished, tmp_path):
    shutil.copytree(finished / "dense", tmp_path / "run")
    (tmp_path / "run" / OPTIMIZER).write_bytes(b"noise" * 100)
    with pytest.raises(IntegrityError, match=r"optimizer\.safetensors holds no whole state .*: make the run"):
        load_run(tmp_path / "run")


def test_a_folder_without_a_run_is_a_clear_error(tmp_path):
    with pytest.raises(IntegrityError, match="holds no finished run"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.img_size=24",), r"model\.img_size is 16 there and 24 here"),
        (("model.kwargs.depth=3",), r"model\.kwargs is .*'depth': 2.* there and .*'depth': 3.* here"),
    ],
)
def test_a_start_from_another_model_is_refused(dense, tiny, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train_run(tiny(*overrides), "subspace", tmp_path / "run", init=dense)


def test_a_start_from_other_classes_is_refused(dense, tiny):
    with pytest.raises(
        ConfigError, match=r"10 classes \(0, 1, 2, 3, 4, …\), the data have 2 \(cat, dog, …\)"
    ):
        first_model(tiny(), ("cat", "dog"), dense)


def test_a_factored_run_is_no_start_of_a_dense_one(finished, tiny, tmp_path):
    with pytest.raises(ConfigError, match="is factored: give --method subspace"):
        train_run(tiny(), "dense", tmp_path / "run", init=finished / "subspace")


def test_a_factored_run_goes_on_with_its_factors(finished, tiny, tmp_path):
    start = finished / "subspace"
    facts = train_run(tiny("train.subspace.epochs=0"), "subspace", tmp_path / "run", init=start)
    assert facts.parameters == read_facts(start).parameters
    assert (tmp_path / "run" / PLAN).read_bytes() == (start / PLAN).read_bytes()
    before, after = load_file(start / WEIGHTS), load_file(tmp_path / "run" / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_with_other_files_is_left_alone(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ArtifactExistsError, match=r"holds other files \(thesis\.tex\)"):
        train_run(tiny(), "dense", tmp_path, force=True)


def test_a_file_is_no_run_folder(tiny, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        train_run(tiny(), "dense", tmp_path / "run")


class StopAt:
    """A `Track` that stops the training before the second batch of the work with this label."""

    def __init__(self, label):
        self.label = label

    def __call__(self, items, label, total):
        for index, item in enumerate(items):
            if index == 1 and label == self.label:
                raise TrainingInterrupted
            yield item


def test_half_of_the_epochs_are_dense_where_there_is_no_dense_run(tiny, tmp_path):
    work = Counted()
    facts = train_run(tiny(), "subspace", tmp_path / "run", track=work)
    assert work.labels.index("epoch 1/2") < work.labels.index("fit factors") < work.labels.index("epoch 2/2")
    assert facts.metrics["epochs"] == 2
    assert load_run(tmp_path / "run").plan.factored


@pytest.mark.parametrize("overrides", [(), ("subspace.dense_method=lora",)], ids=["full", "lora"])
@pytest.mark.parametrize("label", ["epoch 1/2", "calibrate", "fit factors", "epoch 2/2"])
def test_an_interrupted_run_resumes_on_either_side_of_the_factorisation(tiny, tmp_path, label, overrides):
    config = tiny("subspace.calibration_images=80", *overrides)
    whole = train_run(config, "subspace", tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train_run(config, "subspace", tmp_path / "run", track=StopAt(label))
    assert train_run(config, "subspace", tmp_path / "run").weights_sha256 == whole.weights_sha256


def start_and_trained(tiny, folder, *overrides):
    """Returns the model before and after two epochs that come before a factorisation which loses nothing."""
    start, end = (
        tiny("train.dense.epochs=0", *overrides),
        tiny("subspace.dense_epochs=2", "subspace.rank=64", *overrides),
    )
    train_run(start, "dense", folder / "start")
    train_run(end, "subspace", folder / "end")
    return load_run(folder / "start").model, load_run(folder / "end").model


def test_lora_trains_changes_of_its_rank_and_the_head_alone(tiny, tmp_path):
    start, end = start_and_trained(tiny, tmp_path, "subspace.dense_method=lora", "subspace.lora_rank=4")
    factored = dict(subspace_layers(end))
    for name, layer in factored.items():
        values = torch.linalg.svdvals((layer.left @ layer.right - start.get_submodule(name).weight).double())
        assert values[3] > 1e-3 > 100 * values[4]
    trained, linear = dict(end.named_parameters()), ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    others = {n: p for n, p in start.named_parameters() if not n.endswith(linear) or "embed" in n}
    changed = {name for name, parameter in others.items() if not torch.equal(parameter, trained[name])}
    assert changed == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in trained.values())


def test_what_is_trained_before_the_factorisation_follows_from_the_first_weights(tiny, tmp_path):
    start, end = start_and_trained(tiny, tmp_path)
    assert not torch.equal(start.pos_embed, end.pos_embed)
    checkpoint = tmp_path / "start" / WEIGHTS
    start, end = start_and_trained(tiny, tmp_path / "second", f"model.checkpoint={checkpoint}")
    assert torch.equal(start.pos_embed, end.pos_embed)


def test_all_epochs_may_be_dense_and_more_are_refused(tiny, tmp_path):
    facts = train_run(tiny("subspace.dense_epochs=2"), "subspace", tmp_path / "two")
    assert facts.metrics["epochs"] == 2
    assert load_run(tmp_path / "two").plan.factored
    with pytest.raises(ConfigError, match=r"dense_epochs = 3 is above train\.subspace\.epochs = 2: lower it"):
        train_run(tiny("subspace.dense_epochs=3"), "subspace", tmp_path / "three")


def test_a_plan_of_other_layers_is_refused_before_anything_is_trained(finished, tiny, tmp_path):
    options = (f"subspace.plan='{finished / 'subspace' / PLAN}'", 'subspace.include=["blocks.*.mlp.*"]')
    with pytest.raises(ConfigError, match=r"it also has .*blocks\.0\.attn\.qkv"):
        train_run(tiny(*options), "subspace", tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_plan_made_before_gives_the_ranks(finished, tiny, tmp_path):
    given = Plan.load(finished / "subspace" / PLAN)
    layers = tuple(
        layer.model_copy(update={"rank": 8}) if layer.name.endswith("fc1") else layer
        for layer in given.layers
    )
    path = tmp_path / "plan.json"
    path.write_text(given.model_copy(update={"layers": layers}).model_dump_json())
    train_run(tiny(f"subspace.plan='{path}'"), "subspace", tmp_path / "run", init=finished / "dense")
    ranks = {name: layer.rank for name, layer in subspace_layers(load_run(tmp_path / "run").model)}
    assert {rank for name, rank in ranks.items() if name.endswith("fc1")} == {8}
    assert {rank for name, rank in ranks.items() if not name.endswith("fc1")} == {16}
