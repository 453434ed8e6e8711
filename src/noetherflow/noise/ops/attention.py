"""`nn.MultiheadAttention`: PyTorch's own code, seen call by call."""

from typing import Any

from torch.nn import functional

from noetherflow.noise.capture.calls import own_code
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.ops.registry import gradient_rule

_ATTENTION = own_code(functional.multi_head_attention_forward)


@gradient_rule(functional.multi_head_attention_forward)
def attention(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Its projections are linear maps."""
    with capture:
        return _ATTENTION(*args, **kwargs)
