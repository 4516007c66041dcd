"""`SubspaceLinear`: gradients, warm starts, and nothing of shape out×in anywhere."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from wasi_export.cost import LinearForm
from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.linear import BASIS_PERIOD, SubspaceLinear
from wasi_export.subspace.tucker import Bases, batch_basis, compress, follow, reconstruct

IN, OUT, RANK = 11, 13, 4
MODES = {
    "none": ActivationRanks(),
    "feature": ActivationRanks(feature=5),
    "token": ActivationRanks(token=3, token_count=6),
    "feature+token": ActivationRanks(feature=5, token=3, token_count=6),
    "batch": ActivationRanks(batch=2, batch_count=4),
    "feature+token+batch": ActivationRanks(feature=5, token=3, token_count=6, batch=2, batch_count=4),
}
any_mode = pytest.mark.parametrize("activation", MODES.values(), ids=MODES.keys())


def make(activation: ActivationRanks = MODES["feature"], *, bias: bool = True) -> SubspaceLinear:
    torch.manual_seed(0)
    layer = SubspaceLinear(IN, OUT, RANK, bias=bias, activation=activation).double()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def tokens(batch: int = 4, *, seed: int = 1) -> Tensor:
    return torch.randn(batch, 6, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_twin(layer: SubspaceLinear) -> nn.Linear:
    linear = nn.Linear(IN, OUT, bias=layer.bias is not None).double()
    linear.weight.data = layer.left.data @ layer.right.data
    if layer.bias is not None:
        linear.bias.data = layer.bias.data.clone()
    return linear


@any_mode
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_that_of_the_product_with_the_bias_once(
    activation: ActivationRanks, bias: bool
) -> None:
    layer, x = make(activation, bias=bias), tokens()
    expected = dense_twin(layer)(x)
    assert torch.allclose(layer(x), expected)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected)


@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (2, 2, 3, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_equal_finite_differences_without_compression(shape: tuple[int, ...], bias: bool) -> None:
    layer = make(MODES["none"], bias=bias)
    x = torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    inputs = [x, layer.left, layer.right, *([layer.bias] if bias else [])]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        names = ("left", "right", "bias")
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=False)), x)

    assert torch.autograd.gradcheck(run, inputs)


@any_mode
def test_the_factor_gradients_are_exact_at_the_reconstructed_activation(activation: ActivationRanks) -> None:
    layer, x = make(activation), tokens().requires_grad_()
    upstream = torch.randn(4, 6, OUT, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    bases = follow(x.detach(), Bases(layer.feature_basis, layer.token_basis))
    if activation.batch is not None:
        bases = replace(bases, batch=batch_basis(compress(x.detach(), bases), activation.batch))
    stored = reconstruct(compress(x.detach(), bases), bases)
    layer(x).backward(upstream)

    left, right = layer.left.detach().requires_grad_(), layer.right.detach().requires_grad_()
    (stored @ right.T @ left.T).backward(upstream)
    assert layer.left.grad is not None
    assert layer.right.grad is not None
    assert layer.bias is not None
    assert torch.allclose(layer.left.grad, left.grad)
    assert torch.allclose(layer.right.grad, right.grad)
    assert torch.allclose(layer.bias.grad, upstream.sum((0, 1)))
    assert torch.allclose(x.grad, upstream @ left.detach() @ right.detach())


def test_both_orders_of_the_left_gradient_agree() -> None:
    upstream = torch.randn(40, 6, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for feature in (1, 10):  # cheap one way, cheap the other way
        layer, x = make(ActivationRanks(feature=feature)), tokens(40)
        bases = follow(x, Bases(layer.feature_basis))
        layer(x).backward(upstream)
        expected = upstream.reshape(-1, OUT).T @ (
            reconstruct(compress(x, bases), bases).reshape(-1, IN) @ layer.right.T
        )
        assert torch.allclose(layer.left.grad, expected)


def shapes_made_by(layer: nn.Module, x: Tensor) -> Iterator[tuple[int, ...]]:
    """Yields the shape of every tensor that any operation of two training steps makes or keeps."""
    seen: list[tuple[int, ...]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            seen.extend(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    optimizer = torch.optim.AdamW(layer.parameters())
    with Recorder(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(2):
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    seen.extend(tuple(t.shape) for t in [*layer.parameters(), *layer.buffers(), *state])
    yield from seen


@any_mode
def test_nothing_of_shape_out_by_in_ever_exists(activation: ActivationRanks) -> None:
    shapes = set(shapes_made_by(make(activation), tokens()))
    assert (OUT, RANK) in shapes
    assert not shapes & {(OUT, IN), (IN, OUT)}


def test_the_search_for_dense_tensors_finds_them_in_a_dense_layer() -> None:
    assert (OUT, IN) in set(shapes_made_by(nn.Linear(IN, OUT).double(), tokens()))


def saved_elements(layer: nn.Module, x: Tensor) -> int:
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = (
            tensor.untyped_storage().nbytes() // tensor.element_size()
        )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


def test_what_is_saved_for_backward_is_the_core_the_bases_and_the_factors() -> None:
    x = tokens(64)
    dense = nn.Linear(IN, OUT).double()
    for activation in (MODES["feature"], MODES["feature+token"]):
        saved = saved_elements(make(activation), x)
        n, d = activation.token, activation.feature
        assert d is not None
        core = 64 * (n or 6) * d + IN * d + 6 * (n or 0)
        assert saved == core + RANK * (IN + OUT)
        assert saved < saved_elements(dense, x)


@any_mode
def test_a_zero_learning_rate_leaves_the_output_as_it_is(activation: ActivationRanks) -> None:
    layer, x = make(activation), tokens()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    outputs = []
    for _ in range(3):
        outputs.append(layer(x))
        outputs[-1].square().sum().backward()
        optimizer.step()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@any_mode
def test_batches_of_any_size_follow_one_another(activation: ActivationRanks) -> None:
    layer = make(activation)
    for batch in (8, 8, 3, 1, 8):
        layer(tokens(batch)).square().sum().backward()
    assert layer.left.grad is not None
    assert layer.left.grad.isfinite().all()


def test_evaluation_works_before_training_and_does_not_move_the_basis() -> None:
    layer = make()
    before = layer.state_dict()["feature_basis"].clone()
    with torch.no_grad():
        layer(tokens())
    layer.requires_grad_(False)
    layer(tokens().requires_grad_()).sum().backward()
    assert torch.equal(before, layer.state_dict()["feature_basis"])
    layer.requires_grad_(True)
    layer(tokens())
    assert not torch.equal(before, layer.state_dict()["feature_basis"])


def test_the_basis_moves_in_every_eighth_differentiated_pass() -> None:
    layer, moved = make(), []
    for step in range(2 * BASIS_PERIOD + 1):
        before = layer.feature_basis
        layer(tokens(seed=step))
        moved.append(layer.feature_basis is not before)
    assert [step for step, it_moved in enumerate(moved) if it_moved] == [0, BASIS_PERIOD, 2 * BASIS_PERIOD]


class ReadNumbers(TorchDispatchMode):
    """Counts how often a number of a tensor is read, for which a program waits on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@any_mode
def test_no_number_of_a_tensor_decides_whether_the_bases_move(activation: ActivationRanks) -> None:
    layer, x = make(activation), tokens()
    with ReadNumbers() as read:
        for _ in range(BASIS_PERIOD + 1):
            layer(x).sum().backward()
    assert (read.count, layer.passes) == (0, BASIS_PERIOD + 1)


def test_a_number_that_is_read_is_counted() -> None:
    with ReadNumbers() as read:
        assert torch.ones(()) % BASIS_PERIOD == 1
    assert read.count == 1


def test_a_state_without_the_number_of_passes_is_not_strictly_loaded() -> None:
    layer = make()
    layer.passes = 5
    state = layer.state_dict()
    assert state["passes"].dtype == torch.int64
    other = copy.deepcopy(layer)
    other.passes = 0
    other.load_state_dict(state)
    assert (other.passes, "passes" in state) == (5, True)
    with pytest.raises(RuntimeError, match=r"size mismatch for passes: \[2\] in place of one number"):
        other.load_state_dict({**state, "passes": torch.zeros(2)})
    del state["passes"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"passes"'):
        other.load_state_dict(state)


def test_a_second_forward_does_not_change_what_the_first_one_saved() -> None:
    alone, together = make(), make()
    alone(tokens(seed=1)).square().sum().backward()
    first = together(tokens(seed=1)).square().sum()
    for seed in range(BASIS_PERIOD):  # the last of them moves the basis
        together(tokens(seed=seed))
    first.backward()
    assert torch.equal(alone.left.grad, together.left.grad)
    assert torch.equal(alone.right.grad, together.right.grad)


def gradients(layer: SubspaceLinear) -> list[Tensor]:
    found = [parameter.grad for parameter in layer.parameters()]
    return [grad for grad in found if grad is not None]


@any_mode
@pytest.mark.parametrize("passes", [0, 1, BASIS_PERIOD - 1])
def test_a_pass_made_again_has_the_gradient_at_what_it_keeps_itself(
    activation: ActivationRanks, passes: int
) -> None:
    """Also where the bases move in the first pass alone (0), or in the second alone (period - 1)."""
    layer, x = make(activation), tokens().requires_grad_()
    for seed in range(passes):
        layer(tokens(seed=seed))
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()

    assert layer.passes == passes + 2
    plain = make(activation)
    plain.load_state_dict(layer.state_dict())
    plain.passes = 1  # the bases stay where the second pass had them
    y = plain(tokens().requires_grad_())
    y.square().sum().backward()
    for mine, theirs in zip(gradients(layer), gradients(plain), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert len(gradients(layer)) == 3


@any_mode
def test_gradients_of_several_passes_add_up_with_evaluation_in_between(activation: ActivationRanks) -> None:
    layer, together = make(activation), torch.zeros(OUT, RANK, dtype=torch.float64)
    for seed in (1, 2):
        alone = make(activation)
        alone.load_state_dict(layer.state_dict())
        alone(tokens(seed=seed)).square().sum().backward()
        together += alone.left.grad
        layer(tokens(seed=seed)).square().sum().backward()
        with torch.no_grad():
            layer(tokens(3, seed=9))
    assert torch.allclose(layer.left.grad, together)


def test_the_rank_of_the_batch_mode_is_in_proportion_to_the_batch() -> None:
    layer = make(MODES["batch"])
    cores: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim == 3:
            cores.append(len(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for batch in (1, 2, 4, 5, 64):
            layer(tokens(batch))
    assert cores == [1, 1, 2, 3, 32]


@any_mode
def test_images_have_one_row_a_pixel(activation: ActivationRanks) -> None:
    """(B, 2, 3, I) is (B, 6, I) to every mode."""
    flat, image = make(activation), make(activation)
    x = tokens()
    flat(x).square().sum().backward()
    y = image(x.reshape(4, 2, 3, IN))
    assert y.shape == (4, 2, 3, OUT)
    y.square().sum().backward()
    for mine, theirs in zip(gradients(image), gradients(flat), strict=True):
        torch.testing.assert_close(mine, theirs)


@any_mode
@pytest.mark.parametrize("batch", [1, 2, 3, 32, 256])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_training_stays_finite_at_every_batch_size_and_precision(
    activation: ActivationRanks, batch: int, precision: str
) -> None:
    layer = make(activation).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for seed in range(BASIS_PERIOD + 1):
        x = tokens(batch, seed=seed).to(layer.left.dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            layer(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in layer.state_dict().items():
        assert tensor.isfinite().all(), name
    for basis in (layer.feature_basis, layer.token_basis):
        if basis is not None:
            identity = basis.float().T @ basis.float()
            tolerance = 0.05 if precision == "bf16" else 1e-5
            assert torch.allclose(identity, torch.eye(len(identity)), atol=tolerance)


@any_mode
def test_an_input_of_zeros_or_of_one_repeated_row_is_no_trouble(activation: ActivationRanks) -> None:
    layer = make(activation)
    for x in (torch.zeros(4, 6, IN), torch.ones(4, 6, IN)):
        layer.passes = 0
        layer(x.double()).square().sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(layer))


@any_mode
def test_an_input_that_is_not_finite_shows_in_the_output(activation: ActivationRanks) -> None:
    assert make(activation)(tokens() * float("nan")).isnan().all()


@any_mode
def test_a_strictly_loaded_layer_goes_on_bit_equally(activation: ActivationRanks) -> None:
    layer = make(activation)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)

    def step(layer: SubspaceLinear, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        layer(tokens(seed=seed)).square().mean().backward()
        optimizer.step()

    step(layer, optimizer, 1)
    state = copy.deepcopy(layer.state_dict())
    step(layer, optimizer, 2)
    torch.manual_seed(99)
    other = SubspaceLinear(IN, OUT, RANK, activation=activation).double()
    other.load_state_dict(state, strict=True)
    step(other, torch.optim.SGD(other.parameters(), lr=0.01), 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True)
    )


@any_mode
def test_the_global_random_state_is_untouched(activation: ActivationRanks) -> None:
    layer, x = make(activation), tokens()
    before = torch.get_rng_state()
    layer(x).sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_a_new_layer_has_outputs_of_the_variance_of_a_new_dense_layer() -> None:
    torch.manual_seed(0)
    layer, dense, x = SubspaceLinear(96, 128, 32), nn.Linear(96, 128), torch.randn(4000, 96)
    with torch.no_grad():
        ratio = (layer(x).std() / dense(x).std()).item()
    assert ratio == pytest.approx(1.0, abs=0.1)


def test_parameters_and_macs_are_those_of_the_formula() -> None:
    layer, x = make(bias=False), tokens(4)
    form = LinearForm(OUT, IN, 4 * 6, RANK)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * form.macs
    assert sum(p.numel() for p in layer.parameters()) == form.parameters
