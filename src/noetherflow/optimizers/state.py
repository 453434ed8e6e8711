"""What Adam and AdamW keep: parameter groups and the state of every parameter, live, as a state dict, or on disk."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from noetherflow._device import CPU
from noetherflow._errors import FileError, SettingsError
from noetherflow._params import canonical_names
from noetherflow.optimizers.by_parameter import number
from noetherflow.optimizers.checks import filled_groups
from noetherflow.optimizers.naming import Shape, names_by_shape

Source = torch.optim.Optimizer | Mapping[str, Any] | str | Path
"""An optimizer, its state dict, a file that holds the state dict, or a folder that `transformers.Trainer` wrote."""

# The files in which transformers.Trainer keeps the state of the optimizer.
_FILES = ("optimizer.pt", "optimizer.bin")
_STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
_MEANINGS = {
    "amsgrad": "divides by the largest v so far, which no equilibrium determines",
    "maximize": "follows the gradient upwards",
}
_FORMS = "a torch.optim.AdamW or Adam, its state dict, a file optimizer.pt, or the folder of a checkpoint"


@final
@dataclass(frozen=True)
class AdamState:
    """The parameter groups and the state of an Adam or AdamW.

    Args:
        groups: The parameter groups that hold parameters. Those of a saved optimizer number their parameters, and have
            `param_names` if the names are known.
        states: The state of every parameter that has taken a step, by canonical name; empty without names.
        without: The parameters in the groups that have taken no step.
        decoupled: Whether weight decay acts on the parameters; None if the file does not say.
    """

    groups: tuple[Mapping[str, Any], ...]
    states: Mapping[str, Mapping[str, Any]]
    without: tuple[str, ...]
    decoupled: bool | None


def adam_of(source: Source, model: nn.Module | None = None, names: Sequence[str] | None = None) -> AdamState:
    """Read what an Adam or AdamW keeps.

    Args:
        source: The optimizer, its state dict, or a path.
        model: The model that gives parameters their names; None leaves a saved optimizer without them unless its groups
            have `param_names`.
        names: The names of the parameters of a saved optimizer, in its order.

    Returns:
        Groups and states.

    Raises:
        SettingsError: If it is another optimizer or uses amsgrad or maximize, or if its parameters do not fit the model
            or have no names.
        FileError: If there is no such file, or if it holds something else.
    """
    if isinstance(source, torch.optim.Optimizer):
        return _live(source, model, names)
    what, saved = _saved(source)
    groups = [dict(group) for group in saved["param_groups"] if group["params"]]
    numbered = {index: state for index, state in saved["state"].items() if state}
    _require_adam(groups, numbered, what)
    by_name: dict[str, int] = {}
    if model is not None or names is not None or all("param_names" in group for group in groups):
        for group, listed in zip(groups, _names(groups, numbered, model, names), strict=True):
            group["param_names"] = listed
            by_name.update(zip(listed, group["params"], strict=True))
    states = {name: numbered[i] for name, i in by_name.items() if i in numbered and number(numbered[i]["step"])}
    without = tuple(name for name in by_name if name not in states)
    kinds = [group.get("decoupled_weight_decay") for group in groups]
    if None not in kinds:
        return AdamState(tuple(groups), states, without, _equal(kinds))
    # Before PyTorch 2.7 groups do not say which of the two it is; transformers.Trainer has AdamW, and no Adam.
    trainer = isinstance(source, str | Path) and Path(source).is_dir()
    known = trainer or not any(number(group["weight_decay"]) for group in groups)
    return AdamState(tuple(groups), states, without, True if known else None)


def lr_of(group: Mapping[str, Any]) -> float:
    """The learning rate of a group: the present, or the initial if a schedule has ended at 0.

    Args:
        group: The parameter group.

    Returns:
        The learning rate.

    Raises:
        SettingsError: If it is 0 and there is no initial learning rate.
    """
    lr = float(number(group["lr"])) or float(number(group.get("initial_lr", 0.0)))
    if not lr:
        raise SettingsError(
            "the learning rate of a parameter group is 0, as at the end of a schedule, and the group does not say the "
            "initial learning rate: give lr=, the learning rate at which the equilibrium is wanted"
        )
    return lr


def second_moment(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """The bias-corrected average of squares of gradients of a parameter, float64, on the CPU."""
    average = state["exp_avg_sq"].detach().to(CPU).to(torch.float64)
    dense = average.to_dense() if average.is_sparse else average
    # expm1 keeps the digits of 1 - beta2 ** step where beta2 is next to 1.
    beta2, step = number(group["betas"])[1], number(state["step"])
    return dense / (-math.expm1(step * math.log(beta2)) if beta2 else 1.0)


def _live(optimizer: torch.optim.Optimizer, model: nn.Module | None, names: Sequence[str] | None) -> AdamState:
    """The groups of an optimizer, and the states of the parameters of a model."""
    if not isinstance(optimizer, torch.optim.Adam):
        sgd = isinstance(optimizer, torch.optim.SGD)
        raise SettingsError(
            f"expected torch.optim.AdamW or Adam, got {type(optimizer).__name__}, whose equilibrium is another: "
            f"{'give nf.SGD.from_optimizer' if sgd else 'not covered; if it wraps an optimizer, give that optimizer'}"
        )
    if names is not None:
        raise SettingsError("names= is for state dicts and files: an optimizer knows its parameters, give model= alone")
    groups = filled_groups(optimizer)
    _require_options(groups)
    # A group from an older PyTorch does not say.
    decoupled = _equal([g.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)) for g in groups])
    named = {} if model is None else dict(model.named_parameters())
    held = {id(parameter) for group in groups for parameter in group["params"]}
    # `in` and not a lookup, which would create an entry.
    states = {
        name: state
        for name, parameter in named.items()
        if parameter in optimizer.state and (state := optimizer.state[parameter]) and number(state["step"])
    }
    without = tuple(name for name, parameter in named.items() if id(parameter) in held and name not in states)
    if model is not None and not states and not without:
        raise SettingsError(
            f"the {type(optimizer).__name__} holds none of the model's {len(named)} parameters: give the model that it "
            "trains, or optimizer.state_dict() for a copy of that model"
        )
    return AdamState(tuple(groups), states, without, decoupled)


def _saved(source: object) -> tuple[str, Mapping[str, Any]]:
    """A state dict, and where it comes from in words."""
    if isinstance(source, str | Path):
        path = _file(Path(source))
        content = _loaded(path)
        what = str(path)
    else:
        content, what = source, "the state dict"
    if not isinstance(content, Mapping):
        raise SettingsError(f"expected {_FORMS}, got {what if content is not source else type(source).__name__}")
    if not {"state", "param_groups"} <= content.keys():
        inner = [key for key, value in content.items() if isinstance(value, Mapping) and "param_groups" in value]
        remedy = f": give its entry {inner[0]!r}, loaded with torch.load" if inner else ""
        raise SettingsError(
            f"{what} is not the state dict of an optimizer, which has the entries state and param_groups, but has "
            f"{sorted(map(str, content))[:8]}{remedy}"
        )
    return what, content


def _file(path: Path) -> Path:
    """The file of the state of an optimizer: the path itself, or a file in the folder of a checkpoint."""
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    inner = sorted(child.name for child in path.glob("checkpoint-*"))
    remedy = (
        f"give a checkpoint in it, such as {inner[-1]}" if inner else "was the checkpoint saved with save_only_model?"
    )
    raise FileError(f"{path}: the folder has no file {' or '.join(_FILES)}: {remedy}")


def _loaded(path: Path) -> object:
    try:
        return torch.load(path, map_location=CPU, weights_only=True)
    except FileNotFoundError:
        raise FileError(f"{path}: there is no such file, check the path") from None
    except Exception as error:  # torch.load raises exceptions of many kinds on damaged files
        reason = " ".join(str(error).split())[:200]
        raise FileError(
            f"{path}: not a file that torch.save wrote of the state of an optimizer, or damaged "
            f"({type(error).__name__}: {reason})"
        ) from error


def _require_adam(groups: Sequence[Mapping[str, Any]], states: Mapping[int, Mapping[str, Any]], what: str) -> None:
    """Raise unless groups and states are those of Adam or AdamW of PyTorch."""
    keys = {key for state in states.values() for key in state}
    expected = f"expected the state of torch.optim.AdamW or Adam, got {what} with"
    if keys and "exp_avg_sq" not in keys:
        eight = ", as of bitsandbytes in 8 bits, which are not averages in full precision," if "state2" in keys else ""
        raise SettingsError(f"{expected} {sorted(keys)}{eight} and without exp_avg_sq: not covered")
    if unknown := sorted(keys - _STATE):
        raise SettingsError(f"{expected} {unknown}, which another optimizer keeps: not covered")
    if not groups or not all({"betas", "eps", "weight_decay", "amsgrad"} <= group.keys() for group in groups):
        listed = sorted({key for group in groups for key in group} - {"params"})
        raise SettingsError(f"{expected} the settings {listed}, which are those of another optimizer: not covered")
    _require_options(groups)
    for index, state in states.items():
        if not isinstance(state.get("exp_avg_sq"), Tensor) or "step" not in state:
            raise SettingsError(f"{expected} an incomplete state of parameter {index}: {sorted(state)}")


def _require_options(groups: Sequence[Mapping[str, Any]]) -> None:
    for name, meaning in _MEANINGS.items():
        if any(group.get(name) for group in groups):
            raise SettingsError(f"{name}=True {meaning}: not covered, use {name}=False")


def _names(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[int, Mapping[str, Any]],
    model: nn.Module | None,
    names: Sequence[str] | None,
) -> list[list[str]]:
    """The canonical names of the parameters of every group."""
    shapes: list[list[Shape]] = [[_shape(states.get(index)) for index in group["params"]] for group in groups]
    if names is not None:
        if isinstance(names, str) or len(names) != sum(map(len, shapes)):
            raise SettingsError(f"names must be {sum(map(len, shapes))} names, as the optimizer has parameters")
        rest = iter(names)
        listed = [[next(rest) for _ in group] for group in shapes]
    elif all("param_names" in group for group in groups):
        listed = [[*group["param_names"]] for group in groups]
    elif model is not None:
        return names_by_shape(shapes, [number(group["weight_decay"]) for group in groups], model)
    if model is None:
        return listed
    canonical = canonical_names(model, [name for group in listed for name in group], "the optimizer")
    parameters = dict(model.named_parameters())
    renamed = [[canonical[name] for name in group] for group in listed]
    every = [name for group in renamed for name in group]
    if len(set(every)) < len(every):
        raise SettingsError(f"names has names twice: {sorted({name for name in every if every.count(name) > 1})}")
    for name, shape in zip(every, (shape for group in shapes for shape in group), strict=True):
        if shape is not None and shape != parameters[name].shape:
            raise SettingsError(
                f"the optimizer does not belong to this model: {name!r} has the shape {tuple(parameters[name].shape)}, "
                f"its second moments {tuple(shape)}"
            )
    return renamed


def _shape(state: Mapping[str, Any] | None) -> Shape:
    return None if state is None else state["exp_avg_sq"].shape


def _equal(kinds: Sequence[object]) -> bool:
    """Whether the weight decay of all groups is decoupled."""
    if len(set(kinds)) > 1:
        raise SettingsError("all parameter groups must have the same kind of weight decay, decoupled or not")
    return bool(kinds[0])
