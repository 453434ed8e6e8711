"""The table of an explanation: rows of equal blocks are merged, nothing is lost, and lines fit the terminal."""

import functools
import json
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import noetherflow as nf
from expanded import expanded
from html_cells import cells_of
from noetherflow.detect.tables import tables_of

TOKENS = {"vocab_size": 17, "bos_token_id": 1, "eos_token_id": 2}


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    scores = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return cross_entropy(scores.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def image_class(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(pixel_values=batch[0]).logits, batch[1], reduction="none")


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def tokens() -> Tensor:
    return torch.randint(3, 17, (4, 6), generator=torch.Generator().manual_seed(0))


def gpt2(layers: int, width: int, heads: int) -> nf.Explanation:
    config = transformers.GPT2Config(**TOKENS, n_positions=16, n_embd=width, n_layer=layers, n_head=heads)
    return nf.explain(transformers.GPT2LMHeadModel(config).eval(), next_token, tokens())


def llama() -> nf.Explanation:
    config = transformers.LlamaConfig(
        **TOKENS,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return nf.explain(transformers.LlamaForCausalLM(config).eval(), next_token, tokens())


def vit() -> nf.Explanation:
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    batch = torch.randn(4, 3, 8, 8), torch.randint(2, (4,))
    return nf.explain(transformers.ViTForImageClassification(config).eval(), image_class, batch)


def equal_layers() -> nf.Explanation:
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.ReLU())]
    batch = torch.randn(5, 4), torch.randn(5, 2)
    return nf.explain(nn.Sequential(*layers, nn.Linear(4, 2)), squares, batch)


MODELS: dict[str, Callable[[], nf.Explanation]] = {
    "gpt2 of 2 layers": lambda: gpt2(2, 8, 2),
    "gpt2 of 12 layers": lambda: gpt2(12, 24, 12),
    "llama": llama,
    "vit": vit,
    "equal layers": equal_layers,
}


@functools.cache
def explanation_of(name: str) -> nf.Explanation:
    return MODELS[name]()


# Symmetry, kind, count, plus and minus.
ROWS = {
    "gpt2 of 2 layers": [
        "transformer.h.0: ln_1 -> attn.c_attn | diagonal | 1 | .ln_1.weight 0; .ln_1.bias 0 | .attn.c_attn.weight 0",
        "transformer.h.{i=0, 1}.attn: Q-K head {j=0, 1} | matrix | 4 "
        "| .c_attn.bias 0[4j:4j+4]; .c_attn.weight 1[4j:4j+4] "
        "| .c_attn.bias 0[4j+8:4j+12]; .c_attn.weight 1[4j+8:4j+12]",
        "transformer.h.{i=0, 1}.attn: V-O head {j=0, 1} | matrix | 4 "
        "| .c_attn.bias 0[4j+16:4j+20]; .c_attn.weight 1[4j+16:4j+20] | .c_proj.weight 0[4j:4j+4]",
        "transformer.h.0: ln_2 -> mlp.c_fc | diagonal | 1 | .ln_2.weight 0; .ln_2.bias 0 | .mlp.c_fc.weight 0",
        "transformer.h.1: ln_1 -> attn.c_attn | diagonal | 1 | .ln_1.weight 0; .ln_1.bias 0 | .attn.c_attn.weight 0",
        "transformer.h.1: ln_2 -> mlp.c_fc | diagonal | 1 | .ln_2.weight 0; .ln_2.bias 0 | .mlp.c_fc.weight 0",
    ],
    "gpt2 of 12 layers": [
        "transformer.h.{i=0..11}: ln_1 -> attn.c_attn | diagonal | 12 "
        "| .ln_1.weight 0; .ln_1.bias 0 | .attn.c_attn.weight 0",
        "transformer.h.{i=0..11}.attn: Q-K head {j=0..11} | matrix | 144 | .c_attn.bias 0[2j:2j+2]; .c_attn.weight "
        "1[2j:2j+2] | .c_attn.bias 0[2j+24:2j+26]; .c_attn.weight 1[2j+24:2j+26]",
        "transformer.h.{i=0..11}.attn: V-O head {j=0..11} | matrix | 144 | .c_attn.bias 0[2j+48:2j+50]; .c_attn.weight "
        "1[2j+48:2j+50] | .c_proj.weight 0[2j:2j+2]",
        "transformer.h.{i=0..11}: ln_2 -> mlp.c_fc | diagonal | 12 | .ln_2.weight 0; .ln_2.bias 0 | .mlp.c_fc.weight 0",
    ],
    "llama": [
        "model.layers.{i=0..2}: input_layernorm -> self_attn.q_proj + self_attn.k_proj + self_attn.v_proj | diagonal "
        "| 3 | .input_layernorm.weight 0 "
        "| .self_attn.q_proj.weight 1; .self_attn.k_proj.weight 1; .self_attn.v_proj.weight 1",
        "model.layers.{i=0..2}.self_attn: Q-K rows head {j=0, 1} | diagonal | 6 | .q_proj.weight 0[8j:8j+2]; "
        ".q_proj.weight 0[8j+2:8j+4]; .q_proj.weight 0[8j+4:8j+6]; .q_proj.weight 0[8j+6:8j+8] "
        "| .k_proj.weight 0[4j:4j+2]; .k_proj.weight 0[4j+2:4j+4]",
        "model.layers.{i=0..2}.self_attn: V-O head {j=0, 1} | matrix | 6 | .v_proj.weight 0[4j:4j+4] "
        "| .o_proj.weight 1[8j:8j+4]; .o_proj.weight 1[8j+4:8j+8]",
        "model.layers.{i=0..2}: post_attention_layernorm -> mlp.gate_proj + mlp.up_proj | diagonal | 3 "
        "| .post_attention_layernorm.weight 0 | .mlp.gate_proj.weight 1; .mlp.up_proj.weight 1",
        "model.layers.{i=0..2}.mlp: up_proj -> down_proj | diagonal | 3 | .up_proj.weight 0 | .down_proj.weight 1",
        "model.norm -> lm_head | diagonal | 1 | model.norm.weight 0 | lm_head.weight 1",
    ],
    "vit": [
        "vit.layers.{i=0..2}: layernorm_before -> attention.q_proj + attention.k_proj + attention.v_proj | diagonal "
        "| 3 | .layernorm_before.weight 0; .layernorm_before.bias 0 "
        "| .attention.q_proj.weight 1; .attention.k_proj.weight 1; .attention.v_proj.weight 1",
        "vit.layers.{i=0..2}.attention: Q-K head {j=0, 1} | matrix | 6 "
        "| .q_proj.weight 0[4j:4j+4]; .q_proj.bias 0[4j:4j+4] | .k_proj.weight 0[4j:4j+4]; .k_proj.bias 0[4j:4j+4]",
        "vit.layers.{i=0..2}.attention: V-O head {j=0, 1} | matrix | 6 "
        "| .v_proj.weight 0[4j:4j+4]; .v_proj.bias 0[4j:4j+4] | .o_proj.weight 1[4j:4j+4]",
        "vit.layers.{i=0..2}: layernorm_after -> mlp.fc1 | diagonal | 3 "
        "| .layernorm_after.weight 0; .layernorm_after.bias 0 | .mlp.fc1.weight 1",
        "vit.layernorm -> classifier | diagonal | 1 | vit.layernorm.weight 0; vit.layernorm.bias 0 "
        "| classifier.weight 1",
    ],
    "equal layers": ["{i=0, 2, ..., 10} -> {i+2} | diagonal | 6 | {i}.weight 0; {i}.bias 0 | {i+2}.weight 1"],
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_equal_blocks_are_merged(name: str) -> None:
    rows = tables_of(explanation_of(name))[0].rows
    assert [" | ".join(row[:5]).replace("\n", "; ") for row in rows] == ROWS[name]


def shown(axis: nf.Axis) -> str:
    part = f"[{axis.start}:{axis.stop}]" if axis.stop is not None else ""
    return f"{axis.name} {axis.dim}{part}" + f" x{axis.repeat}" * (axis.repeat > 1)


def full(prefix: str, text: str) -> str:
    """A text in which names have their prefix."""
    lines = (prefix + line if line.startswith(".") else line for line in text.split("\n"))
    return "\n".join(lines).replace("(.", f"({prefix}.")


def recovered(explanation: nf.Explanation) -> tuple[list[tuple[str, ...]], list[tuple[str, int, str]]]:
    """The symmetries and the axes for which the rows of the tables stand."""
    first, second = tables_of(explanation)[:2]
    symmetries = []
    for row in first.rows:
        plain = expanded(row)
        assert len(row) == 6 or row[2] == str(len(plain))
        symmetries += [(r[0], r[1], *(full(r[0].split(":")[0], r[k]) for k in (-4, -3, -1))) for r in plain]
    axes = []
    for cell, reason in second.rows:
        for line in cell.split("\n"):
            block, colon, rest = line.partition(": ")
            for part in rest.split("; ") if colon else [line]:
                for name, why in expanded([block + part if colon else part, reason]):
                    parameter, _, dims = name.partition(" ")
                    axes += [(parameter, int(dim), why) for dim in dims.split(", ")]
    return symmetries, axes


@pytest.mark.parametrize("name", MODELS)
def test_merged_rows_lose_no_symmetry_and_no_axis(name: str) -> None:
    explanation = explanation_of(name)
    expected = [
        (
            finding.name,
            finding.symmetry.label,
            *("\n".join(map(shown, axes)) for axes in (finding.symmetry.plus, finding.symmetry.minus)),
            finding.small or finding.diagonal,
        )
        for finding in explanation.found
    ]
    axes = [(note.parameter, note.axis, note.reason) for note in explanation.axes if not note.symmetries]
    rows, others = recovered(explanation)
    assert (sorted(rows), sorted(others)) == (sorted(expected), sorted(axes))
    assert len(explanation.to_json()["symmetries"]) == len(expected)
    assert len(explanation.to_json()["axes"]) == len(explanation.axes)


def test_a_lost_symmetry_is_noticed() -> None:
    explanation = explanation_of("gpt2 of 12 layers")
    fewer = nf.Explanation(explanation.found[:-1], (), explanation.axes[:-1])
    assert len(recovered(fewer)[0]) == len(explanation.found) - 1
    assert sorted(recovered(fewer)[1]) != sorted(recovered(explanation)[1])


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_table_of_a_deep_model_is_short_and_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    explanation = explanation_of("gpt2 of 12 layers")
    lines = str(explanation).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= {60: 70, 80: 48, 100: 42}[width]
    # One row a symmetry would be more than 312 lines.
    assert len(explanation.found) == 312


def test_the_largest_residual_of_a_row_is_shown() -> None:
    symmetry = nf.DiagonalSymmetry(nf.Axis("w", 0), nf.Axis("v", 1))
    residuals = (1e-16, 4e-12, 2e-15)
    findings = [nf.Finding(f"h.{k}", symmetry, nf.Residual(value, 0.0, 0)) for k, value in enumerate(residuals)]
    (row,) = tables_of(nf.Explanation(tuple(findings), (), ()))[0].rows
    assert row == ("h.{i=0..2}", "diagonal", "3", "w 0", "v 1", "4e-12", "")


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda k: nf.MatrixSymmetry(nf.Axis(f"h.{k}.w", 0), nf.Axis(f"h.{k}.v", 1)), 1),
        (lambda k: nf.MatrixSymmetry(nf.Axis(f"h.{k}.w", k % 2), nf.Axis(f"h.{k}.v", 1)), 4),
        (lambda k: nf.MatrixSymmetry(nf.Axis(f"h.{k}.w", 0, start=0, stop=k + 2), nf.Axis(f"h.{k}.v", 1)), 4),
        (lambda k: nf.DiagonalSymmetry(nf.Axis(f"h.{k}.w", 0), nf.Axis(f"h.{k}.v", 1, repeat=k + 1)), 4),
        (lambda k: (nf.MatrixSymmetry, nf.DiagonalSymmetry)[k % 2](nf.Axis(f"h.{k}.w", 0), nf.Axis(f"h.{k}.v", 1)), 4),
    ],
    ids=["equal", "other axis", "other size", "other repetition", "other kind"],
)
def test_only_rows_that_agree_in_all_but_the_integers_of_names_are_merged(
    change: Callable[[int], nf.MatrixSymmetry], rows: int
) -> None:
    findings = [nf.Finding(f"h.{k}: w -> v", change(k), nf.Residual(1e-16, 0.0, 0)) for k in range(4)]
    assert len(tables_of(nf.Explanation(tuple(findings), (), ()))[0].rows) == rows


def test_a_rejected_candidate_has_a_row_by_itself_and_a_remedy() -> None:
    symmetry = nf.DiagonalSymmetry(nf.Axis("w", 0), nf.Axis("v", 1))
    findings = tuple(nf.Finding(f"h.{k}", symmetry, nf.Residual(1e-16, 0.0, 0)) for k in range(3))
    rejected = nf.Finding("h.3", symmetry, nf.Residual(0.25, 0.0, 0))
    table = tables_of(nf.Explanation(findings, (rejected,), ()))[0]
    assert [row[-2:] for row in table.rows] == [("1e-16", ""), ("2e-01", "REJECTED")]
    assert "repeat in float64" in table.notes[0]
    assert not tables_of(nf.Explanation(findings, (), ()))[0].notes


def test_the_page_has_the_cells_of_the_text() -> None:
    for name in MODELS:
        explanation = explanation_of(name)
        page = [text for row in cells_of(explanation._repr_html_()).rows for text, _ in row if text]
        rows = [cell for table in tables_of(explanation) for row in table.rows for cell in row if cell]
        assert set(page) >= {cell.replace("\n", "") for cell in rows}


def test_json_lists_every_symmetry_by_itself() -> None:
    written = json.loads(json.dumps(explanation_of("gpt2 of 12 layers").to_json()))
    names = [symmetry["name"] for symmetry in written["symmetries"]]
    assert len(set(names)) == len(names) == 312
    assert not any("{" in name for name in names)
