"""Names of metrics: a kind such as `noise/scale`, and after it the name of a layer, group or symmetry.

| kind | value |
|---|---|
| `noise/scale`, `noise/scale_low`, `noise/scale_high` | noise scale Tr Sigma / G^2 in examples, and its interval |
| `noise/scale_preconditioned`, with `_low` and `_high` | the noise scale in the metric of the optimizer |
| `noise/trace`, `grad/norm_sq_unbiased` | Tr Sigma per example, and the squared norm of the mean gradient |
| `charge/S` | the charge of symmetry S |
| `charge_decay/S`, `charge_noise/S`, `charge_mean/S`, `charge_broken/S` | what changed the charge, summed over steps |
| `charge_kick/S`, `charge_between/S` | also such parts: steps without measured noise, and steps that were not split |
| `charge_change/S` | the change of the charge since the start: the sum of the parts |
| `distance/S` | the distance of symmetry S from its equilibrium |
"""

SCALE = "noise/scale"
PRECONDITIONED = "noise/scale_preconditioned"
TRACE, SQUARE = "noise/trace", "grad/norm_sq_unbiased"
CHARGE, DISTANCE = "charge", "distance"
# The parts of the change of a charge, and what changed it.
PARTS = {
    "charge_decay": "weight decay",
    "charge_noise": "gradient noise",
    "charge_mean": "mean gradient",
    "charge_broken": "the optimizer itself",
}
# Parts that are zero if the noise of every step is measured.
RARE_PARTS = {"charge_kick": "gradient noise and mean together", "charge_between": "steps in between"}
_CHANGE = "charge_change"
_NOISE = (SCALE, PRECONDITIONED)
_KINDS = (
    *(kind + end for kind in _NOISE for end in ("", "_low", "_high")),
    TRACE,
    SQUARE,
    CHARGE,
    _CHANGE,
    *PARTS,
    *RARE_PARTS,
    DISTANCE,
)
# These are metrics of a symmetry, so that a name follows.
_NAMED = (CHARGE, _CHANGE, *PARTS, *RARE_PARTS, DISTANCE)


def split(key: str) -> tuple[str, str] | None:
    """The kind of a metric and the name after it, which may be empty; None if the metric has no kind of the table."""
    if key in _KINDS:
        return None if key in _NAMED else (key, "")
    return next(((kind, key[len(kind) + 1 :]) for kind in _KINDS if key.startswith(kind + "/")), None)


def joined(kind: str, name: str) -> str:
    """The metric of a kind and a name."""
    return f"{kind}/{name}" if name else kind
