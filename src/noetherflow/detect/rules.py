"""What each operation lets through: one table from names of operations to rules."""

from typing import Any

from noetherflow.detect.call import Call, Rule, as_scaled, homogeneous, opaque, passed
from noetherflow.detect.contraction import einsum, matmul
from noetherflow.detect.elementwise import (
    added,
    chosen,
    clamped,
    compared,
    dropped,
    extreme,
    gated,
    masked,
    multiplied,
    parametric,
    raised,
    reduced,
    running,
    softmax,
    spatial,
)
from noetherflow.detect.layers import (
    addmm,
    attention,
    batch_norm,
    bilinear,
    convolution,
    cosine,
    embedded,
    group_norm,
    instance_norm,
    layer_norm,
    linear,
    weight_norm,
)
from noetherflow.detect.moves import SEVERAL, joined, moved, padded, picked, to_complex, to_real


def apply(call: Call) -> Any:
    """The exponents of what an operation returns; one that is not known lets nothing through."""
    return RULES.get(call.name, opaque)(call)


MOVES = SEVERAL | {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "expand_as",
    "slice", "select", "narrow", "flatten", "unflatten", "movedim", "swapaxes", "flip", "roll", "repeat", "tile",
    "repeat_interleave", "unfold", "view_as", "reshape_as", "diagonal", "numpy_T", "mT", "adjoint", "moveaxis",
    "pixel_shuffle", "pixel_unshuffle",
}  # fmt: skip
SAME = {
    "clone", "contiguous", "alias", "to", "_to_copy", "type_as", "neg", "lift_fresh_copy", "lift_fresh", "positive",
    "tril", "triu", "copy", "float", "double", "half", "bfloat16", "real", "conj",
}  # fmt: skip
HOMOGENEOUS = {"relu", "leaky_relu", "abs", "rrelu", "_leaky_relu"}
RULES: dict[str, Rule] = (
    dict.fromkeys(MOVES, moved)
    | dict.fromkeys(SAME, passed)
    | dict.fromkeys(HOMOGENEOUS, homogeneous)
    | dict.fromkeys(("cat", "stack", "concat", "concatenate", "hstack", "vstack"), joined)
    | dict.fromkeys(("add", "sub", "rsub"), added)
    | dict.fromkeys(("mul", "div", "true_divide"), multiplied)
    | dict.fromkeys(("dropout", "feature_dropout", "native_dropout"), dropped)
    | dict.fromkeys(("maximum", "minimum"), extreme)
    | dict.fromkeys(("clamp", "clamp_min"), clamped)
    | dict.fromkeys(("gt", "ge", "lt", "le"), compared)
    | dict.fromkeys(("softmax", "_softmax"), softmax)
    | dict.fromkeys(("sum", "mean"), reduced())
    | dict.fromkeys(("amax", "amin"), reduced(linear=False))
    | dict.fromkeys(("max", "min"), reduced(linear=False))
    | dict.fromkeys(("linalg_vector_norm", "norm"), reduced(linear=False, position=2))
    | dict.fromkeys(("std",), reduced(linear=False))
    | dict.fromkeys(("var",), reduced(linear=False, degree=2.0))
    | dict.fromkeys(("cumsum",), running)
    | dict.fromkeys(
        [f"{kind}avg_pool{count}d" for kind in ("", "adaptive_") for count in (1, 2, 3)]
        + ["upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d"],
        spatial(linear=True),
    )
    | dict.fromkeys(
        [f"{kind}max_pool{count}d" for kind in ("", "adaptive_") for count in (1, 2, 3)]
        + ["max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"],
        spatial(linear=False),
    )
    | dict.fromkeys([f"conv{kind}{count}d" for kind in ("", "_transpose") for count in (1, 2, 3)], convolution)
    | dict.fromkeys(("layer_norm", "rms_norm"), layer_norm)
    | dict.fromkeys(("index", "index_select", "gather"), picked)
    | dict.fromkeys(("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "pad"), padded)
    | {
        "pow": raised(None), "square": raised(2.0), "sqrt": raised(0.5), "rsqrt": raised(-0.5),
        "reciprocal": raised(-1.0), "where": chosen, "masked_fill": masked, "prelu": parametric,
        "_prelu_kernel": parametric, "glu": gated, "group_norm": group_norm, "batch_norm": batch_norm,
        "instance_norm": instance_norm, "_weight_norm": weight_norm, "cosine_similarity": cosine, "linear": linear,
        "addmm": addmm, "bilinear": bilinear, "scaled_dot_product_attention": attention, "embedding": embedded,
        "view_as_complex": to_complex, "view_as_real": to_real,
        "mm": lambda call: matmul(call.x, as_scaled(call.args[1]), call.equations, call.reason),
        "matmul": lambda call: matmul(call.x, as_scaled(call.args[1]), call.equations, call.reason),
        "bmm": lambda call: matmul(call.x, as_scaled(call.args[1]), call.equations, call.reason),
        "mv": lambda call: matmul(call.x, as_scaled(call.args[1]), call.equations, call.reason),
        "einsum": lambda call: einsum(
            call.args[0], [as_scaled(x) for x in call.args[1]], call.equations, call.reason
        ),
    }
)  # fmt: skip
