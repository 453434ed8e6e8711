"""Scaled dot-product attention."""

from dataclasses import replace

from noetherflow.detect.exponents import ScalingExponents, Term, compressed
from noetherflow.detect.operation import Operation, exponents_of
from noetherflow.detect.rules.contraction import contract
from noetherflow.detect.rules.registry import exponent_rule


@exponent_rule("aten::scaled_dot_product_attention")
def attention(operation: Operation) -> ScalingExponents:
    """softmax(q k^T) v, possibly with fewer heads of k and v than of q."""
    query, key, value = (exponents_of(argument) for argument in operation.args[:3])
    mask = operation.tensor(3, "attn_mask")
    if mask is not None:
        operation.require_zero(mask)
    if operation.argument(7, "enable_gqa"):
        key, value = (_repeated(x, query.shape[-3] // x.shape[-3]) for x in (key, value))
    letters = "abcdefg"[: len(query.shape) - 2]
    demands, reason = operation.demands, operation.reason
    scores = contract(f"{letters}le,{letters}se->{letters}ls", [query, key], demands, reason)
    demands.label(scores.scores, "Q-K")
    operation.require_zero(scores)
    weights = ScalingExponents(scores.shape, attention=True)
    result = contract(f"{letters}ls,{letters}se->{letters}le", [weights, value], demands, reason)
    return replace(result, scores=())


def _repeated(x: ScalingExponents, times: int) -> ScalingExponents:
    """Heads repeated along the third axis from the end."""
    terms = [Term(f, compressed(ids.expand(x.shape).repeat_interleave(times, -3))) for f, ids in x.terms]
    return ScalingExponents((*x.shape[:-3], x.shape[-3] * times, *x.shape[-2:]), tuple(terms), parameter=x.parameter)
