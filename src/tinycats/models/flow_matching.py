"""Flow matching (Lipman et al., arXiv 2210.02747) on straight paths from noise to images.

Time runs from 0, where everything is noise, to 1, where everything is image: x_t = (1 - t) noise + t image,
along which the velocity is image - noise. The model predicts the image, and its loss is that of the velocity
which the prediction implies ("Back to Basics", Li and He, arXiv 2511.13720): where a patch has more
dimensions than the model has width to spare, noise cannot be passed through it, and an image can.
"""

import itertools
from collections.abc import Callable, Iterator

import torch

Model = Callable[..., torch.Tensor]

# The loss divides by the time that is left, but by no less than this: else a few images at the very end of their
# paths would drown the others.
MIN_TIME_LEFT = 0.05

# Images are sampled along the path as far as here, and then are what the model sees from here: what little noise is
# left shows more of a model's errors than of the image, and few timesteps of its training lay there (ADR-029).
END = 0.85

STEPS = 25  # of sampling, unless another number is asked for

# While form is decided, a step leads half as far again as it is long, and fresh noise leads back to its end: it covers
# what the model got wrong before (ADR-029).
CHURN = 0.5
CHURN_END = 0.5


def point_on_path(noise: torch.Tensor, images: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """x_t, [B, ...], of the straight path from noise to image at timesteps [B].

    Raises:
        ValueError: noise and images are the same: the path has no length, and nothing would be learned.
    """
    if noise is images:
        raise ValueError("the path leads from the images to themselves")
    timesteps = timesteps.view(-1, *[1] * (images.ndim - 1))
    return (1 - timesteps) * noise + timesteps * images


def implied_velocity(points: torch.Tensor, predicted: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The velocity, [B, ...], with which a point at its time, which is below 1, reaches the predicted image at 1."""
    return (predicted - points) / (1 - timesteps).view(-1, *[1] * (points.ndim - 1))


def sample_timesteps(count: int, generator: torch.Generator, *, mean: float = -0.8, std: float = 1.0) -> torch.Tensor:
    """float32 [count] in (0, 1), logit-normal (Esser et al., arXiv 2403.03206, section 3.1): most around 0.3, where
    it is decided what will be seen, and enough near 1, where detail is. Chosen by measurement (ADR-026)."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))


def dropped_classes(count: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    """bool [count]: of which images the null class replaces the class, each with that probability (Ho and Salimans,
    arXiv 2207.12598)."""
    return torch.rand(count, generator=generator) < probability


def velocity_loss(
    predicted: torch.Tensor, images: torch.Tensor, timesteps: torch.Tensor, min_time_left: float = MIN_TIME_LEFT
) -> torch.Tensor:
    """Mean squared error of the velocity that predicted images, [B, ...], imply; a scalar.

    Args:
        min_time_left: the error of the image is divided by 1 - t, but by no less than this.
    """
    left = (1 - timesteps).clamp_min(min_time_left).view(-1, *[1] * (images.ndim - 1))
    # Both velocities start at the same point, which cancels out of their difference.
    return ((predicted.float() - images) / left).square().mean()


def step_timesteps(steps: int, end: float = END) -> torch.Tensor:
    """float32 [steps + 1]: where on the path each step begins, the first at 0 and the last at `end` at the latest, and
    1, where that one leads.

    They grow longer until half of them are taken. What an image has in common all over, its light and its colour, is
    decided where noise has as little of it: of S x S pixels at about 4 / S of the path. Fifty of Euler's steps, all
    as long, get there in three (64 px) or two (128 px), and lose an eighth or a quarter of its deviation (ADR-029).
    """
    lengths = torch.arange(1.0, steps).clamp(max=steps / 2)
    last = min(end, 1 - 1 / steps)
    return torch.cat([torch.zeros(1), last * lengths.cumsum(0) / lengths.sum(), torch.ones(1)])


def guidance_begins(image_size: int) -> float:
    """Where on the path of images of so many pixels a side guidance begins: when their light and colour are decided,
    which it would exaggerate (after Kynkäänniemi et al., arXiv 2404.07724; ADR-029). There t / (1 - t), how much there
    is of the image for the noise, is 7 / S, for in the mean over all pixels there is 1 / S as much noise."""
    return 7 / (7 + image_size)


def guided(predicted: torch.Tensor, away_from: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """The image, [B, 3, S, S], on the line through the one that guidance leads away from, at 0, and the predicted one,
    at 1; beyond that in all but its mean red, green and blue, which stay the predicted one's: what two models see
    differently of light and colour is their error more than the class, and is not to be exaggerated (ADR-029; that it
    is the low frequencies that guidance spoils: Sadat et al., arXiv 2506.19713)."""
    further = (scale - 1) * (predicted - away_from)
    return predicted + further - (scale > 1) * further.mean((2, 3), keepdim=True)


def extrapolations(timesteps: torch.Tensor) -> list[float]:
    """For each step, what part of the last change of the predicted image is yet to come by the middle of the step, on
    a line in log(t / (1 - t)); 0 where a step is infinitely long in that."""
    lengths = timesteps.double().logit().diff()
    return [0.0, *(lengths[1:] / (2 * lengths[:-1])).nan_to_num(nan=0.0, posinf=0.0).tolist()]


def overshoots(timesteps: torch.Tensor, churn: float) -> list[float]:
    """Where each step leads before noise is added: `churn` times farther than its end, in log(t / (1 - t)), if it
    begins before CHURN_END; the first and the last, infinitely long in that, lead to their ends."""
    begin, end = timesteps[:-1].double(), timesteps[1:].double()
    beyond = torch.lerp(begin.logit(), end.logit(), 1 + churn).sigmoid()
    return torch.where((begin > 0) & (begin < CHURN_END) & (end < 1), beyond, end).tolist()


def noised_back(points: torch.Tensor, now: float, before: float, noise: torch.Tensor) -> torch.Tensor:
    """Points of the path, [B, ...], as they are at an earlier time, with some of the noise added."""
    kept = before / now
    return kept * points + ((1 - before) ** 2 - (kept * (1 - now)) ** 2) ** 0.5 * noise


@torch.no_grad()
def sample(
    model: Model,
    noise: Iterator[torch.Tensor],
    classes: torch.Tensor,
    null_class: int,
    *,
    steps: int = STEPS,
    guidance_scale: float = 1.0,
    guide: Model | None = None,
    guided_from: float | None = None,
    end: float = END,
    churn: float = CHURN,
) -> torch.Tensor:
    """Images, [B, 3, S, S], from noise of that shape, along the velocity that the model implies.

    Each step asks the model once, and leads towards the image that it and the step before suggest, on a line through
    both: of second order, but for the first two steps and the last (SDE-DPM-Solver++ 2M, Lu et al., arXiv 2211.01095;
    `churn` is eta in k-diffusion's sample_dpmpp_2m_sde, up to CHURN_END; without, DPM-Solver++ 2M, algorithm 2).

    Args:
        noise: noise after noise: the first is what images begin as, of the others each is added by a step.
        classes: int64 [B].
        guidance_scale: 0 samples without the class, 1 with it, more exaggerates it (classifier-free guidance), as of
            `guided`, but not in the last step: form is decided by then, and it would make grain.
        guide: a worse model than `model`, which then is what guidance leads away from (Karras et al., arXiv
            2406.02507), asked without the class, too; None: the model itself.
        guided_from: where on the path the first step begins that may exaggerate; None: as of `guidance_begins`.
        end: where the last step begins at the latest.
        churn: as of `overshoots`; 0: no noise is added, and an image is a function of what it begins as.
    """
    timesteps = step_timesteps(steps, end)
    ways = zip(
        itertools.pairwise(timesteps.tolist()), overshoots(timesteps, churn), extrapolations(timesteps), strict=True
    )
    points = before = next(noise)
    if guided_from is None:
        guided_from = guidance_begins(points.shape[-1])
    for (begin, finish), reached, extrapolated in ways:
        now = torch.full((len(points),), begin, device=points.device)
        predicted = model(points, now, classes).float()
        scale = guidance_scale if begin >= guided_from and finish < 1 else min(guidance_scale, 1)
        if scale != 1:
            away_from = (guide or model)(points, now, torch.full_like(classes, null_class)).float()
            predicted = guided(predicted, away_from, scale)
        ahead = predicted + extrapolated * (predicted - before)
        points = points + (reached - begin) * implied_velocity(points, ahead, now)
        if churn and reached > finish:
            points = noised_back(points, reached, finish, next(noise))
        before = predicted
    return points
