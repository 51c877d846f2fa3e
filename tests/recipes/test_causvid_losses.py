import pytest
import torch

from recipes import causvid
from recipes.lib.flow import DENOISING_STEPS, FlowSchedule
from recipes.lib.wan import PRESETS, VideoDiT

pytestmark = pytest.mark.timeout(60)
TINY = PRESETS["tiny"]
SHAPE = (2, TINY.frames, TINY.channels, TINY.height, TINY.width)


class Constant(torch.nn.Module):
    """Predicts ``value`` times its noisy input, remembers what it was asked."""

    def __init__(self, value: float, with_empty_text: float = 0.0) -> None:
        super().__init__()
        self.value, self.with_empty_text = torch.nn.Parameter(torch.tensor(value)), with_empty_text
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.asked.append((x.detach(), t))
        return x * (self.value if text.any() else self.with_empty_text)


@pytest.fixture
def text() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(2, TINY.text_tokens, TINY.text_dim)


def network(causal: bool) -> VideoDiT:
    torch.manual_seed(1)
    made = VideoDiT(TINY, causal=causal)
    torch.nn.init.normal_(made.head.head.weight, std=0.1)
    return made


def test_the_generator_loss_has_the_gradient_of_the_paper(text):
    """Against the formula written out by hand in float64."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE, requires_grad=True)
    flow, critic, teacher = FlowSchedule(), Constant(0.3), Constant(-0.2, with_empty_text=0.1)
    loss = causvid.generator_loss(x, text, torch.zeros_like(text), critic, teacher, flow)
    loss.backward()

    ((noisy, t),) = critic.asked
    assert all(torch.equal(n, noisy) and torch.equal(s, t) for n, s in teacher.asked)
    noisy, sigma = noisy.double(), flow.sigma(t).double()[:, None, None, None, None]
    fake, cond, uncond = (noisy * (1 - sigma * v) for v in (0.3, -0.2, 0.1))
    real = cond + 3.5 * (cond - uncond)
    expected = torch.empty_like(noisy)
    for i in range(2):
        scale = sum((x[i].double() - real[i]).abs().flatten().tolist()) / x[i].numel()
        expected[i] = (fake[i] - real[i]) / scale
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), expected / x.numel(), rtol=1e-4, atol=1e-9)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(0.5 * expected.square().mean().item(), rel=1e-4)
    assert critic.value.grad is None
    assert teacher.value.grad is None


def test_a_video_that_is_the_teachers_has_no_gradient_rather_than_a_nan():
    x = torch.ones(SHAPE)
    gradient = causvid.dmd_gradient(x, x, x)
    assert not gradient.any()


def test_the_critic_learns_the_flow_of_the_students_video(text):
    torch.manual_seed(0)
    x, flow, critic = torch.randn(SHAPE), FlowSchedule(), Constant(0.3)
    loss = causvid.critic_loss(x, text, critic, flow)
    loss.backward()

    ((noisy, t),) = critic.asked
    noisy, x, sigma = noisy.double(), x.double(), flow.sigma(t).double()[:, None, None, None, None]
    noise = (noisy - (1 - sigma) * x) / sigma
    error = 0.3 * noisy - (noise - x)
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert critic.value.grad is not None
    assert critic.value.grad.item() == pytest.approx((2 * error * noisy).mean().item(), rel=1e-3)


def test_the_rollout_denoises_each_block_on_top_of_the_finished_ones(text):
    student, flow = network(causal=True), FlowSchedule()
    torch.manual_seed(7)
    seen = causvid.rollout(student, text, TINY, flow)
    assert seen.shape == (len(DENOISING_STEPS), *SHAPE)
    assert not seen.requires_grad
    torch.manual_seed(7)
    assert torch.equal(seen[0, :, : TINY.frames_per_block], torch.randn(2, TINY.frames_per_block, *SHAPE[2:]))

    # The last block once more, without a cache: finished frames at timestep 0 before it, itself at the last level.
    block, last = TINY.frames_per_block, DENOISING_STEPS[-2]
    x = torch.cat([seen[-1, :, :-block], seen[-2, :, -block:]], dim=1)
    t = torch.zeros(2, TINY.frames)
    t[:, -block:] = last
    with torch.no_grad():
        finished = flow.clean(x, student(x, t, text), t)[:, -block:]
    torch.testing.assert_close(seen[-1, :, -block:], finished, atol=1e-4, rtol=1e-4)


def test_the_students_video_has_one_step_a_block_and_a_gradient(text):
    student, flow, asked = network(causal=True), FlowSchedule(), []
    student.register_forward_pre_hook(lambda _, inputs: asked.append(inputs) if torch.is_grad_enabled() else None)
    torch.manual_seed(0)
    steps = set()
    for _ in range(8):
        x = causvid.student_video(student, text, TINY, flow)
        noisy, t, _ = asked.pop()
        assert not asked
        assert not noisy.requires_grad
        blocks = t.unflatten(1, (TINY.blocks, TINY.frames_per_block))
        assert (blocks == blocks[:, :, :1]).all()
        steps |= set(t.flatten().tolist())
    assert steps == set(DENOISING_STEPS)
    x.square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_pretraining_lowers_the_loss_and_repeats_exactly():
    lines: list[str] = []

    class Lines:
        line = staticmethod(lines.append)

    states = []
    for _ in range(2):
        torch.manual_seed(0)
        teacher = VideoDiT(TINY, causal=False)
        causvid.pretrain(teacher, 40, torch.device("cpu"), Lines())
        states.append(teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert float(lines[0].split()[-1]) < 1.7  # an untrained one predicts no flow: about 1 + the videos' mean square
