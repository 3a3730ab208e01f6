"Corruptions give bytes of the same shape on images that are not square, black, white, gray, noise or small"
import pytest
import torch

from basd.analysis.corruptions import corrupt, corruptions

COLORED = {"gaussian_noise", "shot_noise", "impulse_noise", "frost"} # noise differs between channels, and ice is blue


def smooth(size, n):
    "`n` images of a random pattern without fine detail, uint8 (n, 3, size, size)"
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 6, 6, generator=g)
    x = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    return (255*x).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", corruptions)
def test_bytes_of_the_same_shape(name, severity):
    noise = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0))
    odd = torch.stack([torch.zeros(3, 40, 56), torch.ones(3, 40, 56), noise])
    y = corrupt(odd, name, severity)
    assert (y.dtype, y.shape) == (torch.uint8, odd.shape)


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", corruptions)
def test_gray_stays_gray(name, severity):
    gray = smooth(40, 4).float().mean(1, keepdim=True).round().to(torch.uint8).expand(-1, 3, -1, -1)
    y = corrupt(gray, name, severity)
    spread = (y.amax(1) - y.amin(1)).max().item()
    assert (spread > 1) == (name in COLORED), spread


@pytest.mark.parametrize("name", corruptions)
def test_small_images(name):
    assert corrupt(smooth(16, 2), name, 5).shape == (2, 3, 16, 16)
