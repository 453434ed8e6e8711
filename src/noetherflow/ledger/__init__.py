"""Where the charges of a training run go, step by step."""

from noetherflow.ledger.ledger import ChargeLedger
from noetherflow.ledger.parts import ChargeParts

__all__ = ["ChargeLedger", "ChargeParts"]
