"""Time and memory of `nf.equilibrate` on a model of the shape of GPT-2 small: 12 layers, 768 wide, random weights.

    python benchmarks/gpt2_small.py    measures, and writes benchmarks/results/gpt2_small.json (five minutes)

16 sequences of 64 tokens in batches of four, gradients in float32. The peak of memory is that of the process, with
PyTorch, transformers and the model.
"""

import json
import resource
import time
from pathlib import Path

import torch
import transformers
from machine import environment

import noetherflow as nf

RESULT = Path(__file__).parent / "results" / "gpt2_small.json"
SEQUENCES, TOKENS, BATCH_SIZE = 16, 64, 4
TOLERANCE = 1e-4


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token, averaged over the positions of a sequence."""
    logits = model(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def peak() -> float:
    """The largest memory of the process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Measure, print and keep."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config()
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (SEQUENCES, TOKENS), generator=generator)
    batches = list(tokens.split(BATCH_SIZE))
    row: dict[str, object] = {"parameters": sum(p.numel() for p in model.parameters()), "peak, model": peak()}
    start = time.perf_counter()
    symmetries = nf.find_symmetries(model, loss, batches[0][:2])
    row |= {"symmetries": len(symmetries), "seconds, finding": time.perf_counter() - start}
    row["peak, finding"] = peak()
    start = time.perf_counter()
    found = nf.equilibrate(
        model, loss, batches, nf.SGD(lr=0.1, batch_size=8, weight_decay=1e-4), symmetries, tolerance=TOLERANCE
    )
    row |= {
        "seconds, equilibrate": time.perf_counter() - start,
        "peak, equilibrate": peak(),
        "passes": found.passes,
        "tolerance": TOLERANCE,
        "status": found.status.name,
        "trace before": found.trace_before,
        "trace after": found.trace_after,
        "largest imbalance before": max(pair.before for pair in found.imbalance.values()),
        "largest imbalance after": max(pair.after for pair in found.imbalance.values()),
    }
    for key, value in row.items():
        print(f"{key:26s} {value:.4g}" if isinstance(value, float) else f"{key:26s} {value}")
    kept = {"environment": environment(["transformers"]), **row}
    RESULT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
