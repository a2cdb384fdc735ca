from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from bigray.errors import SpecError
from bigray.models import language_model
from bigray.onnx_export import export_onnx


def _model(**params: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return language_model((12,), 7, **{"width": 16, "depth": 2, "heads": 2, **params}).eval()


def _codes(rows: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 7, (rows, length), generator=torch.Generator().manual_seed(1))


def test_there_are_logits_for_the_token_after_each_place() -> None:
    assert _model()(_codes()).shape == (3, 12, 7)


def test_codes_may_be_float32_as_all_rows_are() -> None:
    module, codes = _model(), _codes()

    assert torch.equal(module(codes.float()), module(codes))


def test_no_place_sees_what_comes_after_it() -> None:
    module, codes = _model(), _codes()
    changed = codes.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 7
    before, after = module(codes), module(changed)

    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_a_shorter_context_has_the_same_logits() -> None:
    """What text generation leans on: it starts from few tokens."""
    module, codes = _model(), _codes()

    torch.testing.assert_close(module(codes[:, :5]), module(codes)[:, :5])


def test_a_code_that_is_no_token_counts_as_the_nearest() -> None:
    module = _model()

    assert torch.equal(module(torch.tensor([[-1, 99]])), module(torch.tensor([[0, 6]])))


def test_tied_weights_are_one_parameter_under_one_name() -> None:
    tied, free = _model(), _model(tie_weights=False)

    assert [name for name, tensor in tied.state_dict().items() if tensor.shape == (7, 16)] == ["tokens"]
    assert [name for name, tensor in free.state_dict().items() if tensor.shape == (7, 16)] == ["tokens", "head.weight"]


def test_it_starts_as_good_as_guessing_and_learns_a_text_by_heart() -> None:
    module, codes = _model(width=32).train(), _codes(8, 13)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = functional.cross_entropy(module(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[0] == pytest.approx(1.946, abs=0.05)  # log(7)
    assert losses[-1] < 0.5


def test_it_is_exported_to_onnx_with_three_axes_of_outputs() -> None:
    model, why = export_onnx(_model(depth=1, dropout=0.1), _codes(40).float().numpy())

    assert model, why


@pytest.mark.parametrize(
    ("input_shape", "params", "expected"),
    [
        ((8, 3), {}, r"expected rows of tokens, of shape \(T,\), got \(8, 3\)"),
        ((8,), {"num_outputs": 1}, "needs 2 different tokens or more, got 1"),
        ((8,), {"width": 30}, "width 30 cannot be cut into 4 heads; use a multiple of 4"),
        ((8,), {"heads": 0}, "must be whole numbers from 1, got 128, 4 and 0"),
        ((8,), {"width": 64.0}, "must be whole numbers from 1, got 64.0, 4 and 4"),
        ((8,), {"mlp_ratio": 0.001}, "mlp_ratio 0.001 leaves a width of 128 nothing"),
        ((8,), {"dropout": -0.1}, "dropout must be at least 0 and less than 1, got -0.1"),
    ],
)
def test_a_language_model_refuses_what_it_cannot_be(
    input_shape: tuple[int, ...], params: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SpecError, match=f"^language_model: .*{expected}"):
        language_model(input_shape, **{"num_outputs": 7, **params})
