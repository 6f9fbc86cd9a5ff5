"""Steer a predictor of physical fields, no language model: turn a drift to the left into one to the right.

A small convolutional net learns, in about ten seconds, to predict the next frame of a periodic field that drifts and diffuses,
from its last two frames. The difference of two regimes (drift to the right, drift to the left) inside it is then a direction,
and steering left-drifting fields along it slows them, stops them, and turns them round, the more the stronger it is.

Run it anywhere: python examples/steer_a_field.py (needs Pillow; writes steered_field.onnx and steered_field.png into the
current folder)
"""

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from PIL import Image

import actgraph as ag
from actgraph.passes.steer.physics import Delta, delta

SIZE, WIDTH, STEPS, AHEAD = 32, 16, 250, 6
SPEED = 1.2  # cells a frame
ALPHAS = (-0.1, 0.0, 0.1, 0.2, 0.3, 0.5)
SITE = "stages.0.blocks.0.resid_pre"
WAVES = torch.fft.fftfreq(SIZE) * 2 * torch.pi


def moved(u: torch.Tensor, dx: torch.Tensor, nu: torch.Tensor | float) -> torch.Tensor:
    """``u [n, 1, y, x]`` after drifting by ``dx`` cells along x and diffusing by ``nu``: exact, in Fourier space."""
    factor = torch.exp(-1j * WAVES * dx - nu * (WAVES[:, None] ** 2 + WAVES**2))
    return torch.fft.ifft2(torch.fft.fft2(u) * factor).real


def simulate(velocities: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two frames ``[n, 2, y, x]`` of random smooth fields, and the frame behind them ``[n, 1, y, x]``."""
    n, dx = len(velocities), velocities.view(-1, 1, 1, 1)
    age = torch.rand(n, 1, 1, 1, generator=random)
    noise = torch.randn(n, 1, SIZE, SIZE, generator=random)
    u = SIZE * F.normalize(moved(noise, 0 * dx, 4.0).flatten(1)).view(n, 1, SIZE, SIZE)
    u = moved(u, 0 * dx, age)
    return torch.cat([u, moved(u, dx, 0.1)], 1), moved(u, 2 * dx, 0.2)


def regime(speed: float, n: int, seed: int) -> np.ndarray:
    """Inputs of ``n`` simulations that drift at one speed."""
    return simulate(torch.full((n,), speed), torch.Generator().manual_seed(seed))[0].numpy()


class Predictor(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> torch.nn.Conv2d:
            return torch.nn.Conv2d(inputs, outputs, 5, padding=2, padding_mode="circular")

        self.embed, self.head = conv(2, WIDTH), conv(WIDTH, 1)
        self.blocks = torch.nn.ModuleList(conv(WIDTH, WIDTH) for _ in range(2))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.embed(frames))
        for block in self.blocks:
            h = h + F.gelu(block(h))
        return frames[:, 1:] + self.head(h)


def train() -> Predictor:
    torch.manual_seed(0)
    random, model = torch.Generator().manual_seed(0), Predictor()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(1, STEPS + 1):
        frames, following = simulate(3 * torch.rand(16, generator=random) - 1.5, random)
        loss = F.mse_loss(model(frames), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            still = F.mse_loss(frames[:, 1:], following)
            print(f"step {step}: squared error {loss.item():.4f}, of a field that stands still {still.item():.4f}")
    return model.eval()


def rollout(graph: ag.Graph, frames: np.ndarray) -> np.ndarray:
    """The last given frame and the ``AHEAD`` predicted ones, each from the two before it: ``[n, 1 + AHEAD, y, x]``."""
    known = frames
    for _ in range(AHEAD):
        (predicted,) = graph.run({"frames": known[:, -2:]}).values()
        known = np.concatenate([known, predicted], 1)
    return known[:, 1:]


def velocity(before: np.ndarray, after: np.ndarray) -> float:
    """Cells by which a field moves along x: from the phase of its first Fourier mode, over all rows of all samples."""
    turned = (np.fft.fft(after)[..., 1] * np.fft.fft(before)[..., 1].conj()).sum()
    return float(-np.angle(turned) * SIZE / (2 * np.pi))


def picture(rows: list[np.ndarray]) -> Image.Image:
    """A row of frames for each of ``rows`` ``[frames, y, x]``: blue below 0, red above, white at 0."""

    def coloured(u: np.ndarray) -> np.ndarray:
        part = np.clip(u / (2.5 * u.std()), -1, 1)[..., None]
        away = np.where(part > 0, [1.0, 0.2, 0.1], [0.1, 0.3, 1.0])
        image = (255 * (1 + np.abs(part) * (away - 1))).astype(np.uint8).repeat(4, 0).repeat(4, 1)
        return np.pad(image, ((4, 4), (4, 4), (0, 0)), constant_values=255)

    return Image.fromarray(np.concatenate([np.concatenate([coloured(u) for u in row], 1) for row in rows]))


torch.set_num_threads(1)  # tensors are small: threads would cost more than they give
graph = ag.trace(train(), (torch.from_numpy(regime(SPEED, 2, 1)),), dynamic={"frames": ("batch", None, None, None)})
right, left, unseen = regime(SPEED, 64, 2), regime(-SPEED, 64, 3), regime(-SPEED, 32, 4)

difference = delta(graph, [{"frames": right}], [{"frames": left}], site=SITE)
difference.save("right_minus_left.safetensors")


def steered(file: str, alpha: float) -> ag.Graph:
    return ag.run(graph, f"physics_steer{{delta={file} alpha={alpha}}}").graph


print(f"fields that drift by {-SPEED} cells a frame; as predicted {AHEAD} frames ahead, steered by alpha:")
at_once, drifts = [], []
for alpha in ALPHAS:
    fields = rollout(steered("right_minus_left.safetensors", alpha), unseen)
    at_once.append(velocity(fields[:, 0], fields[:, 1]))
    drifts.append(velocity(fields[:, -2], fields[:, -1]))
    print(f"alpha {alpha:+.1f}: drift {drifts[-1]:+.2f} (first frame {at_once[-1]:+.2f})")
for found in (at_once, drifts):
    assert found == sorted(set(found)), "the stronger, the further to the right"
assert drifts[0] < -SPEED and drifts[-1] > 0, "steered the other way it is faster, steered strongly it turns round"

controls, random = [], np.random.default_rng(0)
for _ in range(4):
    direction = np.broadcast_to(random.standard_normal((WIDTH, 1, 1)), difference.pattern.shape)
    Delta(SITE, direction.copy()).save("random.safetensors")
    fields = rollout(steered("random.safetensors", ALPHAS[-1]), unseen)
    controls.append(velocity(fields[:, -2], fields[:, -1]))
print(f"random directions of the same length: {', '.join(f'{drift:+.2f}' for drift in controls)}")
assert max(controls) < drifts[-1] - 0.5, "no other direction does that"

plain, turned = rollout(graph, unseen), steered("right_minus_left.safetensors", ALPHAS[-1])
picture([plain[0], rollout(turned, unseen)[0]]).save("steered_field.png")

turned.save("steered_field.onnx", inline="all")
session = onnxruntime.InferenceSession("steered_field.onnx", providers=["CPUExecutionProvider"])
(shipped,) = session.run(None, {"frames": unseen})
(here,) = turned.run({"frames": unseen}).values()
assert np.abs(shipped - here).max() < 1e-5 * np.abs(here).max(), "onnxruntime predicts the same field"
print("steered_field.png: plain frames above, steered ones below; steered_field.onnx runs in any onnxruntime")
