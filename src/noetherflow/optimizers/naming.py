"""The names of the parameters of a saved optimizer, which numbers them: recovered from shapes."""

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from noetherflow._errors import SettingsError

# The shape of a parameter of the optimizer; None if the optimizer keeps no state of it.
Shape = torch.Size | None
# Beyond this many partial assignments, shapes say too little.
_MOST = 100_000
# Names of parameters to which transformers.Trainer applies no weight decay, beside those in an nn.LayerNorm.
_UNDECAYED = [re.compile(part) for part in (r"bias", r"layernorm", r"rmsnorm", r"(^|\.)norm($|\.)", r"_norm($|\.)")]
_REMEDY = "give names=[...], the names of the model's parameters in the optimizer's order, group by group"


def names_by_shape(groups: Sequence[Sequence[Shape]], decays: Sequence[float], model: nn.Module) -> list[list[str]]:
    """The names of the parameters in every group, if shapes determine them.

    Each group holds parameters in the order of the model, so that the groups interleave to the list of all parameters.
    Where several interleavings have these shapes, the usual recipes decide: weight decay for tensors of two or more
    dimensions, or for all but biases and norms, as `transformers.Trainer` has it.

    Args:
        groups: The shapes of the parameters of every group.
        decays: The weight decay of every group.
        model: The model.

    Returns:
        Names, group by group.

    Raises:
        SettingsError: If no interleaving has these shapes, or if several have and the recipes do not choose among them.
    """
    count = sum(map(len, groups))
    named = dict(model.named_parameters())
    trained = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    # An optimizer made from model.parameters() holds frozen parameters too.
    if len(trained) != count and len(named) != count:
        raise SettingsError(
            f"the optimizer holds {count} parameters, the model {len(trained)} that require gradients, of "
            f"{len(named)}: freeze the parameters that the optimizer does not train, or {_REMEDY}"
        )
    shapes = {name: tensor.shape for name, tensor in (trained if len(trained) == count else named).items()}
    choice = _interleaving(groups, [*shapes.values()])
    if choice is not None:
        return _grouped([*shapes], choice, len(groups))
    splits = {tuple(split): split for split in _usual(groups, decays, model, shapes)}
    if len(splits) == 1:
        (split,) = splits.values()
        return _grouped([*shapes], split, len(groups))
    raise SettingsError(
        f"the groups of {[*map(len, groups)]} parameters, with weight decays {[*decays]}, can be assigned to the names "
        f"of the model in several ways, and {'several of' if splits else 'none of'} the usual recipes for weight decay "
        f"(for matrices only; for all but biases and norms) agree with the shapes: {_REMEDY}"
    )


def _interleaving(groups: Sequence[Sequence[Shape]], shapes: Sequence[torch.Size]) -> list[int] | None:
    """The group of every parameter of the model; None if several interleavings have these shapes."""
    start = (0,) * len(groups)
    # After each parameter: how many of every group are used, and the number of ways to get there.
    layers = [{start: 1}]
    for shape in shapes:
        reached: dict[tuple[int, ...], int] = {}
        for used, ways in layers[-1].items():
            for index, group in enumerate(groups):
                if used[index] < len(group) and group[used[index]] in (None, shape):
                    after = _shifted(used, index, 1)
                    reached[after] = reached.get(after, 0) + ways
        if not reached:
            raise SettingsError(_misfit(groups, shapes, layers))
        if len(reached) > _MOST:
            return None
        layers.append(reached)
    place = tuple(map(len, groups))
    if layers[-1][place] > 1:
        return None
    choice = []
    for ways_before, shape in zip(reversed(layers[:-1]), reversed(shapes), strict=True):
        index = next(
            k
            for k, group in enumerate(groups)
            if place[k] and group[place[k] - 1] in (None, shape) and _shifted(place, k, -1) in ways_before
        )
        choice.append(index)
        place = _shifted(place, index, -1)
    return choice[::-1]


def _usual(
    groups: Sequence[Sequence[Shape]], decays: Sequence[float], model: nn.Module, shapes: Mapping[str, torch.Size]
) -> Iterator[list[int]]:
    """The group of every parameter by the usual recipes for two groups, where the shapes agree."""
    if len(groups) != 2 or (decays[0] != decays[1] and 0 not in decays):
        return
    # Recipes list the group with weight decay first, which is all there is to know if neither has any.
    decayed = 1 if decays[1] > decays[0] else 0
    for recipe in (_matrices(shapes), _of_trainer(model)):
        split = [decayed if name in recipe else 1 - decayed for name in shapes]
        parts = [[shape for shape, k in zip(shapes.values(), split, strict=True) if k == index] for index in (0, 1)]
        if all(_agree(group, part) for group, part in zip(groups, parts, strict=True)):
            yield split


def _agree(group: Sequence[Shape], shapes: Sequence[torch.Size]) -> bool:
    return len(group) == len(shapes) and all(held in (None, shape) for held, shape in zip(group, shapes, strict=True))


def _matrices(shapes: Mapping[str, torch.Size]) -> set[str]:
    """The parameters of two or more dimensions."""
    return {name for name, shape in shapes.items() if len(shape) >= 2}


def _of_trainer(model: nn.Module) -> set[str]:
    """The parameters to which `transformers.Trainer` applies weight decay."""
    norms = [f"{name}." for name, module in model.named_modules() if name and isinstance(module, nn.LayerNorm)]
    return {
        name
        for name, _ in model.named_parameters()
        if not any(pattern.search(name.lower()) for pattern in _UNDECAYED) and not name.startswith(tuple(norms))
    }


def _grouped(names: Sequence[str], choice: Sequence[int], count: int) -> list[list[str]]:
    return [[name for name, index in zip(names, choice, strict=True) if index == group] for group in range(count)]


def _shifted(used: tuple[int, ...], index: int, by: int) -> tuple[int, ...]:
    return (*used[:index], used[index] + by, *used[index + 1 :])


def _misfit(
    groups: Sequence[Sequence[Shape]], shapes: Sequence[torch.Size], layers: Sequence[Mapping[tuple[int, ...], int]]
) -> str:
    """Where no interleaving goes on."""
    place = len(layers) - 1
    next_shapes = sorted(
        {
            str(tuple(shape))
            for used in layers[-1]
            for k, group in zip(used, groups, strict=True)
            if k < len(group) and (shape := group[k]) is not None
        }
    )
    return (
        f"the optimizer does not belong to this model: parameter {place} of the model has the shape "
        f"{tuple(shapes[place])}, that of the optimizer {' or '.join(next_shapes)}. If the optimizer lists "
        f"the parameters in another order, {_REMEDY}"
    )
