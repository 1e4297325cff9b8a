"""The formulas against hand computations and against scikit-image."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from semantic_diffusion_adapter.training.judge import metrics
from semantic_diffusion_adapter.training.judge.encoders import to_tensor


@pytest.fixture
def pair(photos) -> tuple[torch.Tensor, torch.Tensor]:
    """Two crops, and the same with noise: [2, 3, 96, 128] each."""
    crops = [photos["chelsea"][:96, :128], photos["coffee"][100:196, 100:228]]
    rng = np.random.default_rng(0)
    noisy = [np.clip(c + rng.normal(0, 20, c.shape), 0, 255).astype(np.uint8) for c in crops]
    return to_tensor(crops), to_tensor(noisy)


def test_pixel_measures_agree_with_scikit_image(pair):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = pair
    for i in range(2):
        x, y = (t[i].movedim(0, -1).numpy() for t in pair)
        assert metrics.psnr(a, b)[i] == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), abs=1e-3)
        theirs = structural_similarity(x, y, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        assert metrics.ssim(a, b)[i] == pytest.approx(theirs, abs=1e-5)
        assert metrics.l1(a, b)[i] == pytest.approx(float(np.abs(x - y).mean()), abs=1e-6)


@pytest.mark.parametrize("name", ["psnr", "ssim", "l1"])
def test_pixel_measures_are_symmetric_and_know_equal_pictures(pair, name):
    measure, (a, b) = getattr(metrics, name), pair
    torch.testing.assert_close(measure(a, b), measure(b, a))
    assert measure(a, b).shape == (2,)
    same = {"psnr": math.inf, "ssim": 1.0, "l1": 0.0}[name]
    assert measure(a, a).tolist() == pytest.approx([same, same])
    worse = measure(a, (a + 2 * (b - a)).clamp(0, 1))
    assert ((worse > measure(a, b)) == (name == "l1")).all(), "twice the noise is further away"


def test_directional_is_the_angle_between_two_changes():
    # Unit vectors: the picture goes from e0 to e1; so does its caption in the first row, the other way in the second,
    # to the bisector of e1 and e2 in the third; nothing changes in the fourth.
    e = torch.eye(3)
    source, edited = e[[0, 0, 0, 0]], e[[1, 1, 1, 0]] * 5  # lengths must not count
    said, then = e[[0, 1, 0, 0]], torch.stack([e[1], e[0], (e[1] + e[2]) / math.sqrt(2), e[1]])
    by_hand = (1 / math.sqrt(2) + 1) / (math.sqrt(2) * math.sqrt(2))  # (e1-e0).(b-e0) / (|e1-e0| |b-e0|)
    assert metrics.directional(source, edited, said, then).tolist() == pytest.approx([1, -1, by_hand, 0], abs=1e-6)


def test_structure_is_the_angles_between_tokens():
    keys = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
    half = 1 / math.sqrt(2)
    torch.testing.assert_close(metrics.self_similarity(keys)[0], torch.tensor([[1, 0, half], [0, 1, half], [half, half, 1]]))
    turned = torch.tensor([[[0.0, 3], [-2, 0], [-1, 1]]])  # the same angles, other directions and lengths
    assert metrics.structure_distance(keys, turned).item() == pytest.approx(0, abs=1e-12)
    alike = torch.ones(1, 3, 2)  # every angle is 0
    by_hand = (2 * 1 + 4 * (1 - half) ** 2) / 9
    assert metrics.structure_distance(keys, alike).item() == pytest.approx(by_hand)
    assert metrics.structure_distance(alike, keys).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["alex", "squeeze"])  # VGG differs in nothing but seconds
def test_lpips_is_the_librarys_on_a_local_backbone(pair, tmp_path, name):
    import lpips
    import torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        theirs = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)
        whole = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}[name]
    used = {f"features.{key.split('.', 1)[1]}": value for key, value in theirs.net.state_dict().items()}
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in whole().state_dict().items()}
    assert all(shapes[key] == value.shape for key, value in used.items()), "torchvision's own names"
    file = tmp_path / "backbone.safetensors"
    save_file(used | {"classifier.1.bias": torch.zeros(3)}, file)  # a file holds the classifier as well
    ours = metrics.Lpips(file)
    assert ours.backbone == name
    a, b = (x[:, :, :64, :64] for x in pair)
    torch.testing.assert_close(ours(a, b), theirs(a * 2 - 1, b * 2 - 1).flatten())
    assert ours(a, a).tolist() == [0, 0] and (ours(a, b) > 0).all()


def test_what_is_no_backbone_is_named(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"features.0.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="other.safetensors is not a backbone of LPIPS: give"):
        metrics.Lpips(file)
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, file)
    with pytest.raises(ValueError, match="lacks"):
        metrics.Lpips(file)


def test_summaries_count_what_is_infinite_apart():
    assert metrics.summary([1, 2, 3, math.inf]) == {"mean": 2, "error": pytest.approx(1 / math.sqrt(3)), "count": 3, "infinite": 1}
    assert metrics.summary([4]) == {"mean": 4, "error": None, "count": 1, "infinite": 0}
    assert metrics.summary([math.inf])["mean"] is None
