"""The training benchmark: other methods are what they say, and the pages show the committed result."""

import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from training import PAGES, with_tables
from training_adapters import adapt, merge_lora, unpack_factors
from training_asi import CompressedLinear, compress_inputs
from training_cost import PROGRAM, SHAPES, Shape, count_macs, jobs_of, make_method, scope_mb
from training_levers import SparseBeside, add_sparse, feature_loss, soft_loss, train_lever
from training_rows import METHODS, ROWS

from wasi_export.config import Config, SubspaceConfig
from wasi_export.ranks import ActivationRanks, LayerPlan, Plan
from wasi_export.subspace import factorize_model, subspace_layers
from wasi_export.training.checkpoint import load_run
from wasi_export.training.memory import measure_step_memory
from wasi_export.training.stage import train_run

ROOT = Path(__file__).parents[1]
RESULT, TEXT = (
    json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("training", "training_text")
)
TINY = Shape("tiny", "vit_tiny_patch16_224", 32)
BATCH, TOKENS, IN, OUT = 4, 6, 10, 7


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_show_the_tables_of_the_committed_result(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- benchmarks/training.py: " in text
    assert with_tables(text, RESULT, TEXT) == text


@pytest.mark.parametrize("run", RESULT["runs"], ids=lambda run: f"{run['row']}-{run['seed']}")
def test_every_run_is_of_the_settings_that_its_row_has_now(run):
    assert run["settings"] == json.loads(json.dumps(ROWS[run["row"]].settings))


def plan_of(name: str, ranks: ActivationRanks, *, out: int = OUT, rank: int = 2) -> Plan:
    layer = LayerPlan(
        name=name, in_features=IN, out_features=out, rank=rank, method="plain", energy=None,
        activation=ranks, reason="",
    )  # fmt: skip
    return Plan(activation_mode="feature+token", layers=(layer,))


def gradients(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
    return (y, x.grad, *(parameter.grad for parameter in layer.parameters()))


def test_asi_at_full_ranks_is_the_dense_layer():
    torch.manual_seed(0)
    dense, x = nn.Linear(IN, OUT), torch.randn(BATCH, TOKENS, IN)
    expected = gradients(dense, x)
    dense.zero_grad()
    full = ActivationRanks(feature=IN, token=TOKENS, token_count=TOKENS)
    model = nn.Sequential(dense)
    compress_inputs(model, plan_of("0", full))
    assert isinstance(model[0], CompressedLinear)
    for found, wanted in zip(gradients(model[0], x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_asi_errs_in_the_gradient_of_the_weight_alone():
    torch.manual_seed(0)
    dense, x = nn.Linear(IN, OUT), torch.randn(BATCH, TOKENS, IN)
    expected = gradients(dense, x)
    dense.zero_grad()
    model = nn.Sequential(dense)
    compress_inputs(model, plan_of("0", ActivationRanks(feature=4, token=3, token_count=TOKENS)))
    y, grad_x, grad_weight, grad_bias = gradients(model[0], x)
    for found, wanted in zip((y, grad_x, grad_bias), (expected[0], expected[1], expected[3]), strict=True):
        torch.testing.assert_close(found, wanted)
    assert (grad_weight - expected[2]).norm() > 0.1 * expected[2].norm()
    assert torch.linalg.matrix_rank(grad_weight) <= 4


def test_unpacked_factors_are_the_same_function():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96))
    config = SubspaceConfig(method="plain", rank=32, activation="none", sensitivity="none")
    factorize_model(model, [], config, total=0)
    x = torch.randn(5, 96)
    expected = model(x)
    unpack_factors(model)
    assert isinstance(model[0], nn.Sequential)
    torch.testing.assert_close(model(x), expected)


def test_lora_trains_its_own_and_the_head_and_merges_into_the_same_function():
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=IN, num_heads=2, num_classes=3
    ).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    adapt(model, "lora", plan_of("blocks.0.attn.qkv", ActivationRanks(), out=3 * IN), lora_rank=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"default", "head"}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(parameter.numel() for parameter in model.parameters()) == size


def test_a_run_that_begins_with_lora_has_a_part_of_it_and_others_have_none():
    parts = {name: [job.plan is None for job in jobs_of(row, TINY)] for name, row in METHODS.items()}
    assert parts["dense"] == parts["lora"] == parts["asi"] == [True]
    assert parts["ours-0.4"] == parts["ours-small"] == [True, False]
    assert parts["svd-llm"] == [False, False]
    assert parts["ours-from-start"] == parts["wasi"] == [False]


def test_the_part_of_lora_trains_as_many_numbers_as_its_rank_says():
    first, _ = jobs_of(METHODS["ours-0.4"], TINY)
    model = make_method(first)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    width, depth, head = 192, 12, first.num_classes * 193
    sizes = (width + 3 * width, 2 * width, width + 4 * width, 4 * width + width)
    assert trained == depth * 16 * sum(sizes) + head


def test_the_counter_of_macs_agrees_with_the_formula_of_a_dense_step():
    (job,) = jobs_of(METHODS["dense"], TINY)
    batch, tokens, width, depth, patches, classes = job.batch_size, 5, 192, 12, 4, job.num_classes
    linear = depth * tokens * 12 * width**2 + width * classes
    attention = depth * 2 * tokens**2 * width
    patch = patches * 3 * 16**2 * width
    # Of the images no gradient is taken.
    assert count_macs(job) == batch * (3 * (linear + attention) + 2 * patch)


def test_the_counter_counts_a_block_that_is_computed_again():
    (small,), (whole,) = (jobs_of(METHODS[name], TINY) for name in ("ours-from-start", "wsi"))
    assert 1.15 < count_macs(small) / count_macs(whole) < 4 / 3


def test_recompute_costs_a_second_forward_pass():
    (dense,), (checkpointing,) = (jobs_of(METHODS[name], TINY) for name in ("dense", "checkpointing"))
    # torch stops a recompute before fc2, whose output nothing needs: two thirds of a third more, or less.
    assert 1.2 < count_macs(checkpointing) / count_macs(dense) < 4 / 3


def test_compressed_inputs_and_factors_both_lower_the_scope_of_the_paper():
    scope = {
        name: scope_mb(jobs_of(METHODS[name], SHAPES[0])[-1]) for name in ("dense", "asi", "wsi", "wasi")
    }
    assert max(scope["asi"], scope["wsi"]) < scope["dense"]
    assert scope["wasi"] < min(scope["asi"], scope["wsi"])


@pytest.mark.slow
def test_the_peak_of_a_methods_step_is_that_of_its_own_model():

    pytest.importorskip("peft")
    jobs = {name: jobs_of(METHODS[name], TINY)[-1] for name in ("dense", "svd-llm")}
    peaks = {name: measure_step_memory(job, program=PROGRAM).peak_mb for name, job in jobs.items()}
    parameters = {name: sum(p.numel() for p in make_method(job).parameters()) for name, job in jobs.items()}
    # Dense: weights, gradients and two moments; of LoRA beside frozen factors little more than the weights.
    assert peaks["dense"] > 4 * 4 * parameters["dense"] / 1e6
    assert peaks["svd-llm"] < 3 * 4 * parameters["svd-llm"] / 1e6 + 60


def lever_config(**subspace: object) -> Config:
    vit = {"img_size": 8, "patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 2}
    return Config.from_mapping(
        {
            "model": {"name": "vit_tiny_patch16_224", "in_chans": 1, "kwargs": vit},
            "data": {"train_images": 80, "val_images": 8, "augment": False, "batch_size": 8},
            "subspace": {
                "fraction": 0.5, "dense_method": "lora", "lora_rank": 4, "calibration_images": 8, **subspace,
            },
            "train": {"subspace": {"epochs": 2, "lr": 1e-3}},
        }
    )  # fmt: skip


def test_without_a_lever_training_is_the_pipelines(tmp_path):
    config = lever_config()
    model, loss = train_lever("nothing", config, tmp_path)
    facts = train_run(config, "subspace", tmp_path / "run")
    assert loss == pytest.approx(facts.metrics["train_loss"], rel=1e-6)
    for name, value in load_run(tmp_path / "run").model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lever", ["distill_logits", "distill_features", "shrink", "sparse"])
def test_a_lever_changes_the_second_half_alone(lever, tmp_path):
    train_lever("nothing", lever_config(), tmp_path)
    (first,) = tmp_path.iterdir()
    kept = first.read_bytes()
    model, loss = train_lever(lever, lever_config(), tmp_path)
    plain, _ = train_lever("nothing", lever_config(), tmp_path)
    assert first.read_bytes() == kept
    assert math.isfinite(loss)
    x = torch.randn(2, 1, 8, 8)
    assert not torch.allclose(model.eval()(x), plain.eval()(x))


def test_features_without_labels_are_a_first_half_of_their_own(tmp_path):
    model, _ = train_lever("distill_first", lever_config(dense_epochs=0, sensitivity="features"), tmp_path)
    assert not list(tmp_path.iterdir())
    assert list(subspace_layers(model))


def test_a_model_that_answers_as_the_dense_one_has_no_loss_of_features():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    assert feature_loss(model)(model, images, labels) == 0
    answer = model(images).softmax(1)
    targets = (torch.nn.functional.one_hot(labels, 3) + answer) / 2
    expected = -(targets * answer.log()).sum(1).mean()
    torch.testing.assert_close(soft_loss(model)(model, images, labels), expected)


def test_sparse_entries_lower_the_error_and_take_the_parameters_they_may():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(96, 96))
    model = copy.deepcopy(dense)
    factorize_model(
        model, [], SubspaceConfig(method="plain", rank=8, activation="none", sensitivity="none"), total=0
    )
    x = torch.randn(50, 96)
    before = (model(x) - dense(x)).square().mean()
    add_sparse(model, dense, x, share=0.5)
    assert isinstance(model[0], SparseBeside)
    assert model[0].values.numel() == 0.5 * 8 * (96 + 96)
    assert (model(x) - dense(x)).square().mean() < 0.9 * before
