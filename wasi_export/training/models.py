"""timm models by configuration: created, given weights from a local file, and described as an input."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

from wasi_export.config import Config, ModelConfig
from wasi_export.errors import ConfigError, HostError, first_line, some
from wasi_export.manifest import InputSpec

State = dict[str, Tensor]


def create_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Returns the timm model with a head for `num_classes`, and weights where the config asks for them.

    Random weights come from torch's global generator: seed it first.

    Raises:
        ConfigError: timm has no such model or argument, the model cannot be had in the image size, or the
            checkpoint does not fit.
        HostError: pretrained weights cannot be downloaded.
    """
    if config.pretrained and config.checkpoint is not None:
        raise ConfigError(f"model.pretrained and model.checkpoint = {config.checkpoint}: choose one")
    require_known(config.name)
    arguments = dict(config.kwargs)
    if config.img_size is not None and _is_made_for_a_size(config.name):
        arguments["img_size"] = config.img_size
    try:
        model = timm.create_model(
            config.name,
            pretrained=config.pretrained,
            num_classes=num_classes,
            in_chans=config.in_chans,
            **arguments,
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"timm cannot make {config.name} with {arguments}: {error}") from error
    except OSError as error:  # every failed download; huggingface_hub's errors are OSErrors too
        raise HostError(
            f"the pretrained weights of {config.name} cannot be had ({first_line(error)}): check the "
            "network, or give a local file as model.checkpoint"
        ) from error
    except RuntimeError as error:
        if config.pretrained and "state_dict" in str(error):
            lines = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise ConfigError(
                f"the pretrained weights of {config.name} do not fit {arguments}: {lines}: leave out what "
                "changes shapes in model.kwargs, or set model.pretrained = false"
            ) from error
        if "pretrained" not in str(error).lower():
            raise
        raise ConfigError(f"{config.name}: {first_line(error)}") from error
    if config.checkpoint is not None:
        load_checkpoint(model, config.checkpoint)
    _require_image_size(model, config)
    return cast(nn.Module, model)


def random_feature(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the sum over the images of a random direction of the features that the head sees.

    Its gradients are those of all features, on the average: what does not change the features does not
    change them. The directions are the same in each call.
    """
    features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    directions = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    value: Tensor = (features * directions.to(features)).sum()
    return value


def log_likelihood(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the log-likelihood of classes drawn from what the model predicts, summed over the images.

    The second moments of its gradients are those of the Fisher information: what does not change the
    predictions does not change it. The draws are the same in each call.
    """
    logits: Tensor = model(images)
    probabilities = logits.detach().softmax(1).cpu()
    drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(0))
    return logits.log_softmax(1).gather(1, drawn.to(logits.device)).sum()


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Loads a .safetensors or .pth file of weights into a timm model, in place.

    Names are converted, position embeddings resized and colour filters summed to grey as timm does for its
    own pretrained weights. A head of another size, or none, leaves the model's head as it is.

    Raises:
        ConfigError: the file cannot be read, holds more than weights, or does not fit the model.
    """
    state = _adapted(read_state(path), model, path)
    own = model.state_dict()
    head = {key for key in own if _is_head(key, model)}
    if any(key not in state or state[key].shape != own[key].shape for key in head):
        state = {key: value for key, value in state.items() if not _is_head(key, model)}
    missing = list(own.keys() - state.keys() - head)
    unexpected = list(state.keys() - own.keys())
    reshaped = [
        f"{key} {_shape(state[key])} against {_shape(own[key])}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {kind} ({some(sorted(keys), 3)})"
        for kind, keys in (
            ("of another shape than the model's", reshaped),
            ("missing", missing),
            ("unknown to the model", unexpected),
        )
        if keys
    ]
    if problems:
        raise ConfigError(
            f"{path} does not fit the model: {'; '.join(problems)}: check model.name, model.img_size and "
            "model.kwargs"
        )
    model.load_state_dict(state, strict=False)  # all but the head was found to match


def input_spec(model: nn.Module, config: Config) -> InputSpec:
    """Returns how an image becomes the model's input, from timm's data config of the model.

    A grey model takes the mean over the colours of mean and std.
    """
    data = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size if size is not None else data["input_size"][-2:]
    if size is None and config.model.img_size is not None:
        height = width = config.model.img_size
    mean, std = tuple(map(float, data["mean"])), tuple(map(float, data["std"]))
    if config.model.in_chans == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return InputSpec(
        channels=config.model.in_chans,
        height=height,
        width=width,
        mean=mean,
        std=std,
        interpolation=data["interpolation"],
        crop_pct=config.data.crop_pct or min(1.0, data["crop_pct"]),
    )


def head_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the classifier of a timm model; distilled models have two."""
    classifier = model.get_classifier()  # type: ignore[operator]  # of every timm model
    return classifier if isinstance(classifier, tuple) else (classifier,)


def require_known(name: str) -> None:
    """Raises ConfigError where timm has no such model, or no weights of its tag."""
    architecture, _, tag = name.partition(".")  # after the dot: the tag of pretrained weights
    if ":" in name:
        return
    if timm.is_model(architecture):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
            hint = f"choose one of {', '.join(tags)}, or leave it out" if tags else "leave it out"
            message = f"timm {timm.__version__} has no tag {tag!r} of {architecture}: {hint}"
            raise ConfigError(message) from error
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
    raise ConfigError(f"timm {timm.__version__} has no model {name!r}: {hint}")


def read_state(path: Path) -> State:
    if not path.is_file():
        raise ConfigError(f"no checkpoint {path}: check model.checkpoint")
    try:
        state = load_state_dict(str(path), weights_only=True)
        if all(isinstance(value, Tensor) for value in state.values()):
            return cast(State, state)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, TypeError, AttributeError):
        pass  # all that torch, timm and safetensors raise; their advice to load unsafely is not passed on
    raise ConfigError(
        f"{path} is not a file of weights alone, and nothing else is opened: save the model's state_dict as "
        ".safetensors"
    )


def _is_made_for_a_size(name: str) -> bool:
    """Returns whether timm makes the model for one image size; the others take any, and no such argument."""
    pretrained = timm.get_pretrained_cfg(name)
    return pretrained is None or bool(pretrained.fixed_input_size)


def _require_image_size(model: nn.Module, config: ModelConfig) -> None:
    """Does nothing where the model takes images of the configured size.

    Some models (EfficientFormer) accept the argument and stay as they are, which only a forward pass shows.
    """
    size = config.img_size
    own = cast(dict[str, tuple[int, int, int]], model.pretrained_cfg)["input_size"][-2:]
    if size is None or own == (size, size) or hasattr(getattr(model, "patch_embed", None), "img_size"):
        return
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, config.in_chans, size, size))
    except RuntimeError as error:
        raise ConfigError(
            f"{config.name} cannot take images of {size}×{size} ({first_line(error)}): set model.img_size "
            f"to {own[0]}"
        ) from error
    finally:
        model.train(was_training)


def _adapted(state: State, model: nn.Module, path: Path) -> State:
    """Returns the state in the names and shapes of timm's model family."""
    convert: Callable[[State, nn.Module], State] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    if convert is not None:
        try:
            state = convert(state, model)
        except (KeyError, AttributeError, IndexError, ValueError, RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"{path} is not a checkpoint for this model: {first_line(error)}: check model.name"
            ) from error
    own = model.state_dict()
    for name in _names(model, "first_conv"):
        key = f"{name}.weight"
        if key in state and key in own and own[key].shape[1] != state[key].shape[1] == 3:
            state[key] = adapt_input_conv(own[key].shape[1], state[key])
    return state


def _is_head(key: str, model: nn.Module) -> bool:
    return any(key.startswith(f"{name}.") for name in _names(model, "classifier"))


def _names(model: nn.Module, field: str) -> tuple[str, ...]:
    """Returns the module names in a field of timm's pretrained config, which has one, several or none."""
    value = cast(dict[str, str | tuple[str, ...] | None], model.pretrained_cfg).get(field) or ()
    return (value,) if isinstance(value, str) else tuple(value)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"
