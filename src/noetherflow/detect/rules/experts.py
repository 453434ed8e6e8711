"""Matrices of a stack that the batch chooses: products with groups of rows, and lookups of matrices."""

from dataclasses import replace
from typing import Any

from noetherflow.detect.choices import Choice
from noetherflow.detect.exponents import ScalingExponents, Term
from noetherflow.detect.operation import Operation, exponents_of, opaque
from noetherflow.detect.rules.contraction import contract
from noetherflow.detect.rules.registry import exponent_rule

# A rule runs once per matrix, so that more matrices than these have to scale alike.
_MOST = 64
# Products that choose a matrix for each group of rows, and so can take a choice as an argument.
GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def is_stack(x: ScalingExponents) -> bool:
    """Whether a tensor is a parameter that is a stack of matrices, few enough to be told apart."""
    return x.parameter is not None and len(x.shape) == 3 and 1 < x.shape[0] <= _MOST


def matrices_of(operation: Operation, stack: ScalingExponents) -> list[ScalingExponents]:
    """The exponents of each matrix of a stack, shape (1, rows, columns)."""
    across = [ids for _, ids in stack.terms if ids.shape[0] > 1 and ids.numel() == ids.shape[0]]
    for _, ids in stack.terms:
        if across and ids.numel() > 1 and ids.shape[0] == 1:
            operation.demands.unknowns.request_stack(across[0], stack.shape[0], ids)
    return [
        ScalingExponents(
            (1, *stack.shape[1:]),
            tuple(Term(factor, ids[number : number + 1] if ids.shape[0] > 1 else ids) for factor, ids in stack.terms),
        )
        for number in range(stack.shape[0])
    ]


@exponent_rule(*GROUPED)
def grouped_product(operation: Operation) -> Any:
    """Groups of rows of x, shape (N, K), each times a matrix of a stack of shape (E, K, M)."""
    x, stack, index = operation.args[0], exponents_of(operation.args[1]), operation.argument(2, "offs")
    if not is_stack(stack) or len(x.shape) != 2 or operation.argument(3, "bias") is not None:
        return opaque(operation)
    chosen = isinstance(x, Choice) and x.index is index and x.axes <= {0}
    if isinstance(x, Choice) and not chosen:
        return opaque(operation)
    results = []
    for number, matrix in enumerate(matrices_of(operation, stack)):
        terms = tuple(Term(factor, ids.squeeze(0)) for factor, ids in matrix.terms)
        rows = x.variants[number] if chosen else x
        # Which rows belong to which group depends on the batch.
        rows = operation.require_equal_along(rows, [0])
        result = contract(
            "ti,io->to", [rows, ScalingExponents(stack.shape[1:], terms)], operation.demands, operation.reason
        )
        results.append(replace(result, shape=operation.shape))
    return Choice(index, tuple(results), frozenset({0}))
