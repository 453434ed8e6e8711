r"""The exact diagonal of the Hessian of networks that are linear in every single parameter.

With outputs $f(\theta)$ and the loss $\ell(f)$ of an example, $H = J^T \ell'' J + \sum_c \ell'_c\,\nabla^2 f_c$. The
diagonal of the second term is zero where f is a piecewise-linear function of every single entry of $\theta$, all others
held: linear and convolution layers with ReLU or max-pooling, each weight used once. The diagonal of the first term, the
Gauss-Newton part, takes a backward pass for every output: $\ell'' = \sum_j \lambda_j u_j u_j^T$ gives
$H_{pp} = E \sum_j \lambda_j (\partial_p\,u_j\cdot f)^2$.
"""

import re
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from noetherflow._autograd import leaf, nodes_of
from noetherflow._batch import is_per_example, tensors_of
from noetherflow._errors import CoupledExamplesError
from noetherflow._model_function import ModelFunction
from noetherflow._per_example import own_randomness, require_uncoupled
from noetherflow._types import Batch, Loss, Params
from noetherflow.forecasting.mean_loss import MeanLoss, NoDoubleBackwardError

# Outputs of an example up to which a backward pass for each is called cheap.
_OUTPUTS = 32
# Entries of gradients of examples, over all outputs, that are computed at most.
_ENTRIES = 4e9
# Gradients of examples that are held at a time, in bytes.
_BYTES = 2**27
# Entries of H that are compared with a second derivative, at most.
_COMPARED = 96
# Nodes of a graph that pass entries on as they are.
_VIEW = re.compile(r"(T|View|UnsafeView|Reshape|Transpose|Permute|Unsqueeze|Squeeze|Expand|Clone|Alias)Backward")
# Largest difference of an entry, relative to the largest entry of its block.
_ROUNDING = {torch.float64: 1e-7, torch.float32: 2e-3}


@final
class _Outputs(nn.Module):
    """A loss that projects the outputs of the model: sum over c of factor_c f_c, shape (B,)."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.inner = loss

    def forward(self, model: nn.Module, batch: tuple[Batch, Tensor]) -> Tensor:
        given, factors = batch
        _, outputs = observed(self.inner, model, given)
        return (outputs.flatten(1) * factors).sum(1)


def observed(loss: Loss, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The losses of a batch, and the outputs of the model in the only call that the loss makes.

    Args:
        loss: The loss.
        model: The model.
        batch: The batch.

    Returns:
        The losses, shape (B,), and the outputs, shape (B, ...).

    Raises:
        ValueError: If the loss calls the model not exactly once, or the output is not a tensor.
    """
    outputs: list[Any] = []
    hook = model.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        losses = loss(model, batch)
    finally:
        hook.remove()
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].ndim < 2:
        raise ValueError("expected a model that is called once and returns a tensor of shape (B, ...)")
    return losses, outputs[0]


@final
class Exact:
    """The exact diagonal of the Hessian of each batch.

    Args:
        mean_loss: The mean loss.
    """

    def __init__(self, mean_loss: MeanLoss) -> None:
        self._given = mean_loss
        self._function = ModelFunction(mean_loss.model, _Outputs(mean_loss.loss), mean_loss.dtype)

    @classmethod
    def if_valid(cls, mean_loss: MeanLoss) -> tuple["Exact | None", str]:
        """The exact diagonal where it is cheap and where it is proved, and the reason where it is not.

        The proof compares entries of every block with a second derivative of the loss: the largest entry and an entry
        at random.

        Args:
            mean_loss: The mean loss.

        Returns:
            The exact diagonal or None, and why it is None.
        """
        try:
            require_uncoupled(mean_loss.model)
            exact = cls(mean_loss)
            outputs = exact._curvature(mean_loss.params, 0)[0].shape[1]
            entries = sum(t.numel() for t in mean_loss.params.values()) * mean_loss.examples * outputs
            if outputs > _OUTPUTS or entries > _ENTRIES:
                return None, f"{outputs} outputs and {mean_loss.examples} examples are too many for an exact trace"
            if twice := exact._used_twice():
                return None, f"{twice} is used more than once"
            return (exact, "") if exact._is_proved() else (None, "the network is not linear in every single parameter")
        except (NoDoubleBackwardError, CoupledExamplesError):
            return None, "examples are coupled, or a second derivative is missing"
        except (ValueError, RuntimeError) as error:
            return None, f"the outputs of the model are not known: {str(error).splitlines()[0][:120]}"

    def diagonal(self, params: Params, number: int) -> dict[str, Tensor]:
        """The diagonal of the Hessian of the mean loss of a batch."""
        factors, signs = self._curvature(params, number)
        batch, size = self._given.batches[number], len(factors)
        shared = {name: params[name] for name in self._given.names}
        # Parameters that the optimizer does not train keep the values of the model.
        total = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
        step = max(1, _BYTES // (8 * sum(tensor.numel() for tensor in shared.values())))
        for j in range(factors.shape[1]):
            for first in range(0, size, step):
                part = slice(first, min(first + step, size))
                gradients = self._function.example_gradients(shared, (batch, factors[:, j]), size, part, "a batch")[1]
                for name, g in gradients.items():
                    total[name] += torch.tensordot(signs[part, j].to(g.dtype), g.detach().square(), dims=1) / size
        return total

    def _curvature(self, params: Params, number: int) -> tuple[Tensor, Tensor]:
        """Of every example, scaled eigenvectors of the second derivative of the loss by the outputs, and signs.

        Returns:
            Factors, shape (B, J, C) for the J directions, and the signs of the eigenvalues, shape (B, J).
        """
        given = self._given
        batch = given.batches[number]
        rows: list[Tensor] = []

        def differentiate() -> None:
            losses, outputs = observed(given.loss, given.model, batch)
            if not is_per_example(outputs, len(losses)) or outputs[0].numel() > _OUTPUTS:
                raise ValueError(f"the output has the shape {tuple(outputs.shape)}")
            (slope,) = torch.autograd.grad(losses.sum(), outputs, create_graph=True)
            for c in range(slope.flatten(1).shape[1]):
                column = slope.flatten(1)[:, c].sum()
                second = torch.autograd.grad(column, outputs, retain_graph=True)[0] if column.requires_grad else None
                rows.append(torch.zeros_like(slope.flatten(1)) if second is None else second.detach().flatten(1))

        with own_randomness(given.device, seed=0), torch.enable_grad():
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items() if name in given.params}
            given.function.at(leaves, differentiate)
        values, directions = torch.linalg.eigh(torch.stack(rows, 1).double())
        factors = (directions * values.abs().sqrt().unsqueeze(1)).mT
        return factors.to(given.device, given.dtype), values.sign()

    def _used_twice(self) -> str:
        """The name of a parameter that the graph of the loss uses more than once; empty if there is none.

        Entries at random do not show it: of a square matrix that is applied twice, only entries of the diagonal meet
        themselves.

        Returns:
            The name.
        """
        given = self._given
        leaves = {name: leaf(tensor) for name, tensor in given.params.items()}
        users: dict[Node, list[Node]] = {}

        def follow(losses: Tensor) -> None:
            root = losses.sum().grad_fn
            for node in nodes_of(root) if root is not None else ():
                for below, _ in node.next_functions:
                    if below is not None:
                        users.setdefault(below, []).append(node)

        with own_randomness(given.device, seed=0), torch.enable_grad():
            given.function.then({**given.params, **leaves}, given.batches[0], follow)
            for name, tensor in leaves.items():
                node = get_gradient_edge(tensor).node
                while len(above := users.get(node, [])) == 1 and _VIEW.match(above[0].name()):
                    node = above[0]
                if len(above) > 1:
                    return name
        return ""

    def _is_proved(self) -> bool:
        """Whether entries of the diagonal of the first batch agree with the second derivative of its loss."""
        given = self._given
        diagonal = self.diagonal(given.params, 0)
        generator = torch.Generator().manual_seed(0)
        places = []
        for name in list(diagonal)[: _COMPARED // 2]:
            entries = diagonal[name].flatten()
            random = int(torch.randint(len(entries), (1,), generator=generator))
            places += [(name, place) for place in dict.fromkeys((int(entries.abs().argmax()), random))]
        units = []
        for name, place in places:
            unit = {n: torch.zeros_like(t) for n, t in given.params.items()}
            unit[name].view(-1)[place] = 1
            units.append(unit)
        scale = max(float(part.abs().max()) for part in diagonal.values())
        for (name, place), product in zip(places, given.multiply(given.params, 0, units), strict=True):
            entries = diagonal[name].flatten()
            allowed = _ROUNDING.get(given.dtype, 2e-3) * max(float(entries.abs().max()), 1e-6 * scale)
            if abs(float(product[name].flatten()[place] - entries[place])) > allowed:
                return False
        return bool(tensors_of(given.batches[0]))
