import pytest
import torch

from recipes.lib.flow import DENOISING_STEPS, FlowSchedule

pytestmark = pytest.mark.timeout(30)


def test_a_thousand_levels_warped_by_the_shift():
    flow = FlowSchedule()
    assert flow.sigmas.shape == (1000,)
    assert flow.sigmas[0] == 1
    assert flow.sigmas[500].item() == pytest.approx(8 * 0.5 / 4.5)
    assert flow.sigmas[-1].item() == pytest.approx(8 * 0.001 / 1.007)


def test_denoising_steps_fall_on_their_levels():
    sigma = FlowSchedule().sigma(torch.tensor(DENOISING_STEPS))
    # 757 and 522 lie within half a level of s = 0.28 and 0.12; 0 takes the last level, which is not quite clean
    expected = torch.tensor([1.0, 8 * 0.280 / 2.960, 8 * 0.120 / 1.840, 8 * 0.001 / 1.007])
    torch.testing.assert_close(sigma, expected)


def test_the_video_comes_back_from_the_true_velocity_at_a_timestep_a_frame():
    torch.manual_seed(0)
    flow, x0, noise = FlowSchedule(), torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    t_BT = torch.tensor([[1000.0, 757, 0], [20, 522, 980]])
    noisy = flow.noisy(x0, noise, t_BT)
    torch.testing.assert_close(flow.clean(noisy, noise - x0, t_BT), x0, atol=1e-5, rtol=0)
    assert torch.equal(noisy[0, 0], noise[0, 0])
    torch.testing.assert_close(noisy[1], flow.noisy(x0[1:], noise[1:], t_BT[1:])[0])


def test_random_timesteps_are_shifted_and_clamped():
    torch.manual_seed(0)
    t = FlowSchedule().random_timesteps(20_000)
    assert t.min() == 20
    assert t.max() == 980
    s = torch.arange(1000) / 1000
    assert t.mean().item() == pytest.approx((8000 * s / (1 + 7 * s)).clamp(20, 980).mean().item(), abs=5)
