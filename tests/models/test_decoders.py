"""The decoders against slow references: convolutions as sums over windows, pixel by pixel."""

import pytest
import torch
from torch import Tensor, nn

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.models.decoder import CHANNELS_PER_GROUP, ConvNormAct, Decoder
from mmdiff_cache.models.deeplabv3plus import ASPP, DeepLabV3Plus, LowLevel, aspp_rates
from mmdiff_cache.models.dpt import DPT, Fusion, Reassemble, ResidualUnit
from mmdiff_cache.models.linear import Linear

B, L, D, G, OUT, GRID, WIDTH = 2, 4, 6, 3, 5, 4, 8


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


def features(layers: int = L, grid: int = GRID) -> list[Tensor]:
    return [torch.randn(B, D, grid, grid) for _ in range(layers)]


def guidance(grid: int = GRID) -> Tensor:
    return torch.rand(B, G, grid, grid)


# --- references for one sample [channels rows columns] ---


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution as its definition: for each output place, the sum over the window."""
    (stride, _), (dilation, _), kernel = conv.stride, conv.dilation, conv.weight.shape[-1]
    assert isinstance(conv.padding, tuple)
    padding = int(conv.padding[0])
    rows, columns = (
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side in x.shape[-2:]
    )
    out = torch.zeros(conv.out_channels, rows, columns)
    for i in range(rows):
        for j in range(columns):
            for a in range(kernel):
                for b in range(kernel):
                    y, z = i * stride + a * dilation - padding, j * stride + b * dilation - padding
                    if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                        out[:, i, j] += conv.weight[:, :, a, b] @ x[:, y, z]
    return out if conv.bias is None else out + conv.bias[:, None, None]


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    out = torch.zeros_like(x)
    size = x.shape[0] // norm.num_groups
    for g in range(norm.num_groups):
        part = x[g * size : (g + 1) * size]
        out[g * size : (g + 1) * size] = (part - part.mean()) / (part.var(unbiased=False) + norm.eps).sqrt()
    return out * norm.weight[:, None, None] + norm.bias[:, None, None]


def conv_norm_act(x: Tensor, block: nn.Module) -> Tensor:
    assert isinstance(block, ConvNormAct)
    conv, norm = block[0], block[1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.GroupNorm)
    return group_norm(convolve(x, conv), norm).clamp(min=0)


def bilinear(x: Tensor, rows: int, columns: int) -> Tensor:
    """Bilinear resizing with pixel centres aligned and edges repeated."""
    out = torch.zeros(x.shape[0], rows, columns)
    for i in range(rows):
        for j in range(columns):
            y = max((i + 0.5) * x.shape[1] / rows - 0.5, 0.0)
            z = max((j + 0.5) * x.shape[2] / columns - 0.5, 0.0)
            top, left = int(y), int(z)
            bottom, right = min(top + 1, x.shape[1] - 1), min(left + 1, x.shape[2] - 1)
            dy, dz = y - top, z - left
            out[:, i, j] = (1 - dy) * ((1 - dz) * x[:, top, left] + dz * x[:, top, right])
            out[:, i, j] += dy * ((1 - dz) * x[:, bottom, left] + dz * x[:, bottom, right])
    return out


def aspp(x: Tensor, module: ASPP) -> Tensor:
    branches = [conv_norm_act(x, module.pointwise), *(conv_norm_act(x, b) for b in module.dilated)]
    everywhere = conv_norm_act(x.mean(dim=(1, 2), keepdim=True), module.pooled)
    branches.append(everywhere.expand_as(branches[0]))
    return conv_norm_act(torch.cat(branches), module.project)


def low_level(x: Tensor, module: LowLevel) -> Tensor:
    """Channel c * r^2 + a * r + b of a token becomes place (a, b) of its r x r patch in channel c."""
    r, norm = module.upsampling, module.norm[0]
    assert isinstance(norm, nn.GroupNorm)
    flat = convolve(x, module.conv)
    out = torch.zeros(flat.shape[0] // r**2, x.shape[1] * r, x.shape[2] * r)
    for c in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                out[c, i, j] = flat[c * r**2 + (i % r) * r + j % r, i // r, j // r]
    return group_norm(out, norm).clamp(min=0)


@torch.no_grad()
def test_aspp_equals_its_definition() -> None:
    module, x = ASPP(D, WIDTH, rates=(1, 2, 3)).eval(), torch.randn(B, D, GRID, GRID + 1)
    expected = torch.stack([aspp(sample, module) for sample in x])
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("upsampling", [1, 2])
def test_deeplabv3plus_equals_its_definition(upsampling: int) -> None:
    decoder = DeepLabV3Plus(
        layers=2, features=D, guidance=G, width=WIDTH, out_channels=OUT, grid=GRID, upsampling=upsampling
    ).eval()
    maps, extra, fine = features(2), guidance(), GRID * upsampling
    expected: list[Tensor] = []
    for b in range(B):
        context = aspp(torch.cat([maps[0][b], maps[1][b], extra[b]]), decoder.aspp)
        x = torch.cat([bilinear(context, fine, fine), low_level(maps[0][b], decoder.low_level)])
        x = conv_norm_act(conv_norm_act(x, decoder.refine[0]), decoder.refine[1])
        expected.append(bilinear(convolve(x, decoder.head), 10, 12))
    torch.testing.assert_close(decoder(maps, extra, (10, 12)), torch.stack(expected), rtol=1e-4, atol=1e-5)


def residual(x: Tensor, unit: ResidualUnit) -> Tensor:
    return x + convolve(convolve(x.clamp(min=0), unit.first).clamp(min=0), unit.second)


def reassemble(x: Tensor, module: Reassemble) -> Tensor:
    x = convolve(x, module.project)
    if isinstance(module.resample, nn.ConvTranspose2d):
        up, r = module.resample, module.resample.stride[0]
        assert up.bias is not None
        fine = torch.zeros(x.shape[0], x.shape[1] * r, x.shape[2] * r)
        for i in range(fine.shape[1]):
            for j in range(fine.shape[2]):
                fine[:, i, j] = up.weight[:, :, i % r, j % r].T @ x[:, i // r, j // r] + up.bias
        x = fine
    elif isinstance(module.resample, nn.Conv2d):
        x = convolve(x, module.resample)
    return convolve(x, module.widen)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_dpt_equals_its_definition(layers: int) -> None:
    decoder = DPT(layers=layers, features=D, guidance=G, width=WIDTH, out_channels=1, upsampling=2).eval()
    maps, extra = features(layers), guidance()
    expected: list[Tensor] = []
    for b in range(B):
        coarser: Tensor | None = None
        for level in reversed(range(layers)):
            fusion, step = decoder.fusions[level], decoder.reassemble[level]
            assert isinstance(fusion, Fusion)
            assert isinstance(step, Reassemble)
            x = reassemble(torch.cat([maps[level][b], extra[b]]), step)
            if coarser is not None:
                assert fusion.level_unit is not None
                x = residual(x, fusion.level_unit) + bilinear(coarser, *x.shape[-2:])
            coarser = convolve(residual(x, fusion.sum_unit), fusion.mix)
        assert coarser is not None
        last = decoder.refine[0]
        assert isinstance(last, nn.Conv2d)
        x = convolve(coarser, last).clamp(min=0)
        expected.append(bilinear(convolve(x, decoder.head), 9, 9))
    torch.testing.assert_close(decoder(maps, extra, (9, 9)), torch.stack(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_linear_is_one_product_a_token() -> None:
    decoder = Linear(layers=L, features=D, guidance=G, out_channels=OUT)
    maps, extra = features(), guidance()
    expected = torch.stack(
        [
            bilinear(convolve(torch.cat([*(m[b] for m in maps), extra[b]]), decoder.head), 7, 11)
            for b in range(B)
        ]
    )
    torch.testing.assert_close(decoder(maps, extra, (7, 11)), expected, rtol=1e-4, atol=1e-5)


def all_decoders(guidance: int = G, layers: int = L, upsampling: int = 2) -> list[Decoder]:
    common = {"layers": layers, "features": D, "guidance": guidance, "out_channels": OUT}
    return [
        Linear(**common),
        DPT(**common, width=WIDTH, upsampling=upsampling),
        DeepLabV3Plus(**common, width=WIDTH, grid=GRID, upsampling=upsampling),
    ]


def test_any_size_comes_out_in_float32() -> None:
    for decoder in all_decoders():
        for size in ((GRID, GRID), (31, 17)):
            assert decoder(features(), guidance(), size).shape == (B, OUT, *size)
        with torch.autocast("cpu", torch.bfloat16):
            assert decoder(features(), guidance(), (8, 8)).dtype == torch.float32


def test_no_guidance_is_a_model_of_its_own() -> None:
    for decoder in all_decoders(guidance=0):
        assert decoder(features(), None, (8, 8)).shape == (B, OUT, 8, 8)


@pytest.mark.parametrize("grid", [1, 3, 7])
def test_odd_and_tiny_grids_work(grid: int) -> None:
    for decoder in all_decoders():
        assert decoder(features(grid=grid), guidance(grid), (8, 8)).isfinite().all()


def test_every_layer_and_the_guidance_count() -> None:
    """Changing any one input changes every decoder's output."""
    for decoder in all_decoders():
        decoder.eval()
        maps, extra = features(), guidance()
        before = decoder(maps, extra, (8, 8))
        for layer in range(L):
            changed = [*maps]
            changed[layer] = maps[layer] + torch.randn_like(maps[layer])
            assert not torch.allclose(decoder(changed, extra, (8, 8)), before, atol=1e-4)
        assert not torch.allclose(decoder(maps, 1 - extra, (8, 8)), before, atol=1e-4)


def test_gradient_reaches_every_parameter() -> None:
    for decoder in all_decoders():
        (decoder.train()(features(), guidance(), (8, 8)) ** 2).sum().backward()
        missing = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert missing == []


def test_one_picture_never_changes_another() -> None:
    for decoder in all_decoders():
        decoder.eval()
        maps, extra = features(), guidance()
        alone = decoder([m[:1] for m in maps], extra[:1], (8, 8))
        torch.testing.assert_close(decoder(maps, extra, (8, 8))[:1], alone, rtol=1e-5, atol=1e-6)


def test_the_head_is_the_last_1x1_convolution() -> None:
    for decoder in all_decoders():
        assert decoder.head.kernel_size == (1, 1)
        logits = decoder.head(decoder.decode(features(), guidance()))
        assert logits.shape[1] == OUT


@pytest.mark.parametrize(
    ("grid", "rates"), [(32, (6, 12, 18)), (16, (3, 6, 9)), (64, (12, 24, 36)), (4, (1, 2, 2))]
)
def test_aspp_rates_follow_the_grid(grid: int, rates: tuple[int, ...]) -> None:
    assert aspp_rates(grid) == rates


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="decoder_width must be a multiple"):
        DeepLabV3Plus(
            layers=1,
            features=D,
            guidance=0,
            width=CHANNELS_PER_GROUP + 1,
            out_channels=1,
            grid=4,
            upsampling=1,
        )
    with pytest.raises(ConfigError, match="decoder_width must be a multiple"):
        DPT(layers=1, features=D, guidance=0, width=6, out_channels=1, upsampling=1)
