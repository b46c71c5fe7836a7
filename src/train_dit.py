"""Train TinyDiT, a class-conditional diffusion transformer, to sample images of cats.

    modal run src/train_dit.py --steps 200000                       on a rented GPU
    modal run --detach src/train_dit.py data/cats --gpu A100        the same, and the run outlives this terminal
    python src/train_dit.py data/cats --steps 100 --batch-size 8    on this machine
    python src/train_dit.py --steps 300 --dim 192 --depth 4         on this machine; the toy cats if there are no others
    python src/train_dit.py --resume RUN                            go on with a run that was interrupted
    python src/train_dit.py --help                                  every option

A run is a function of its seed and its step: interrupted and resumed as often as you like, it ends where it
would have ended. Its folder is outputs/runs/<run>/, with grids of samples in samples/, and the finished model
outputs/tiny_dit.pt.
"""

import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import modal

from tinycats.images import frames
from tinycats.images.data_dirs import is_toy
from tinycats.images.frames import Frame
from tinycats.on_modal import container, laptop, resources
from tinycats.run import checkpoints
from tinycats.run.finished import GENERATOR
from tinycats.run.options import TrainingParser, train_on_this_machine
from tinycats.script.command_line import BooleanOptionalAction, Options, number, whole_number
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import StopSignals
from tinycats.script.startup import Startup

# torch is imported where it is used: `modal run` works without it, and `--help` does not wait for it.

log = logging.getLogger("tinycats.train_dit")

LOG_EVERY = 50  # steps
REPORTED = 16  # samples, of the finished model
CLASS_DROPOUT = 0.1  # how often the class is kept from the model, which guidance needs
CFG_SCALE = 1.5  # guidance, unless another is asked for (ADR-029)
SHAPE = ("image_size", "patch_size", "dim", "depth", "heads")


def default_lr(dim: int) -> float:
    """That for tokens of such a width (ADR-033)."""
    return 0.384 / dim


def default_ema_beta(steps: int) -> float:
    """That of an EMA over a twentieth of a run's steps (ADR-033)."""
    return max(0.0, 1 - 20 / steps)


# --- options -----------------------------------------------------------------------------------------------------


class GeneratorParser(TrainingParser):
    def __init__(self) -> None:
        super().__init__("train_dit.py", "Train TinyDiT, a generator of cats.", gpu_default="A10G")
        model = self.add_argument_group("the model")
        model.add_argument(
            "--image-size",
            type=whole_number(8, 1024),
            metavar="PIXELS",
            help="side of the images (default: 128; for data/toy 64)",
        )
        model.add_argument(
            "--patch-size",
            type=whole_number(1, 64),
            metavar="PIXELS",
            help="side of a patch, which becomes a token (default: 16; for data/toy 8)",
        )
        model.add_argument("--dim", type=whole_number(16, 4096), default=384, help="width of a token")
        model.add_argument("--depth", type=whole_number(1, 64), default=12, help="transformer blocks")
        model.add_argument("--heads", type=whole_number(1, 64), default=6, help="attention heads in a block")
        training = self.add_argument_group("training")
        lr_help = f"the learning rate at its peak (default: {default_lr(1)} / --dim)"
        self.add_optimization_options(training, batch_size=256, weight_decay=0.0, lr=None, lr_help=lr_help)
        training.add_argument("--steps", type=whole_number(1), default=20_000, help="batches to train on")
        training.add_argument(
            "--warmup-steps",
            type=whole_number(0),
            metavar="STEPS",
            help="how long the learning rate rises (default: 10000, but at most a twentieth of --steps)",
        )
        training.add_argument(
            "--alignment",
            type=number(at_least=0),
            default=0.2,
            metavar="WEIGHT",
            help="how much it counts that tokens tell what a network trained on ImageNet sees; 0: not at all",
        )
        training.add_argument(
            "--perceptual",
            type=number(at_least=0),
            default=0.25,
            metavar="WEIGHT",
            help="how much it counts, late in a run, that images look right to that network, too; 0: not at all",
        )
        training.add_argument(
            "--accumulate",
            type=whole_number(1),
            default=1,
            metavar="N",
            help="compute a batch in N parts, one after another: the same result in less memory",
        )
        training.add_argument(
            "--compile",
            action=BooleanOptionalAction,
            help="torch.compile, which takes a minute or so and then less for each step (default: on a GPU)",
        )
        training.add_argument(
            "--ema-beta",
            type=number(at_least=0, below=1),
            help="decay of the weights' EMA (default: so that it averages over a twentieth of --steps)",
        )
        sampling = self.add_argument_group("sampling")
        sampling.add_argument(
            "--sample-every", type=whole_number(1), default=1000, metavar="STEPS", help="sample a grid this often"
        )
        sampling.add_argument(
            "--sample-steps",
            type=whole_number(1),
            metavar="STEPS",
            help="of a grid: more are slower (default: 25)",
        )
        sampling.add_argument(
            "--cfg-scale",
            type=number(at_least=0),
            default=CFG_SCALE,
            help="guidance; 1: none, more: more of its class, and less of what the model was still to learn",
        )

    def check(self, options: Options) -> None:
        toy = is_toy(options.data_dir)
        options.image_size = options.image_size or (64 if toy else 128)
        options.patch_size = options.patch_size or (8 if toy else 16)
        if options.lr is None:
            options.lr = default_lr(options.dim)
        if options.warmup_steps is None:
            options.warmup_steps = min(10_000, options.steps // 20)
        if options.ema_beta is None:
            options.ema_beta = default_ema_beta(options.steps)
        if options.resume:
            return  # the rest is the run's, and was checked when it began
        if options.image_size % options.patch_size:
            self.error(f"--image-size {options.image_size} is no multiple of --patch-size {options.patch_size}")
        if options.dim % options.heads:
            self.error(f"--dim {options.dim} is no multiple of --heads {options.heads}")
        if options.dim % 4:
            self.error(f"--dim {options.dim} is no multiple of 4, which its position embedding needs")
        if options.warmup_steps > options.steps:
            self.error(f"--warmup-steps {options.warmup_steps} is more than --steps {options.steps}")


PARSER = GeneratorParser()
OPTIONS = laptop.parsed_at_import(PARSER, __file__, laptop.check_run) or PARSER.parse([], on_modal=True)


def frame_of(options: Options) -> Frame:
    """The size of the images that are packed, and trained on as they are."""
    return frames.square(options.image_size)


# --- Modal -------------------------------------------------------------------------------------------------------

app = modal.App("tiny-cats-dit")


TIMEOUT = round(3600 * OPTIONS.timeout)


@app.function(**resources.WITHOUT_GPU, timeout=TIMEOUT)
def prepare_on_modal(payload: dict) -> dict:
    """What needs no GPU: the images are prepared, then `train_on_modal` is called."""
    return container.prepare(train_on_modal, payload)


@app.function(**resources.with_gpu(OPTIONS.gpu), timeout=TIMEOUT)
@resources.on_nodes(OPTIONS.nodes)
def train_on_modal(payload: dict) -> dict:
    """One attempt at a run, in a container; every attempt gets the same payload."""
    return container.train(PARSER, train, prepare_on_modal, payload)


# --- training ----------------------------------------------------------------------------------------------------


def train(options: Options, stop: StopSignals, machine: ThisMachine) -> dict:
    """Train, from the saved checkpoint if there is one, and export the EMA of the weights where it was best.

    Returns:
        `run` (its name), `model` (the path of the finished model) and `metrics` (its own).

    Raises:
        UserError: the data, an option or a checkpoint is of no use, the disk is full, training diverged.
        Stopped: a stop signal came; the checkpoint is saved.
    """
    startup = Startup()

    import torch
    from tqdm import tqdm

    from tinycats import generator
    from tinycats.images.batches import (
        INITIALISATION,
        NOISE,
        PATH,
        VALIDATION,
        TrainingBatches,
        ValidationBatches,
        load_batches,
        seed_for,
    )
    from tinycats.models import alignment, crops
    from tinycats.models.dit import TinyDiT
    from tinycats.models.ema import EarlierEMA, ema_model
    from tinycats.models.flow_matching import (
        STEPS,
        dropped_classes,
        point_on_path,
        sample_timesteps,
        velocity_loss,
    )
    from tinycats.models.perceptual_loss import BEGINS, PerceptualLoss, some_at_the_end
    from tinycats.run.attempts import Part, attempt
    from tinycats.showing import report
    from tinycats.training.compilation import compile_if_possible
    from tinycats.training.devices import out_of_memory_is_told
    from tinycats.training.optimization import Muon, all_finite, warmup_stable_decay

    with attempt(PARSER.prog, options, frame_of, stop, machine, startup) as this:
        options, dataset, device, processes = this.options, this.dataset, this.device, this.processes
        batches = TrainingBatches(dataset, options.batch_size, generator.training_transform, options.seed, processes)
        validation_batches = ValidationBatches(dataset, options.batch_size, generator.validation_transform, processes)
        shown = options.steps * batches.batch_size / len(batches.indices)  # how often each image is
        crop_probability = crops.probability(shown)

        # Model, EMA, optimizer, learning rate.
        torch.manual_seed(seed_for(options.seed, INITIALISATION))
        shape = {name: getattr(options, name) for name in SHAPE}
        model = TinyDiT(len(dataset.classes), **shape)
        aligned = alignment.Aligned(model).to(device.device)
        ema, earlier = ema_model(model, options.ema_beta), EarlierEMA()
        rates = options.lr, options.weight_decay, generator.BETA2
        optimizer = Muon(aligned, model.matrices(), *rates, device.optimizer_dtype)
        schedule = warmup_stable_decay(optimizer, options.warmup_steps, options.steps)

        # All that changes while training. Random numbers are derived from (seed, step) and are not part of it.
        parts: dict[str, Part] = {
            "model": model,
            "projector": aligned.projector,
            "average": ema,
            "guide": earlier,
            "optimizer": optimizer,
            "schedule": schedule,
            "scaler": device.scaler,
        }
        this.restore(parts)
        step, metrics = 0, []
        best: dict[str, Any] = {}  # the EMA with the lowest validation loss
        if this.checkpoint:
            step, best, metrics = this.checkpoint["step"], this.checkpoint["best"], this.checkpoint["metrics"]
        begun_at = step
        if options.compile if options.compile is not None else device.is_gpu:
            share = batches.share.stop - batches.share.start
            cache = machine.compiled_code(device.name) if processes.is_main else None
            compile_if_possible(model, device, math.ceil(share / options.accumulate), cache)
            startup.ended("compiling")
        parallel_model = processes.parallel(aligned, device.device)
        aligned_until = round(alignment.PART * options.steps) if options.alignment else 0
        perceptual_from = round(BEGINS * options.steps) if options.perceptual else options.steps
        what_is_seen: alignment.WhatIsSeen | None = None
        if step < aligned_until:
            side = options.image_size // options.patch_size
            looked_at = alignment.part_looked_at(shown, len(batches.indices), side)
            what_is_seen = alignment.WhatIsSeen(side, looked_at, device.device)
        if options.perceptual:
            perceptual_loss = PerceptualLoss(device.device)

        def require_sound(loss: float) -> None:
            if not math.isfinite(loss):
                raise UserError(f"training diverged: the loss is {loss} at step {step}; a lower --lr may help")
            if loss == 0:
                raise UserError(f"the loss is exactly 0 at step {step}: nothing is being learned from this data")

        def current_checkpoint() -> dict:
            if not all_finite(aligned):
                require_sound(math.inf)
            return this.checkpoint_of(step, metrics, parts, best=best)

        def losses(noise, images, timesteps, classes, cropped, *seen) -> tuple[torch.Tensor, torch.Tensor]:
            """Of part of a batch: the error of its velocity; and how far its tokens fail to tell what is seen, or how
            unlike the images that are predicted look."""
            now = device.put(timesteps)
            predicted, told = parallel_model(point_on_path(noise, images, now), now, classes, cropped)
            beside = (0 * told).float().sum()  # several processes want a gradient of every weight
            if seen:
                targets, is_seen = seen
                beside = options.alignment * (is_seen * alignment.misalignment(told, targets)).mean()
            if step >= perceptual_from:
                beside = beside + options.perceptual * perceptual_loss(predicted, images, timesteps)
            elif options.perceptual and step == begun_at:  # if memory is short for it, that is to be known at once
                beside = beside + 0 * perceptual_loss(predicted, images, torch.ones_like(timesteps))
            return velocity_loss(predicted, images, now), beside

        sample_steps = options.sample_steps or STEPS

        @torch.no_grad()
        def validation_loss() -> float:
            """The EMA's loss on the validation images, with the same noise and timesteps each time. How unlike images
            look is part of it all along, so that it can be compared."""
            total = torch.zeros((), device=device.device)
            for index, (images, labels) in enumerate(
                load_batches(
                    validation_batches, range(len(validation_batches)), this.num_workers, pin_memory=device.is_gpu
                )
            ):
                rng = torch.Generator().manual_seed(seed_for(options.seed, VALIDATION, index))
                size, share = validation_batches.share_of(index)
                noise = torch.randn((size, *images.shape[1:]), generator=rng)[share]
                timesteps = sample_timesteps(size, rng)[share]
                if len(images):
                    targets, now = generator.to_unit(device.put(images)), device.put(timesteps)
                    with device.autocast:
                        predicted = ema(point_on_path(device.put(noise), targets, now), now, device.put(labels))
                        loss = velocity_loss(predicted, targets, now)
                        if options.perceptual:
                            loss += options.perceptual * perceptual_loss(predicted, targets, timesteps)
                    total += len(images) * loss
            return processes.sum(total).item() / len(validation_batches.indices)

        def report_contents(model_file: Path) -> tuple[dict, list[str]]:
            finished_model = generator.load(model_file).to(device.device)
            names = [dataset.classes[number % len(dataset.classes)] for number in range(REPORTED)]
            samples = finished_model.sample(names, steps=sample_steps)
            lowest = finished_model.metrics
            facts = {"best validation loss": f"{lowest['val_loss']:.4f}, at step {lowest['step']}"}
            return facts, [
                report.grids(this.folder / "samples"),
                report.neighbours(samples, names, dataset),
                report.distances(samples, dataset),
            ]

        told = "--accumulate 2, which computes the same in two halves, or a smaller --batch-size"
        with this.open_run(metrics, step, options.steps) as run, out_of_memory_is_told(options.batch_size, told):
            parameters = sum(parameter.numel() for parameter in model.parameters())
            this.log_beginning(step, options.steps)
            log.info("TinyDiT with %.1f million parameters, %d patches", parameters / 1e6, model.position.shape[0])
            words = f", {crop_probability:.0%} of the time in part" if crop_probability else ""
            log.info("Each image is shown %.0f times%s", shown, words)
            if not this.checkpoint:
                run.save(current_checkpoint)  # from here on there is something to resume

            loader = iter(load_batches(batches, range(step, options.steps), this.num_workers, pin_memory=device.is_gpu))
            startup.ended("model")
            bar = tqdm(total=options.steps, initial=step, unit="step", disable=None if processes.is_main else True)
            began, first_step, waited = time.perf_counter(), step, 0.0
            model.train()
            while step < options.steps:
                asked = time.perf_counter()
                images, labels = next(loader)
                waited += time.perf_counter() - asked

                # The path of each image: where it starts, how far along it we look, whether its class is told, what is
                # left of it where it ends.
                rng = torch.Generator().manual_seed(seed_for(options.seed, PATH, step))
                timesteps = sample_timesteps(batches.batch_size, rng)
                if step >= perceptual_from:
                    timesteps = some_at_the_end(timesteps, step)
                timesteps = timesteps[batches.share]
                dropped = dropped_classes(batches.batch_size, CLASS_DROPOUT, rng)[batches.share]
                cropped = device.put(crops.sample_crops(batches.batch_size, crop_probability, rng)[batches.share])
                targets = generator.to_unit(device.put(images))
                if crop_probability:
                    targets = crops.crop(targets, cropped)
                noise_rng = torch.Generator(device.device).manual_seed(seed_for(options.seed, NOISE, step))
                noise_shape = (batches.batch_size, *targets.shape[1:])
                noise = torch.randn(noise_shape, generator=noise_rng, device=device.device)[batches.share]
                classes = torch.where(dropped, model.null_class, labels)
                path = [noise, targets, timesteps, device.put(classes), cropped]
                if step == aligned_until:
                    what_is_seen = None  # its memory is needed where images are to look right
                if what_is_seen:
                    with device.autocast:
                        seen, is_seen = what_is_seen(images)
                    path += [seen, is_seen & (cropped[:, 0] == 0)]

                optimizer.zero_grad(set_to_none=True)
                loss = torch.zeros((), device=device.device)
                for part, synchronise in processes.in_parts(path, options.accumulate, parallel_model):
                    with synchronise:
                        with device.autocast:
                            velocity, beside = losses(*part)
                        weight = processes.weight(len(part[0]), batches.batch_size)
                        device.scaler.scale(weight * (velocity + beside)).backward()
                    loss += weight * velocity.detach()
                if options.gradient_clip:
                    device.scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(aligned.parameters(), options.gradient_clip)
                device.scaler.step(optimizer)
                device.scaler.update()
                schedule.step()
                ema.update_parameters(model)
                step += 1
                earlier.update(ema, step)
                loss = processes.mean(loss)

                bar.update()
                startup.first_step(loss)
                if step % LOG_EVERY == 0 or step == options.steps:
                    value = loss.item()  # waits for the GPU, hence not at every step
                    require_sound(value)
                    seconds = time.perf_counter() - began
                    startup.trained(seconds - waited)
                    run.record({"step": step, "loss": value, "lr": schedule.get_last_lr()[0]})
                    bar.set_postfix(loss=f"{value:.3f}")
                    steps_per_second = (step - first_step) / seconds
                    log.info(
                        f"Step {step}/{options.steps}. Loss: {value:.4f} | {steps_per_second:.2f} steps/s, "
                        f"{waited / seconds:.0%} of the time waiting for images"
                    )
                    began, first_step, waited = time.perf_counter(), step, 0.0
                if step % options.sample_every == 0 or step == options.steps:
                    value = validation_loss()
                    require_sound(value)
                    run.record({"step": step, "val_loss": value})
                    with device.autocast:
                        how = options.cfg_scale, sample_steps, earlier.model(ema.module), processes
                        grid = generator.sample_grid(ema, len(dataset.classes), options.image_size, *how)
                    run.image("samples", grid, step)
                    log.info(f"Step {step}/{options.steps}. Validation loss: {value:.4f}; samples/step_{step:07}.png")
                    if not best or value < best["metrics"]["val_loss"]:
                        weights = ema.module.state_dict() if processes.is_main else {}
                        weights = {name: tensor.cpu().clone() for name, tensor in weights.items()}
                        best = {
                            "metrics": {"step": step, "val_loss": value},
                            "state_dict": weights,
                            "guide": earlier.weights(),
                        }
                    elif sum("val_loss" in row and row["step"] > best["metrics"]["step"] for row in metrics) == 2:
                        lowest = best["metrics"]
                        log.warning(
                            f"The validation loss has risen since step {lowest['step']} ({lowest['val_loss']:.4f}): "
                            "photos are being learned by heart. The finished model will be that of its lowest"
                        )
                    began, first_step, waited = time.perf_counter(), step, 0.0
                if run.save_due() or step == options.steps:
                    run.save(current_checkpoint)
            bar.close()
            run.wait_until_saved()

            finished, lowest = options.output_dir / GENERATOR, best["metrics"]
            if processes.is_main:
                model_file = this.folder / GENERATOR
                weights, guide = best["state_dict"], best["guide"]
                generator.export(model_file, weights, guide, shape, dataset.classes, options.cfg_scale, lowest)
                checkpoints.publish_model(model_file, finished)
                this.write_report(PARSER, step, metrics, lambda: report_contents(model_file))
                machine.persist()
            fetch = machine.how_to_fetch(finished)
            log.info(f"Done. Validation loss {lowest['val_loss']:.4f} (step {lowest['step']}). Model: {fetch}")
            startup.log_totals()
    return {"run": this.folder.name, "model": str(finished), "metrics": lowest}


# --- the two ways in ---------------------------------------------------------------------------------------------


@app.local_entrypoint()
def main(*arguments: str) -> None:
    """`modal run src/train_dit.py …`: check, submit, follow."""
    laptop.submit(train_on_modal, prepare_on_modal, PARSER, frame_of, arguments)


if __name__ == "__main__":
    train_on_this_machine(PARSER, train)
