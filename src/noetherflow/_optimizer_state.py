"""The state of an optimizer under a move of the parameters: momenta are gradients, second moments are variances."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._params import snapshot
from noetherflow.symmetry import Action, AxisSymmetry, Symmetry

SecondMoments = Literal["transport", "reset"]
# A symmetry and the coordinates of its group element.
Move = tuple[Symmetry, Tensor]

_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
# Entries of the state of a parameter: averages of gradients, averages (and their maxima) of squares of gradients, and
# numbers that no move changes.
_GRADIENTS = ("momentum_buffer", "exp_avg")
_VARIANCES = ("exp_avg_sq", "max_exp_avg_sq")
_COUNTS = ("step",)


@final
@dataclass(frozen=True)
class StateChange:
    """What a move does to the state of an optimizer, computed and not yet written.

    Args:
        values: Tensors of the state, each with its new value.
        forgotten: Parameters whose state is removed, step count included, so that the optimizer starts it afresh.
    """

    values: tuple[tuple[Tensor, Tensor], ...] = ()
    forgotten: tuple[nn.Parameter, ...] = ()

    def write(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the state of the optimizer."""
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
        for parameter in self.forgotten:
            del optimizer.state[parameter]


def require_supported(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
    """Raise `SettingsError` unless the optimizer trains parameters of the model, and its state is known here.

    Args:
        optimizer: The optimizer.
        named: The parameters of the model.

    Raises:
        SettingsError: If the optimizer is not SGD, Adam or AdamW, holds no parameter of the model, or has entries of
            its state that are unknown.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, _OPTIMIZERS):
        raise SettingsError(
            f"only the state of torch.optim.SGD, Adam and AdamW moves with the parameters, got {kind}: if it wraps an "
            "optimizer, give that optimizer; otherwise rebalance without optimizer= and start the optimizer afresh"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in named.values()):
        raise SettingsError(
            f"the {kind} given as optimizer= holds none of the model's {len(named)} parameters: it may belong to a "
            "copy of the model; give the optimizer that was made from model.parameters()"
        )
    for name, state in _states(optimizer, named):
        unknown = sorted(state.keys() - {*_GRADIENTS, *_VARIANCES, *_COUNTS})
        if unknown:
            raise SettingsError(
                f"the {kind} keeps {unknown} for {name!r}, whose transformation is not known (expected only "
                f"{[*_GRADIENTS, *_VARIANCES, *_COUNTS]}): rebalance without optimizer= and start the optimizer afresh"
            )


def transport(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    moves: Sequence[Move],
    second_moments: SecondMoments,
) -> StateChange:
    r"""The state of an optimizer after a move $\theta \to e^{Q_x}\theta$.

    Averages of gradients become $e^{-Q_x}$ times what they were. Second moments are variances v of gradients with
    entries taken as uncorrelated, and become the diagonal of $e^{-Q_x}\,\mathrm{diag}(v)\,e^{-Q_x}$. For scalings this
    is exact. Where rows are mixed it is an estimate, and where single entries are mixed the state is removed; a
    warning names these parameters.

    Args:
        optimizer: The optimizer, which stays as it is.
        named: The parameters of the model.
        moves: The symmetries and coordinates, in the order in which they act.
        second_moments: Whether second moments under symmetries that mix rows are transported or removed.

    Returns:
        The new values.
    """
    states = dict(_states(optimizer, named))
    with_variances = {name for name, state in states.items() if any(key in state for key in _VARIANCES)}
    mixed: set[str] = set()
    forgotten: set[str] = set()
    for symmetry, _ in moves:
        if symmetry.action is not Action.SCALES_ENTRIES:
            removed = second_moments == "reset" or not isinstance(symmetry, AxisSymmetry)
            (forgotten if removed else mixed).update(with_variances & set(symmetry.names))
    values = []
    for key in (*_GRADIENTS, *_VARIANCES):
        tensors = {name: state[key] for name, state in states.items() if isinstance(state.get(key), Tensor)}
        moved = _moved(tensors, named, moves, key)
        values += [(tensors[name], moved[name]) for name in tensors if name in moved and name not in forgotten]
    _warn(type(optimizer).__name__, sorted(mixed - forgotten), sorted(forgotten))
    return StateChange(tuple(values), tuple(named[name] for name in named if name in forgotten))


def _moved(
    tensors: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], moves: Sequence[Move], key: str
) -> dict[str, Tensor]:
    """An entry of the state after the moves, by name, in float64, for the parameters on which the moves act."""
    touched = {name for symmetry, _ in moves for name in symmetry.names}
    if not touched & tensors.keys():
        return {}
    # A parameter without state has received no gradient: zero.
    result = snapshot({name: tensors.get(name, torch.zeros_like(named[name])) for name in touched})
    for symmetry, x in moves:
        if key in _GRADIENTS:
            result = symmetry.act(-x, result)
        elif isinstance(symmetry, AxisSymmetry):
            result = symmetry.act_on_variances(-x, result)
    return result


def _states(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The state of every parameter that has a state, by name."""
    # `in` and not a lookup, which would create an entry.
    return ((name, optimizer.state[parameter]) for name, parameter in named.items() if parameter in optimizer.state)


def _warn(kind: str, estimated: list[str], forgotten: list[str]) -> None:
    """A warning that names the parameters whose second moments are not exact after the move."""
    sentences = []
    if estimated:
        sentences.append(
            f"the second moments of {kind} for {estimated} are estimates after the move, because a symmetry mixes rows "
            'of them: correlations between rows are not known. second_moments="reset" starts their state afresh'
        )
    if forgotten:
        sentences.append(
            f"the state of {kind} for {forgotten} starts afresh, step count included, because a symmetry mixes entries "
            "of them"
        )
    if sentences:
        warnings.warn("; ".join(sentences), UserWarning, stacklevel=4)
