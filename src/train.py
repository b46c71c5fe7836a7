"""Fine-tune a ResNet to classify images: twelve breeds of cats, and "other".

    modal run src/train.py data/cats --epochs 20           on a rented GPU
    modal run --detach src/train.py --backbone resnet50    the same, and the run outlives this terminal
    python src/train.py data/cats --epochs 1               on this machine
    python src/train.py --epochs 1                         on this machine, on the toy cats if there are no others
    python src/train.py --resume RUN                       go on with a run that was interrupted
    python src/train.py --help                             every option

A run is a function of its seed and its step: interrupted and resumed as often as you like, it ends where it
would have ended. Its folder is outputs/runs/<run>/, and the finished model outputs/cats_model.pt.
"""

import logging
import math
import signal
import time
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import modal

from tinycats.images import frames
from tinycats.images.data_dirs import is_toy
from tinycats.images.frames import Frame
from tinycats.on_modal import container, laptop, resources
from tinycats.run import checkpoints
from tinycats.run.finished import CLASSIFIER
from tinycats.run.options import TrainingParser, train_on_this_machine
from tinycats.script.command_line import BooleanOptionalAction, Options, number, whole_number
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import StopSignals
from tinycats.script.startup import Startup

# torch is imported where it is used: `modal run` works without it, and `--help` does not wait for it.

log = logging.getLogger("tinycats.train")

LOG_EVERY = 50  # steps


# --- options -----------------------------------------------------------------------------------------------------


class ClassifierParser(TrainingParser):
    def __init__(self) -> None:
        super().__init__("train.py", "Fine-tune a ResNet classifier of cats.", gpu_default="T4")
        model = self.add_argument_group("the model")
        model.add_argument(
            "--backbone",
            choices=("resnet20", "resnet18", "resnet34", "resnet50"),
            default="resnet18",
            help="resnet20 is for images of 32 pixels and the like, and has no pretrained weights",
        )
        model.add_argument(
            "--pretrained",
            action=BooleanOptionalAction,
            help="start from ImageNet's weights (default: yes; for data/toy and resnet20 no)",
        )
        model.add_argument(
            "--image-size",
            type=whole_number(32, 1024),
            metavar="PIXELS",
            help="side of the square that the model sees (default: 224; for data/toy 64; for resnet20 32)",
        )
        training = self.add_argument_group("training")
        rate = "the learning rate at its peak (default: 1e-4 from pretrained weights; 2e-3 from scratch)"
        self.add_optimization_options(training, batch_size=32, weight_decay=0.05, lr=None, lr_help=rate)
        training.add_argument("--epochs", type=whole_number(1), default=10, help="times through the images")
        training.add_argument(
            "--warmup-epochs", type=number(at_least=0), default=0.5, help="how long the learning rate rises"
        )
        training.add_argument(
            "--optimizer",
            choices=("adamw", "muon"),
            help="what moves the convolutions (default: adamw from pretrained weights; from scratch muon)",
        )
        training.add_argument(
            "--mixup",
            type=number(at_least=0),
            metavar="ALPHA",
            help="how much images are mixed, two by two; 0: not at all (default: 0.2 from scratch; 0 from pretrained "
            "weights)",
        )
        training.add_argument(
            "--label-smoothing",
            type=number(at_least=0, below=1),
            default=0.1,
            help="probability left to the other classes",
        )
        training.add_argument(
            "--balance",
            action=BooleanOptionalAction,
            default=True,
            help="judge as if each class had as many images as the others; else what is rare is rarely said",
        )

    def check(self, options: Options) -> None:
        is_small = options.backbone == "resnet20"
        if options.pretrained is None:
            options.pretrained = not (is_small or is_toy(options.data_dir))
        if options.image_size is None:
            options.image_size = 32 if is_small else 64 if is_toy(options.data_dir) else 224
        if options.lr is None:
            options.lr = 1e-4 if options.pretrained else 2e-3
        if options.optimizer is None:
            options.optimizer = "adamw" if options.pretrained else "muon"
        if options.mixup is None:
            options.mixup = 0.0 if options.pretrained else 0.2
        if options.resume:
            return  # the rest is the run's, and was checked when it began
        if is_small and options.pretrained:
            self.error("--backbone resnet20 has no pretrained weights: leave --pretrained away")
        if options.batch_size == 1 and options.image_size <= 32 and not is_small:
            self.error("--batch-size 1 needs an --image-size above 32: the last layers normalise over a single value")
        if options.warmup_epochs > options.epochs:
            self.error(f"--warmup-epochs {options.warmup_epochs:g} is more than --epochs {options.epochs}")


PARSER = ClassifierParser()
OPTIONS = laptop.parsed_at_import(PARSER, __file__, laptop.check_run) or PARSER.parse([], on_modal=True)


def frame_of(options: Options) -> Frame:
    """The size of the images that are packed, for a random part of each to be trained on."""
    return frames.to_crop_from(options.image_size)


# --- Modal -------------------------------------------------------------------------------------------------------

app = modal.App("tiny-cats-model")


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
    """Train, from the saved checkpoint if there is one, and export the best epoch's weights.

    Returns:
        `run` (its name), `model` (the path of the finished model) and `metrics` (the best epoch's).

    Raises:
        UserError: the data, an option or a checkpoint is of no use, the disk is full, training diverged.
        Stopped: a stop signal came; the checkpoint is saved.
    """
    startup = Startup()

    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy, one_hot
    from tqdm import tqdm

    from tinycats import classifier
    from tinycats.images.batches import (
        INITIALISATION,
        MIXUP,
        TrainingBatches,
        ValidationBatches,
        load_batches,
        seed_for,
    )
    from tinycats.models.batch_norm import synchronised
    from tinycats.run.attempts import Part, attempt
    from tinycats.showing import report
    from tinycats.training.devices import out_of_memory_is_told
    from tinycats.training.optimization import Muon, adamw, all_finite, warmup_cosine

    with attempt(PARSER.prog, options, frame_of, stop, machine, startup) as this:
        options, dataset, device, processes = this.options, this.dataset, this.device, this.processes
        classes = dataset.classes
        if len(classes) < 2:
            raise UserError(f"{options.data_dir} has a single class, {classes[0]!r}: a classifier needs at least two")
        training_transform = classifier.training_transform(options.image_size)
        validation_transform = classifier.validation_transform(options.image_size)
        is_mixed = options.mixup > 0
        batches = TrainingBatches(
            dataset, options.batch_size, training_transform, options.seed, processes, with_next=is_mixed
        )
        validation_batches = ValidationBatches(dataset, options.batch_size, validation_transform, processes)
        total_steps = options.epochs * batches.steps_per_epoch

        # Model, optimizer, learning rate.
        torch.manual_seed(seed_for(options.seed, INITIALISATION))
        is_pretrained = options.pretrained and not this.checkpoint and processes.is_main  # the others get its weights
        model = processes.together(lambda: classifier.build(options.backbone, len(classes), pretrained=is_pretrained))
        if processes.count > 1:
            model = synchronised(model, device.device)
        model.to(device.device).to(memory_format=torch.channels_last)
        parallel_model = processes.parallel(model, device.device)
        if options.optimizer == "adamw":
            optimizer = adamw(model, options.lr, options.weight_decay)
        else:
            convolutions = [parameter for parameter in model.parameters() if parameter.ndim == 4]
            dtype = device.optimizer_dtype
            optimizer = Muon(model, convolutions, options.lr, options.weight_decay, dtype=dtype)
        schedule = warmup_cosine(optimizer, round(options.warmup_epochs * batches.steps_per_epoch), total_steps)

        # Added to what the model says, for what it says to hold where all classes are alike (Menon et al., arXiv
        # 2007.07314): there `other`, two thirds of data/cats, is not the answer to every doubt.
        counts = batches.class_counts() if options.balance else torch.ones(len(classes))
        log_prior = counts.clamp_min(1).float().log().to(device.device)

        # All that changes while training. Random numbers are derived from (seed, step) and are not part of it.
        parts: dict[str, Part] = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": device.scaler}
        this.restore(parts)
        step, epoch_loss, metrics = 0, torch.zeros((), device=device.device), []
        best: dict[str, Any] = {}
        for_report: dict[str, Any] = {}  # of the last evaluation, in process 0
        if this.checkpoint:
            step, best, metrics = this.checkpoint["step"], this.checkpoint["best"], this.checkpoint["metrics"]
            epoch_loss += this.checkpoint["epoch_loss"].to(device.device)

        def require_finite(loss: float) -> None:
            if not math.isfinite(loss):
                raise UserError(f"training diverged: the loss is {loss} at step {step}; a lower --lr may help")

        def current_checkpoint() -> dict:
            # A checkpoint is for going on from: with infinities in it, it would only bury the last one that was sound.
            require_finite(epoch_loss.item())
            require_finite(0.0 if all_finite(model) else math.inf)
            return this.checkpoint_of(step, metrics, parts, epoch_loss=epoch_loss, best=best)

        @torch.inference_mode()
        def evaluate() -> dict | None:
            """Loss, accuracies and calibration on the validation images; None if the run was asked to stop."""
            model.eval()
            answers = []
            for images, labels in load_batches(
                validation_batches, range(len(validation_batches)), this.num_workers, pin_memory=device.is_gpu
            ):
                if run.is_to_stop():
                    return None
                logits = torch.empty(0, len(classes))
                if len(images):
                    with device.autocast:
                        logits = model(classifier.normalise(device.put(images))).float().cpu()
                answers.append((logits, labels))
            shares = processes.gather(answers)

            def measured() -> dict:
                in_order = [share[batch] for batch in range(len(answers)) for share in shares or []]
                logits, labels = (torch.cat(part) for part in zip(*in_order, strict=True))
                confusion = classifier.confusion_matrix(logits, labels)
                calibration = classifier.calibration(logits, labels)
                mistakes = report.worst_mistakes(logits, labels, calibration["temperature"])
                for_report.update(confusion=confusion.tolist(), mistakes=mistakes)
                return {
                    "val_loss": cross_entropy(logits + log_prior.cpu(), labels).item(),
                    **classifier.accuracies(confusion, classes),
                    **calibration,
                }

            return processes.from_main(measured)

        def report_contents() -> tuple[dict, list[str]]:
            measured, shown = best["metrics"], best.get("report")  # older checkpoints have none
            facts = {"accuracy": f"{measured['val_accuracy']:.1%}", "best epoch": measured["epoch"]}
            facts["balanced accuracy"] = f"{measured['balanced_accuracy']:.1%}"
            if not shown:
                return facts, []
            confusion, mistakes = shown["confusion"], shown["mistakes"]
            return facts, [report.confusion(confusion, classes), report.mistakes(mistakes, dataset)]

        with (
            this.open_run(metrics, step, total_steps) as run,
            out_of_memory_is_told(options.batch_size, "a smaller --batch-size"),
        ):
            this.log_beginning(step, total_steps)
            if not this.checkpoint:
                run.save(current_checkpoint)  # from here on there is something to resume

            loader = iter(load_batches(batches, range(step, total_steps), this.num_workers, pin_memory=device.is_gpu))
            startup.ended("model")
            bar = tqdm(total=total_steps, initial=step, unit="step", disable=None if processes.is_main else True)
            finished_epochs = sum("val_loss" in row for row in metrics)
            for epoch in range(finished_epochs + 1, options.epochs + 1):
                began, first_step, waited = time.perf_counter(), step, 0.0
                model.train()
                while step < epoch * batches.steps_per_epoch:
                    asked = time.perf_counter()
                    images, labels = next(loader)
                    waited += time.perf_counter() - asked

                    inputs, targets = classifier.normalise(device.put(images)), device.put(labels)
                    targets = one_hot(targets, len(classes)).float()
                    if is_mixed:
                        rng = np.random.default_rng(seed_for(options.seed, MIXUP, step))
                        inputs, targets = classifier.mixed(inputs, targets, rng.beta(options.mixup, options.mixup))
                    with device.autocast:
                        logits = parallel_model(inputs)
                    logits = logits.float() + log_prior
                    loss = cross_entropy(logits, targets, label_smoothing=options.label_smoothing)
                    loss = loss * processes.weight(len(inputs), batches.batch_size)
                    optimizer.zero_grad(set_to_none=True)
                    device.scaler.scale(loss).backward()
                    if options.gradient_clip:
                        device.scaler.unscale_(optimizer)
                        torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
                    device.scaler.step(optimizer)
                    device.scaler.update()
                    schedule.step()
                    step += 1
                    loss = processes.mean(loss.detach())
                    epoch_loss += loss

                    bar.update()
                    startup.first_step(loss)
                    if step % LOG_EVERY == 0:
                        value = loss.item()  # waits for the GPU, hence not at every step
                        require_finite(value)
                        run.record({"step": step, "epoch": epoch, "loss": value, "lr": schedule.get_last_lr()[0]})
                        bar.set_postfix(loss=f"{value:.3f}")
                    if run.save_due():
                        run.save(current_checkpoint)

                train_loss = epoch_loss.item() / batches.steps_per_epoch
                seconds = time.perf_counter() - began
                startup.trained(seconds - waited)
                results = evaluate()
                if results is None:  # this epoch is evaluated when the run goes on
                    run.save(current_checkpoint)
                    raise AssertionError("saving leaves a run that was asked to stop")
                epoch_loss.zero_()
                require_finite(train_loss + results["val_loss"])
                run.record({"step": step, "epoch": epoch, "train_loss": train_loss, **results})
                log.info(
                    f"Epoch {epoch}/{options.epochs} complete. Loss: {train_loss:.3f}, validation loss: "
                    f"{results['val_loss']:.3f}, accuracy: {results['val_accuracy']:.3f}, balanced: "
                    f"{results['balanced_accuracy']:.3f}, calibration error: {results['calibration_error']:.3f} | "
                    f"{(step - first_step) * batches.batch_size / seconds:.0f} images/s, "
                    f"{waited / seconds:.0%} of the time waiting for them"
                )

                # Balanced: most of data/cats is dogs, and whoever always says `other` is right most of the time.
                rank = [results["balanced_accuracy"], -results["val_loss"]]
                if not best or rank > best["rank"]:
                    weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
                    best = {"rank": rank, "metrics": {"epoch": epoch, **results}, "state_dict": weights}
                    best["report"] = dict(for_report)
                run.save(current_checkpoint)
            bar.close()
            run.wait_until_saved()

            finished = options.output_dir / CLASSIFIER
            if processes.is_main:
                model_file = this.folder / CLASSIFIER
                classifier.export(
                    model_file, best["state_dict"], options.backbone, classes, options.image_size, best["metrics"]
                )
                checkpoints.publish_model(model_file, finished)
                this.write_report(PARSER, step, metrics, report_contents)
                machine.persist()
            accuracy, epoch = best["metrics"]["val_accuracy"], best["metrics"]["epoch"]
            fetch = machine.how_to_fetch(finished)
            log.info(f"Done. Validation accuracy {accuracy:.3f} (epoch {epoch}). Model: {fetch}")
            startup.log_totals()
    return {"run": this.folder.name, "model": str(finished), "metrics": best["metrics"]}


# --- the two ways in ---------------------------------------------------------------------------------------------


@app.local_entrypoint()
def main(*arguments: str) -> None:
    """`modal run src/train.py …`: check, submit, follow."""
    laptop.submit(train_on_modal, prepare_on_modal, PARSER, frame_of, arguments)


if __name__ == "__main__":
    train_on_this_machine(PARSER, train)
