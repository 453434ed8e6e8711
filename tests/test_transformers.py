"""The equilibrium of transformers: how many measurements it takes, and that it does not depend on the start."""

import copy
import functools

import pytest
import torch
import transformers
from torch import Tensor, nn

import noetherflow as nf
from zoo import language

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers")]
SHARED = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}


def tokens() -> list[Tensor]:
    return list(torch.randint(50, (64, 12), generator=torch.Generator().manual_seed(1)).split(32))


def build(kind: str, width: int) -> nn.Module:
    """Two layers of four heads; the queries of Llama share two heads of keys."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=16, n_embd=width, n_layer=2, n_head=4, **SHARED)
        return transformers.GPT2LMHeadModel(config).double().eval()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(hidden_size=width, intermediate_size=2 * width, **sizes, **SHARED)
    return transformers.LlamaForCausalLM(config).double().eval()


@functools.cache
def symmetries(kind: str, width: int) -> dict[str, nf.Symmetry]:
    return nf.find_symmetries(build(kind, width), language, tokens()[0][:4])


def elsewhere(model: nn.Module, found: dict[str, nf.Symmetry]) -> nn.Module:
    """The model at a random point of its orbit, weights changed by factors about e^{+-1/2}."""
    generator = torch.Generator().manual_seed(3)
    params = {name: tensor.detach() for name, tensor in model.named_parameters()}
    for symmetry in found.values():
        x = torch.randn(symmetry.identity(params).shape, generator=generator, dtype=torch.float64) / 2
        params = symmetry.act((x + x.mT) / 2 / len(x) ** 0.5 if x.ndim == 2 else x, params)
    moved = copy.deepcopy(model)
    moved.load_state_dict(params, strict=False)
    return moved


@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_transformer_comes_to_rest_in_few_measurements(kind: str, width: int, weight_decay: float) -> None:
    model, sgd, found = build(kind, width), nf.SGD(0.1, 8, weight_decay), symmetries(kind, width)
    rough = nf.equilibrate(model, language, tokens(), sgd, found)
    fine = nf.equilibrate(model, language, tokens(), sgd, found, tolerance=1e-9)
    other = nf.equilibrate(elsewhere(model, found), language, tokens(), sgd, found, tolerance=1e-9)
    assert [end.status for end in (rough, fine, other)] == [nf.Status.CONVERGED] * 3
    assert rough.passes <= 12
    assert fine.passes <= 20
    assert other.passes <= 20
    assert fine.potential_after == pytest.approx(other.potential_after, rel=1e-10)
    assert fine.potential_after < fine.potential_before
    for name, symmetry in found.items():
        # Rotations turn a Gram matrix and keep its eigenvalues.
        grams = [torch.stack(symmetry.grams(end.params)) for end in (fine, other)]
        spectra = [torch.linalg.eigvalsh(gram) if gram.ndim == 3 else gram for gram in grams]
        torch.testing.assert_close(*spectra, rtol=1e-6, atol=1e-9, msg=name)
    moved = copy.deepcopy(model)
    assert nf.rebalance_(moved, fine, language, tokens()[0]).change < 1e-11
    rates = nf.drift(nf.estimate_noise(moved, language, tokens(), found), sgd, moved)
    before = nf.drift(nf.estimate_noise(model, language, tokens(), found), sgd, model)
    assert all(rates[name].norm() <= 1e-8 * before[name].norm() for name in found)
