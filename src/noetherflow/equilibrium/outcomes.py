"""Outcomes of the solvers: which directions were left where they are, and why, in sentences."""

from torch import Tensor

from noetherflow._forces import no_charge
from noetherflow.equilibrium.result import Outcome, Status
from noetherflow.optimizers import Optimizer

# Why nothing acts on the charge of a row, without and with weight decay.
_NOTHING = "carry neither gradient noise nor weight decay (dead neurons?)"
_SHRINKS = "get no gradient (dead neurons?), and weight decay without a gradient moves no charge"


def not_finite() -> Outcome:
    """For a measurement that is no number."""
    message = "the noise or the parameters hold NaN or infinity: look at the training run before this point"
    return Outcome(Status.NON_FINITE, message)


def zero_side(side: str, names: tuple[str, ...]) -> Outcome:
    """For a symmetry of which the parameters of a complete side are zero."""
    message = (
        f"the {side} side ({', '.join(names)}) is zero, as B of a fresh LoRA: no gradient reaches the other side, and "
        "the formula would shrink it to zero whatever the weight decay; left where it is. Train a few steps first, "
        "until no side is zero"
    )
    return Outcome(Status.DEGENERATE, message)


def without_charge(optimizer: Optimizer) -> Outcome:
    """For a symmetry of which the optimizer conserves no charge."""
    return Outcome(Status.NO_CHARGE, no_charge(optimizer))


def of_rows(free: Tensor, push: Tensor, pull: Tensor, status: Status, *, decays: bool) -> Outcome:
    """For rows of scalings and rescalings.

    Args:
        free: Which rows are free, of any shape.
        push: The forces that drive the charges of the rows up.
        pull: The forces that drive them down.
        status: How the search ended.
        decays: Whether the parameters of the rows have weight decay. Under AdamW the force of the decay contains the
            size of the gradients, so that without a gradient both forces vanish, whatever the weight decay.

    Returns:
        The outcome.
    """
    if status is Status.NON_FINITE:
        return not_finite()
    push, pull, free = push.reshape(-1), pull.reshape(-1), free.reshape(-1)
    dead = _SHRINKS if decays else _NOTHING
    kinds = (
        ((push <= 0) & (pull <= 0), dead),
        ((push > 0) & (pull <= 0), "have nothing that keeps the plus side from growing for ever"),
        ((push <= 0) & (pull > 0), "have nothing that keeps the plus side from shrinking to zero"),
        ((push > 0) & (pull > 0) & ~free, "run away together with other symmetries: nothing holds their sum"),
    )
    listed = [(tuple(rows.nonzero().flatten().tolist()), reason) for rows, reason in kinds]
    sentences = [f"rows {_listing(rows)} {reason}" for rows, reason in listed if rows]
    held = tuple(sorted(row for rows, _ in listed for row in rows))
    if sentences:
        needed = "noise on both sides gives" if decays else "weight_decay > 0 and noise on both sides give"
        sentences.append(f"left where they are; {needed} them an equilibrium")
    if status is Status.NOT_CONVERGED:
        sentences.append("Newton's method did not converge")
    elif held:
        status = Status.SINGULAR if held == listed[0][0] else Status.AT_INFINITY
    return Outcome(status, "; ".join(sentences), held)


def _listing(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows[:8])) + (f", ... ({len(rows)} in all)" if len(rows) > 8 else "")


def of_directions(dead: int, grow: int, shrink: int) -> Outcome:
    """For a matrix: how many directions have no force, and how many nothing on one of both sides."""
    if not dead + grow + shrink:
        return Outcome(Status.CONVERGED)
    sentences = []
    if dead:
        sentences.append(f"{dead} directions carry neither gradient noise nor weight decay")
    if grow:
        sentences.append(f"{grow} directions have nothing that keeps the plus side from growing for ever")
    if shrink:
        sentences.append(f"{shrink} directions have nothing that keeps the plus side from shrinking to zero")
    sentences.append(
        "left where they are. Causes: (a) fewer outputs or inputs than hidden units: the spare directions carry "
        "nothing, and only weight decay moves them; (b) a factor that is zero (a fresh LoRA): train until it is not; "
        "(c) fewer examples than directions: measure the noise on more data"
    )
    status = Status.AT_INFINITY if grow + shrink else Status.SINGULAR
    return Outcome(status, "; ".join(sentences), tuple(range(dead + grow + shrink)))


def of_generator(ceiling: bool, floor: bool) -> Outcome:
    """For a single generator: whether the potential grows without bound towards +infinity and -infinity."""
    if not (ceiling or floor):
        return Outcome(
            Status.SINGULAR, "the generator carries neither gradient noise nor weight decay; left where it is", (0,)
        )
    way = "growing" if floor else "falling"
    message = (
        f"nothing keeps the coordinate from {way} for ever; left where it is. weight_decay > 0 gives it an equilibrium"
    )
    return Outcome(Status.AT_INFINITY, message, (0,))
