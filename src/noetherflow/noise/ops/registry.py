"""Gradient rules by function of PyTorch."""

from collections.abc import Callable
from typing import Any

from noetherflow.noise.capture.mode import Rule

RULES: dict[Any, Rule] = {}


def gradient_rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a gradient rule: how the gradients of an example by the parameters of an operation are found.

    `estimate_noise` and `NoiseMeter` call the rule in the place of the function, wherever a parameter, or a tensor
    computed from parameters alone, meets a tensor of the batch. A function without a rule is called again for every
    example, which is slower and as exact. The page *How to add an operation* says what a rule does.

    Args:
        functions: Functions of PyTorch as `torch.overrides` hands them to a mode, or their names; an operation of
            `torch.library` is its overload, such as `torch.ops.mylib.gate.default`. None stands for every function
            without a rule.

    Returns:
        The decorator. A rule is called with the forward pass (`capture`), the function, and its arguments. Under
        `with capture:` it may call functions that have rules; NotImplemented leaves the parameters unmeasured.

    Examples:
        >>> import torch, noetherflow as nf
        >>> @nf.gradient_rule(torch.special.xlog1py)
        ... def xlog1py(capture, func, args, kwargs):
        ...     with capture:
        ...         return args[0] * torch.log1p(args[1])
        >>> net = torch.nn.Linear(3, 3)
        >>> loss = lambda model, x: torch.special.xlog1py(model.bias, model(x).square()).mean(1)
        >>> nf.estimate_noise(net, loss, [torch.randn(8, 3)], {}, exact=False).fallback
        {}
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register
