"""The Noether flow: the drift of SGD along the symmetries, without any other motion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from noetherflow import _spd
from noetherflow._errors import SettingsError
from noetherflow._forces import forces_of_sgd
from noetherflow._residual import entangled
from noetherflow._types import Params
from noetherflow.noise import NoiseMoments
from noetherflow.optimizers import SGD, require_sgd
from noetherflow.simulation.dynamics import require_time_step
from noetherflow.simulation.integrate import Integrator
from noetherflow.symmetry import Action, Grams, Symmetry


@final
@dataclass(frozen=True)
class NoetherFlow:
    r"""The deterministic motion of SGD along the symmetries: every charge changes at its drift, no loss changes.

    The velocity $\dot x$ in the Lie algebra solves $\frac{dC}{dx}\dot x = \dot C$, with $\dot C$ the drift. The noise
    is measured at the start and transforms exactly, $\Sigma \to e^{-Q_x}\Sigma e^{-Q_x}$, so the flow needs no further
    gradient. The method is Runge-Kutta of order four.

    Args:
        sgd: Settings of SGD.
        dt: Time step; by default the effective learning rate, so that a step corresponds to a step of SGD. Keep it well
            below the shortest relaxation time.
        noise: Moments at the starting point, for all replicas; None measures the noise at the start of each replica.

    Raises:
        SettingsError: If the time step is not positive.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> symmetries = {"hidden": nf.DiagonalSymmetry(into, out_of)}
        >>> data = torch.randn(32, 4), torch.randn(32, 1)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> flow = nf.NoetherFlow(nf.SGD(lr=0.1, batch_size=8), dt=1.0)
        >>> trajectory = nf.simulate(net, loss, data, flow, steps=10, symmetries=symmetries)
        >>> torch.allclose(trajectory.loss[0], trajectory.loss[-1])
        True

    Source: Ziyin et al. (2024): the Noether flow.
    """

    sgd: SGD
    dt: float | None = None
    noise: NoiseMoments | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_sgd(self.sgd, None, "the Noether flow")
        require_time_step(self.time_step)

    @property
    def time_step(self) -> float:
        """`dt`, or the effective learning rate if `dt` is None."""
        return self.sgd.effective_lr if self.dt is None else self.dt


@final
@dataclass(frozen=True)
class OrbitState:
    """A point of the orbit of one replica: parameters, Gram matrices of the noise, and variances of entries."""

    params: dict[str, Tensor]
    grams: dict[str, Grams]
    variance: dict[str, Tensor]

    def ahead(self, velocity: "OrbitState", time: float) -> "OrbitState":
        """The state after a time at constant velocity: state + time * velocity."""

        def add(position: Mapping[str, Tensor], rate: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor + time * rate[name] for name, tensor in position.items()}

        grams = {
            n: Grams(*(a + time * b for a, b in zip(g, velocity.grams[n], strict=True))) for n, g in self.grams.items()
        }
        return OrbitState(add(self.params, velocity.params), grams, add(self.variance, velocity.variance))


@final
class OrbitFlow:
    """The velocity field of the Noether flow for one replica."""

    def __init__(self, symmetries: Mapping[str, Symmetry], sgd: SGD) -> None:
        self._sgd = sgd
        by_action = {
            action: {name: symmetry for name, symmetry in symmetries.items() if symmetry.action is action}
            for action in Action
        }
        self._commuting = by_action[Action.SCALES_ENTRIES]
        self._matrices = by_action[Action.MIXES_ROWS]
        self._dense = by_action[Action.SCALES_EIGENSPACES]

    def start(self, params: Params, noise: NoiseMoments) -> OrbitState:
        """The state at parameters where the noise was measured."""
        grams = {name: noise.grams[name] for name in (*self._matrices, *self._dense)}
        variance = {name: noise.variance[name] for name in self._scaled_names()}
        return OrbitState(dict(params), grams, variance)

    def step(self, state: OrbitState, dt: float) -> OrbitState:
        """One Runge-Kutta step of order four."""
        first = self._velocity(state)
        second = self._velocity(state.ahead(first, dt / 2))
        third = self._velocity(state.ahead(second, dt / 2))
        fourth = self._velocity(state.ahead(third, dt))
        for weight, slope in ((1, first), (2, second), (2, third), (1, fourth)):
            state = state.ahead(slope, weight * dt / 6)
        return state

    def _velocity(self, state: OrbitState) -> OrbitState:
        """The derivative of a state by time."""
        motion = {name: torch.zeros_like(tensor) for name, tensor in state.params.items()}
        grams: dict[str, Grams] = {}
        for name, symmetry in self._matrices.items():
            push, pull = forces_of_sgd(symmetry, state.params, state.grams[name], self._sgd)
            squares = symmetry.grams(state.params)
            x = _lyapunov(squares.plus + squares.minus, push - pull)
            plus, minus = state.grams[name]
            grams[name] = Grams(-(x @ plus + plus @ x), x @ minus + minus @ x)
            motion = _plus(motion, symmetry.generate(x, state.params))
        for name, dense in self._dense.items():
            push, pull = forces_of_sgd(dense, state.params, state.grams[name], self._sgd)
            q = dense.eigenvalues
            squares = dense.grams(state.params)
            stretch = sum((2 * eigen.square() * side).sum() for eigen, side in zip(q, squares, strict=True))
            x = (push - pull) / stretch
            grams[name] = Grams(*(-2 * x * eigen * side for eigen, side in zip(q, state.grams[name], strict=True)))
            motion = _plus(motion, dense.generate(x, state.params))
        variance: dict[str, Tensor] = {}
        if self._commuting:
            scales = self._joint_scales(state)
            motion = _plus(motion, {name: s * state.params[name] for name, s in scales.items()})
            variance = {name: -2 * scales[name] * state.variance[name] for name in state.variance}
        return OrbitState(motion, grams, variance)

    def _joint_scales(self, state: OrbitState) -> dict[str, Tensor]:
        """The rates s_p at which all commuting symmetries together scale the entries, d theta_p / dt = s_p theta_p.

        Let q, shape (k, entries), hold the exponents of a basis of generators. Then s = x @ q, and the charges change
        at their drifts if 2 (q theta^2) q^T x = q (2 sigma^2 Sigma_pp - 4 gamma_p theta^2).

        Returns:
            The rates by name, in the shapes of the parameters.
        """
        unit = {name: torch.ones_like(state.params[name]) for name in self._scaled_names()}
        basis: list[dict[str, Tensor]] = []
        for symmetry in self._commuting.values():
            identity = symmetry.identity(unit)
            for row in torch.eye(max(1, identity.numel()), dtype=identity.dtype):
                basis.append(symmetry.generate(row.reshape(identity.shape), unit))
        q = torch.stack([torch.cat([exponents[name].reshape(-1) for name in unit]) for exponents in basis])
        theta = torch.cat([state.params[name].reshape(-1) for name in unit])
        noise = torch.cat([state.variance[name].reshape(-1) for name in unit])
        decay = torch.cat([self._sgd.gamma_of(name) * state.params[name].square().reshape(-1) for name in unit])
        rates = q @ (2 * self._sgd.temperature * noise - 4 * decay)
        stretch = 2 * (q * theta.square()) @ q.mT
        # Least squares, because generators may be linearly dependent and rows may be zero.
        x = torch.linalg.lstsq(stretch, rates.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        pieces = (x @ q).split([unit[name].numel() for name in unit])
        return {name: piece.reshape(unit[name].shape) for name, piece in zip(unit, pieces, strict=True)}

    def _scaled_names(self) -> list[str]:
        """The parameters on which the commuting symmetries act."""
        return list(dict.fromkeys(name for symmetry in self._commuting.values() for name in symmetry.names))


def _lyapunov(matrix: Tensor, right: Tensor) -> Tensor:
    """The symmetric solution X of X A + A X = B for positive semidefinite A; zero on the null space of A."""
    values, vectors = torch.linalg.eigh(matrix)
    pairs = values.unsqueeze(-1) + values.unsqueeze(-2)
    inner = vectors.mT @ right @ vectors
    inner = torch.where(pairs > _spd.RANK_TOLERANCE * values.abs().max(), inner / pairs, 0.0)
    return vectors @ inner @ vectors.mT


def _plus(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum by name; names that b lacks count as zero."""
    return {name: tensor + b[name] if name in b else tensor for name, tensor in a.items()}


@final
class OrbitIntegrator(Integrator):
    """The Noether flow of all replicas.

    Args:
        flow: The settings.
        symmetries: The symmetries along which the replicas move.
        starts: Parameters and noise of every replica.
        losses: The mean loss of every replica, shape (R,).

    Raises:
        SettingsError: If there is no symmetry, or if symmetries share entries and do not commute.
    """

    def __init__(
        self,
        flow: NoetherFlow,
        symmetries: Mapping[str, Symmetry],
        starts: Sequence[tuple[Params, NoiseMoments]],
        losses: Tensor,
    ) -> None:
        if not symmetries:
            raise SettingsError("the Noether flow moves along symmetries: give simulate(..., symmetries=...)")
        groups, doubled = entangled(symmetries, starts[0][0])
        for group in groups:
            independent = len(group) == 1 and group[0] not in doubled
            if not independent and not all(symmetries[name].action is Action.SCALES_ENTRIES for name in group):
                raise SettingsError(
                    f"{group} share entries of a tensor and do not commute: their joint flow is not known in closed "
                    "form"
                )
        self._field = OrbitFlow(symmetries, flow.sgd)
        self._dt = flow.time_step
        self._states = [self._field.start(params, noise) for params, noise in starts]
        # No loss changes along the flow, so the losses of the start are those of every step.
        self._losses = losses

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters at present, shape (R, *parameter) by name."""
        return {name: torch.stack([state.params[name] for state in self._states]) for name in self._states[0].params}

    def advance(self, step: int) -> None:
        """Take a step."""
        self._states = [self._field.step(state, self._dt) for state in self._states]

    def advance_watched(self, step: int) -> Tensor:
        """Take a step; returns the mean loss, shape (R,)."""
        self.advance(step)
        return self._losses
