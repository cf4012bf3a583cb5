"""Rows of patches are those of `PatchSource`, compiled or not."""

import pytest
import torch

from ossnet.data.patches import PatchSource
from ossnet.field.engine import gather
from ossnet.field.engine.gather import PatchRows
from ossnet.networks import native
from ossnet.networks.toeplitz import spectrum

SHAPE = (9, 20, 11)


@pytest.fixture(params=["native", "tensor operations"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and native.library() is None:
        pytest.skip("no C compiler here")
    if request.param != "native":
        monkeypatch.setattr(gather, "library", lambda: None)
    return str(request.param)


def locations(count: int, between: bool) -> torch.Tensor:
    corners = torch.tensor([[x, y, z] for x in (0, 8) for y in (0, 19) for z in (0, 10)]).float()
    inside = torch.rand(count, 3) * (torch.tensor(SHAPE) - 1)
    return torch.cat([corners, inside if between else inside.round()])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["small", "small+large"])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("between", [False, True])
def test_rows(kind: str, pool: str, between: bool) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, *SHAPE)
    places = locations(50, between)
    expected = PatchSource(image, kind, pool)(places)  # type: ignore[arg-type]
    rows = PatchRows(image, kind, pool)  # type: ignore[arg-type]
    out = torch.full((len(places), rows.channels * 343 + 5), 7.0)
    rows.rows(places, out)
    torch.testing.assert_close(out[:, :-5], expected.flatten(1))
    assert bool((out[:, -5:] == 7).all())
    half = torch.zeros(out.shape, dtype=torch.bfloat16)
    rows.rows(places, half)
    torch.testing.assert_close(half[:, :-5], out[:, :-5].bfloat16())


def test_any_layout() -> None:
    image = torch.randn(*SHAPE, 3).permute(3, 0, 1, 2)
    places = locations(20, False)
    out = torch.zeros(len(places), 3 * 343)
    PatchRows(image, "small").rows(places, out)
    expected = PatchSource(image, "small")(places)
    torch.testing.assert_close(out, expected.flatten(1))


def test_spectra() -> None:
    image = torch.randn(2, *SHAPE)
    places = locations(20, True)
    patches = PatchSource(image, "small")(places)
    transform = spectrum().into.float()
    out = torch.zeros(14, len(places), 2 * 49)
    PatchRows(image, "small").spectra(places, transform, out)
    expected = torch.einsum("fu,ncuyz->fncyz", transform, patches).flatten(2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_away_from_the_border(between: bool, axes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    image = (
        torch.randn(2, 20, 21, 22).permute(*axes).contiguous().permute(*torch.tensor(axes).argsort().tolist())
    )
    places = 7 + torch.rand(30, 3) * 5
    places = places if between else places.round()
    out = torch.zeros(30, 4 * 343)
    PatchRows(image, "small+large").rows(places, out)
    expected = PatchSource(image, "small+large")(places)
    torch.testing.assert_close(out, expected.flatten(1))
