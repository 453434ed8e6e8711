"""The second moments of the gradients of minibatches that Adam keeps: no data is needed to read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from noetherflow import _store
from noetherflow._errors import ParameterNameError, ParameterShapeError, SettingsError
from noetherflow._params import aliases
from noetherflow._table import Column, Table, html_of, steps, text_of
from noetherflow._types import Params
from noetherflow.noise.exact import resolve
from noetherflow.noise.table import halves
from noetherflow.optimizers.by_parameter import number
from noetherflow.optimizers.state import Source, adam_of, second_moment
from noetherflow.symmetry import Grams, Symmetry

# The share of the noise force that eps takes away from which a note says so.
_MATTERS = 0.01
_LEGEND = (
    ("sqrt v+", "square roots of v on the plus side, summed over entries"),
    ("sqrt v-", "square roots of v on the minus side, summed over entries"),
    ("eps", "share of the noise force that eps takes away, which the equilibrium neglects"),
)


@final
@dataclass(frozen=True)
class SecondMoments:
    r"""The second moments $v = E\,g_S^2$ of the gradients of minibatches, entry by entry, as Adam averages them.

    Adam keeps $a' = \beta_2 a + (1 - \beta_2)\,g_S^2$, which after t steps is an average with the weights
    $(1 - \beta_2)\,\beta_2^k$ of the gradients k steps ago. The weights sum to $1 - \beta_2^t$, and
    $v = a / (1 - \beta_2^t)$. The square of the mean gradient is included.

    Args:
        values: v by parameter, float64.
        steps: The number of steps t that each average has seen.
        symmetries: The symmetries that are to be brought to rest, with parameters under their canonical names.
        eps: The $\epsilon$ of the optimizer, by parameter; 0 for a parameter without a name in it.
        without: The parameters that the optimizer holds and that have taken no step.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> moments = nf.second_moments(optimizer, net, {"hidden": nf.DiagonalSymmetry(into, out_of)})
        >>> moments.steps["0.weight"], moments.values["0.weight"].shape
        (5, torch.Size([3, 4]))

    Source: Kingma and Ba (2015) for the average and its correction.
    """

    values: dict[str, Tensor] = field(repr=False)
    steps: dict[str, int] = field(repr=False)
    symmetries: dict[str, Symmetry]
    eps: dict[str, float] = field(default_factory=dict, repr=False)
    without: tuple[str, ...] = ()

    def select(self, *names: str) -> "SecondMoments":
        """The second moments, restricted to some of the symmetries.

        Args:
            names: The symmetries to keep, by name.

        Returns:
            The same second moments, with these symmetries alone, in the order given.

        Raises:
            ParameterNameError: If there is no symmetry of that name.
        """
        missing = [name for name in names if name not in self.symmetries]
        if missing:
            raise ParameterNameError(f"there are no symmetries {missing}, only {sorted(self.symmetries)}")
        return replace(self, symmetries={name: self.symmetries[name] for name in names})

    def for_symmetries(self, symmetries: Mapping[str, Symmetry], model: nn.Module | None = None) -> "SecondMoments":
        """The second moments, for other symmetries.

        Args:
            symmetries: By name.
            model: The model, if the symmetries name a tied weight by another name than the first.

        Returns:
            The same second moments, with these symmetries.

        Raises:
            ParameterNameError: If a symmetry acts on a parameter that has no second moments.
            ParameterShapeError: If a symmetry does not fit a parameter.
        """
        names = {name: name for name in self.values} | ({} if model is None else aliases(model))
        return replace(self, symmetries=_fitting(symmetries, names, self.values, self.without))

    def taken_by_eps(self) -> dict[str, float]:
        r"""Per symmetry, the share of the noise force that $\epsilon$ takes away.

        The force of the noise on an entry is $\eta\,v / (\sqrt v + \epsilon)$. Where $\sqrt v \gg \epsilon$ it is
        $\eta\sqrt v$, which is what the equilibrium has, and scales along the orbit. The difference is
        $\eta\sqrt v\,\epsilon / (\sqrt v + \epsilon)$.

        Returns:
            The shares, with equal learning rates of all parameters; 0 if there is no force at all.
        """
        force, taken = {}, {}
        for name, v in self.values.items():
            root, eps = v.sqrt(), self.eps.get(name, 0.0)
            # Square roots, because sums over sides are those of squares.
            force[name] = root.sqrt()
            taken[name] = torch.where(root > 0, root * eps / (root + eps), 0.0).sqrt()
        shares = {}
        for name, symmetry in self.symmetries.items():
            every, part = (sum(_sides(symmetry, tensors)) for tensors in (force, taken))
            shares[name] = float(part / every) if every > 0 else 0.0
        return shares

    @property
    def notes(self) -> tuple[str, ...]:
        """Where eps matters, and which parameters are left out, in sentences."""
        notes = [
            f"{name}: eps matters: it takes away {share:.1%} of the noise force, which the equilibrium neglects"
            for name, share in self.taken_by_eps().items()
            if share > _MATTERS
        ]
        if self.without:
            notes.append(f"Without a step, and left out: {', '.join(self.without)}")
        return tuple(notes)

    def save(self, path: str | Path) -> None:
        """Write the second moments to a file (safetensors and JSON, no pickle), completely or not at all.

        Args:
            path: The file, by custom `*.safetensors`.

        Raises:
            FileError: If the file cannot be written.
        """
        _store.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "SecondMoments":
        """Read second moments that `save` wrote, equal to the last bit.

        Args:
            path: The file.

        Returns:
            The second moments, on the CPU.

        Raises:
            FileError: If the file is missing, damaged, or holds something else.
        """
        return _store.load(cls, path, require_usable)

    def __str__(self) -> str:
        return text_of(_tables(self))

    def _repr_html_(self) -> str:
        return html_of(_tables(self))


def second_moments(
    optimizer: Source,
    model: nn.Module,
    symmetries: Mapping[str, Symmetry] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> SecondMoments:
    r"""Read the second moments $E\,g_S^2$ of the gradients of minibatches from the state of Adam or AdamW.

    They are all that the equilibrium of AdamW needs to know of the data, so that a checkpoint is enough.

    A state dict numbers its parameters. Their names are those of its `param_names`, if the optimizer was made from
    `model.named_parameters()`. Otherwise every group is taken to hold parameters in the order of the model, and shapes
    say which; where shapes leave a choice, the usual recipes decide (weight decay for tensors of two or more dimensions
    alone, or for all parameters but biases and norms, as `transformers.Trainer` has it).

    Args:
        optimizer: A `torch.optim.AdamW` or `Adam`; or its state dict; or a file that holds the state dict; or the
            folder of a checkpoint that `transformers.Trainer` wrote.
        model: The model that it trains. Parameters of which the optimizer keeps no state are left out.
        symmetries: By name; none by default, and `for_symmetries` adds them later.
        names: For a state dict: the names of the parameters in its order, group by group.

    Returns:
        The second moments.

    Raises:
        SettingsError: If the optimizer is of another kind, uses amsgrad or maximize, has taken no step, or does not
            belong to the model; or if the names of its parameters cannot be told from shapes.
        FileError: If the file is missing, damaged, or holds something else.
        ParameterNameError: If a symmetry acts on a parameter that has no second moments.
        FrozenParameterError: If a symmetry acts on a parameter that does not require gradients.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        >>> net(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> moments = nf.second_moments(optimizer.state_dict(), net)
        >>> torch.allclose(moments.values["0.bias"].sqrt(), net[0].bias.grad.double().abs())
        True

    Source: Kingma and Ba (2015).
    """
    canonical = aliases(model)
    state = adam_of(optimizer, model, names)
    if not state.states:
        raise SettingsError("the optimizer has taken no step, so that it keeps no second moments: train first")
    group_of = {}
    if isinstance(optimizer, torch.optim.Optimizer):
        held = {id(parameter): group for group in state.groups for parameter in group["params"]}
        group_of = {name: held[id(p)] for name, p in model.named_parameters() if id(p) in held}
    else:
        group_of = {name: group for group in state.groups for name in group["param_names"]}
    values = {name: second_moment(entry, group_of[name]) for name, entry in state.states.items()}
    for name, parameter in model.named_parameters():
        if name in values and values[name].shape != parameter.shape:
            raise SettingsError(
                f"the second moments of {name!r} have the shape {tuple(values[name].shape)}, the parameter "
                f"{tuple(parameter.shape)}"
            )
    return SecondMoments(
        values,
        {name: int(number(entry["step"])) for name, entry in state.states.items()},
        _fitting(resolve(model, symmetries or {}), canonical, values, state.without),
        {name: float(number(group_of[name]["eps"])) for name in values},
        state.without,
    )


def _fitting(
    symmetries: Mapping[str, Symmetry], names: Mapping[str, str], values: Params, without: Sequence[str]
) -> dict[str, Symmetry]:
    """Symmetries under canonical names, after a check that the second moments are known where they act."""
    renamed = {name: symmetry.rename(names) for name, symmetry in symmetries.items()}
    for name, symmetry in renamed.items():
        if missing := [parameter for parameter in symmetry.names if parameter not in values]:
            reason = (
                "have taken no step" if set(missing) <= set(without) else "are not among the optimizer's parameters"
            )
            raise ParameterNameError(
                f"symmetry {name!r} acts on {missing}, which {reason}, so that there are no second moments of them: "
                "leave this symmetry out"
            )
        symmetry.check(values)
    return renamed


def _sides(symmetry: Symmetry, tensors: Params) -> Grams:
    """Sums of squares of tensors over the plus and the minus side of a symmetry."""
    return halves(symmetry, symmetry.grams({name: tensors[name] for name in symmetry.names}))


def require_usable(moments: SecondMoments) -> None:
    """Raise unless the parts, made by hand or read from a file, belong together and are second moments."""
    for what, given in (("steps", moments.steps), ("eps", moments.eps)):
        if given.keys() != moments.values.keys() and (given or what == "steps"):
            raise ParameterShapeError(f"{what} belongs to {sorted(given)}, expected {sorted(moments.values)}")
    if twice := sorted(moments.values.keys() & set(moments.without)):
        raise ParameterShapeError(f"{twice} have second moments, and have taken no step")
    for symmetry in moments.symmetries.values():
        symmetry.check(moments.values)
    for name, tensor in moments.values.items():
        if tensor.dtype != torch.float64:
            raise ParameterShapeError(f"values[{name!r}] has dtype {tensor.dtype}, expected float64")
        if (tensor < 0).any():
            raise ParameterShapeError(f"values[{name!r}] holds numbers below 0, which are no second moments")
        if moments.steps[name] < 1:
            raise ParameterShapeError(f"steps[{name!r}] is {moments.steps[name]}, expected 1 or more")


def _tables(moments: SecondMoments) -> tuple[Table, ...]:
    """The second moments on both sides of each symmetry, and what the columns mean."""
    numbers = sorted(moments.steps.values())
    taken = " to ".join(steps(count) for count in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else "0"
    size = sum(tensor.numel() for tensor in moments.values.values())
    title = f"Second moments of Adam ({len(moments.values)} parameters, {size:,} entries, {taken} steps)"
    shares = moments.taken_by_eps()
    roots = {name: v.sqrt().sqrt() for name, v in moments.values.items()}
    rows = []
    for name, symmetry in moments.symmetries.items():
        plus, minus = _sides(symmetry, roots)
        rows.append((name, f"{plus:.3g}", f"{minus:.3g}", f"{shares[name]:.1%}"))
    columns = (Column("symmetry", folds=True), *(Column(heading, right=True) for heading, _ in _LEGEND))
    legend = Table("", (Column("", right=True), Column("", folds=True)), _LEGEND)
    return Table(title, columns, tuple(rows), moments.notes), legend
