"""Post-training of ECGFounder on PTB-XL: preview linear probing, then full fine-tuning with
stochastic depth.

    python post_train.py --task diagnostic44 --frac 0.1                         # the method
    python post_train.py --task diagnostic44 --frac 0.1 --strategy baseline     # plain fine-tuning
    python post_train.py --data clinic --task clinic.csv --leads I              # your own dataset
    torchrun --nproc_per_node 4 post_train.py --task all71                      # several GPUs

Method: Zhou et al., "Bridging Performance Gaps for Foundation Models: A Post-Training Strategy
for ECGFounder" (arXiv 2509.12991). Folds 1-8 train, fold 9 selects the checkpoint, fold 10 is
evaluated once, at the end. Writes to --out: metrics.jsonl (a line per epoch or interpolation),
probe.pt and best.pt (best validation macro AUROC of the probe and of fine-tuning), last.pt (for
--resume), test.json.
Needs data.py, model.py and evaluate.py beside it.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
# Imported before there is a process group, as its default arguments would keep it alive.
import torch.distributed.nn  # noqa: F401
import torch.nn.functional as F

import data
import evaluate
import model as network
from data import InputError

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}
OUTPUTS = ("probe.pt", "best.pt", "last.pt", "metrics.jsonl", "test.json")
FREE_ARGUMENTS = ("resume", "out", "data", "device", "compile")  # may change on --resume


# ------------------------------------------------------------------------------------------- recipe

class Setting(NamedTuple):
    """A hyperparameter: its value with --strategy post and with baseline, the source of each, and
    a line for --help (None: not an option)."""
    post: object
    baseline: object
    sources: tuple
    help: Optional[str] = None


SOURCES = ("Sources of the defaults: community, a third-party re-implementation, as the paper's "
           "own values were not available; official, ECGFounder's fine-tuning recipe, which has no "
           "probe; ours, tuned on fold 9 or chosen without tuning.")
PREVIEW_STEPS = 200
PREVIEW = f"{PREVIEW_STEPS} steps"
RECIPE = {
    "probe_epochs": Setting(PREVIEW, 0, ("ours", "official"),
                            "epochs of preview linear probing, 0: none; the default is in "
                            "steps, rounded to whole epochs from 1 to 30, or 30 epochs if no "
                            "fine-tuning follows"),
    "probe_lr": Setting(1e-3, 1e-3, ("ours", "ours"), "learning rate of the probe"),
    "probe_final_lr": Setting(0.0, 0.0, ("ours", "ours")),
    "probe_schedule": Setting("cosine", "cosine", ("ours", "ours")),
    "probe_optimizer": Setting("adamw", "adamw", ("community", "community")),
    "probe_weight_decay": Setting(0.1, 0.1, ("community", "community")),
    "epochs": Setting(30, 30, ("community", "ours"), "epochs of fine-tuning"),
    "lr": Setting(5e-4, 1e-4, ("community", "official"), "learning rate of fine-tuning"),
    "final_lr": Setting(1e-5, 0.0, ("community", "official")),
    "schedule": Setting("cosine", "plateau", ("community", "official")),
    "optimizer": Setting("adamw", "adam", ("community", "official")),
    "weight_decay": Setting(0.05, 1e-5, ("community", "official")),
    "clip": Setting(1.0, None, ("ours", "official")),
    "layer_decay": Setting(1.0, 1.0, ("ours", "official"),
                           "each level of the network has the next one's learning rate times this"),
    "drop_path": Setting(0.5, 0.0, ("community", "official"),
                         "fraction of residual branches dropped in fine-tuning"),
    "dropout": Setting(0.05, 0.0, ("community", "official"), "dropout before the head"),
    "batch_size": Setting(32, 256, ("ours", "official"), "ECGs per step, over all devices"),
    "interpolate": Setting(True, False, ("ours", "official"),
                           "at the end also validate interpolations of the probe's and the last "
                           "epoch's weights, if there are both"),
}
SHARES = (0.0, 0.25, 0.5, 0.75)  # interpolation weights: 0 is the probe, 1 the last epoch


class Stage(NamedTuple):
    """How one of the two stages trains: its part of RECIPE, by the same names."""
    name: str
    epochs: int
    lr: float
    final_lr: float
    schedule: str           # "cosine" from lr to final_lr, or "plateau" on the validation AUROC
    optimizer: str          # "adamw": decoupled weight decay, none on one-dimensional parameters;
                            # "adam": coupled, on all
    weight_decay: float
    clip: Optional[float] = None    # maximum gradient norm
    layer_decay: float = 1.0


def stages_of(args, steps=1):
    """The two stages of a run with `steps` steps per epoch: RECIPE's values, or those of the
    command line."""
    v = {key: getattr(setting, args.strategy) for key, setting in RECIPE.items()} | vars(args)
    # Few, as it is a preview: a head that fits the pretrained features closely leaves fine-tuning
    # little incentive to improve them (Ren et al. 2023).
    if v["probe_epochs"] == PREVIEW:
        v["probe_epochs"] = min(30, max(1, round(PREVIEW_STEPS / steps))) if v["epochs"] else 30
    probe = {key: v[f"probe_{key}"] for key in Stage._fields if f"probe_{key}" in v}
    finetune = {key: v[key] for key in Stage._fields if key in v}
    return Stage("probe", **probe), Stage("finetune", **finetune)


def learning_rates(stage, epoch, steps, aurocs):
    """The learning rate of each step of an epoch, counted from 0, after epochs with these
    validation AUROCs. Stateless."""
    if stage.schedule == "plateau":
        optimizer = torch.optim.SGD([torch.zeros(1)], stage.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=10)
        for auroc in aurocs:
            plateau.step(auroc)
        return [optimizer.param_groups[0]["lr"]] * steps
    final = min(stage.final_lr, stage.lr)
    progress = [(epoch + step / steps) / stage.epochs for step in range(steps)]
    return [final + (stage.lr - final) * (1 + math.cos(math.pi * p)) / 2 for p in progress]


def make_optimizer(stage, layers):
    """The optimizer of `layers`, modules in order from input to output.

    A group's "scale" multiplies the learning rate: layer_decay to the power of the number of layers
    after it.
    """
    groups = []
    for depth, layer in enumerate(reversed(layers)):
        scale, parameters = stage.layer_decay ** depth, list(layer.parameters())
        if stage.optimizer == "adam":
            groups.append({"params": parameters, "scale": scale})
        else:
            matrices = [p for p in parameters if p.dim() > 1]
            vectors = [p for p in parameters if p.dim() == 1]
            groups.append({"params": matrices, "scale": scale})
            groups.append({"params": vectors, "scale": scale, "weight_decay": 0.0})
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[stage.optimizer]
    return make(groups, weight_decay=stage.weight_decay, fused=True)


# --------------------------------------------------------------------------------------- randomness

def epoch_seed(seed, stage, epoch, stream=0):
    """A separate seed for each epoch, so that a resumed run draws what an uninterrupted one draws.

    stream: 0 for the batch order, which all ranks share; 1 + rank for a rank's dropout and drop
    path.
    """
    entropy = seed, sum(map(ord, stage)), epoch, stream
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def epoch_batches(n, batch_size, seed, rank, world):
    """This rank's share of each batch of one epoch: strided slices of a permutation of n. The short
    last batch is dropped."""
    order = np.random.RandomState(seed).permutation(n)
    starts = range(0, n - batch_size + 1, batch_size)
    return [order[i:i + batch_size][rank::world] for i in starts]


def reset_head(model, seed):
    """Re-initialize a loaded network's head, seeded from its first layer's weights and `seed`.

    `seed` alone may be the one with which a pretraining run initialized its head: the network's
    features would already be fitted to the "new" head.
    """
    digest = zlib.crc32(model.first_conv.conv.weight.detach().numpy().tobytes())
    torch.manual_seed(int(np.random.SeedSequence((seed, digest)).generate_state(1)[0]))
    model.dense.reset_parameters()


# ---------------------------------------------------------------------------------------- one epoch

class Split(NamedTuple):
    array: object           # the cache's memory map (N, leads, 5000), or a tensor of its signals or
                            # of features (n, 1024)
    rows: np.ndarray        # (n,), record i is array[rows[i]]
    y: torch.Tensor         # (n, L) float32 of 0 and 1, on the device


class NonFinite(ArithmeticError):
    """The loss or a gradient is not finite, so that training cannot go on."""


def train_epoch(net, optimizer, scaler, split, index, rates, clip=None, amp=None, title=None):
    """One pass over the batches `index` of `split` with the learning rates `rates`.

    Returns (mean loss, steps skipped). scaler: torch's GradScaler, which does nothing unless it is
    enabled (fp16); steps with infinite gradients are skipped. amp: dtype of autocast, None for
    float32. title: of the progress bar, None for none. Raises NonFinite for a loss, or without the
    scaler a gradient, that is not finite.
    """
    from tqdm import tqdm
    net.train()
    device = split.y.device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    check_every = 1 if device.type == "cpu" else 16  # each check waits for the GPU
    losses, norms = [], []
    batches = data.batches(split.array, (split.rows[i] for i in index), device)
    hidden = None if title else True  # None: hidden unless in a terminal
    batches = tqdm(batches, title, len(index), leave=False, unit="step", disable=hidden)
    for step, x in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rates[step] * group.get("scale", 1.0)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = net(x)
        y = split.y.index_select(0, data.to_device(index[step], device))
        loss = F.binary_cross_entropy_with_logits(logits.float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf))
        losses.append(loss.detach())
        if (step + 1) % check_every == 0 or step + 1 == len(index):
            start = max(0, step + 1 - check_every)
            check_finite(losses[start:], norms[start:], scaler.is_enabled(), start, len(index))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    loss, skipped = torch.stack(losses).mean(), torch.stack(norms).isfinite().logical_not().sum()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return float(loss), int(skipped)


def check_finite(losses, norms, scaled, start, steps):
    """Raise NonFinite for the first of the steps after `start` whose loss is not finite, or whose
    gradient norm is not, unless a scaler skips those."""
    good = torch.stack(losses).isfinite() & (torch.stack(norms).isfinite() | scaled)
    if not good.all():
        at = int((~good).nonzero()[0])
        raise NonFinite(f"the loss is {losses[at]:g} and the gradient norm {norms[at]:g} "
                        f"at step {start + at + 1} of {steps}")


def infer_all(function, split, device, amp):
    """evaluate.infer, split over the ranks: each takes a strided slice, and all get the whole
    result, in order."""
    if not dist.is_initialized():
        return evaluate.infer(function, split.array, split.rows, device, amp=amp)
    rank, world = dist.get_rank(), dist.get_world_size()
    parts, mine, part = [None] * world, split.rows[rank::world], None
    if len(mine):
        part = evaluate.infer(function, split.array, mine, device, amp=amp)
    dist.all_gather_object(parts, part)
    whole = np.empty((len(split.rows), *parts[0].shape[1:]), np.float32)
    for r, part in enumerate(parts):
        if part is not None:
            whole[r::world] = part
    return whole


def validate(function, split, device, amp):
    """Mean loss, macro AUROC and macro AUPRC of one fold, by the one metric of evaluate.py."""
    logits, y = infer_all(function, split, device, amp), split.y.cpu()
    loss = float(F.binary_cross_entropy_with_logits(torch.from_numpy(logits), y))
    if not math.isfinite(loss):
        raise NonFinite(f"the validation loss is {loss:g}")
    scores = evaluate.auroc_auprc(y.numpy(), evaluate.probabilities(logits))
    auroc, auprc = (float(evaluate.macro(score)) for score in scores)
    return {"val_loss": loss, "macro_auroc": auroc, "macro_auprc": auprc}


# ----------------------------------------------------------------------------------- the two stages

class Run(NamedTuple):
    """A run in progress: its arguments, its network and its history so far."""
    args: argparse.Namespace
    device: torch.device
    rank: int
    world: int
    batch_size: int         # over all processes
    model: network.ECGFounder
    described: dict         # classes, leads, number of processes, a digest of the records, and the
                            # names of those trained on
    history: list           # the lines of metrics.jsonl
    state: dict             # of the optimizer and the scaler, if it was resumed

    def finished(self, stage):
        """How many epochs of the stage are done."""
        return sum(line["stage"] == stage.name for line in self.history)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)


def train(args, device, rank=0, world=1):
    """Train both stages, or what is left of them; writes the run's files to args.out."""
    described, notes, train_split, val_split = load_splits(args, device, world)
    run = begin(args, device, rank, world, described, train_split, len(val_split.rows))
    steps = len(train_split.rows) // run.batch_size
    model, (probe, finetune) = run.model, stages_of(args, steps)
    for note in notes:
        run.say(note)

    # Stage 1, preview linear probing: the backbone is frozen, so it runs once.
    if run.finished(probe) < probe.epochs:
        head = torch.nn.Sequential(model.dropout, model.dense)
        features = extract_features(run, train_split, val_split)
        fit(run, probe, head, [model.dense], *features, amp=None)
        del features  # fine-tuning has no use for them
    if probe.epochs and not run.finished(finetune):
        model.load_state_dict(best_probe(run))

    # Stage 2, fine-tuning: everything, with stochastic depth.
    if run.finished(finetune) < finetune.epochs:
        layers = [model.first_conv, *model.stage_list, model.dense]
        fit(run, finetune, model, layers, on_device(train_split, device), val_split, AMP[args.amp])

    if args.interpolate and probe.epochs and finetune.epochs:
        interpolate(run, val_split)


def best_probe(run):
    """The state_dict of probe.pt, the probe's best epoch on fold 9; later ones may overfit."""
    if run.world > 1:
        dist.barrier()  # until rank 0 has written it
    return network.read_checkpoint(Path(run.args.out, "probe.pt"))["state_dict"]


def extract_features(run, *splits):
    """Splits of signals -> splits of the network's features (n, 1024), kept on the device for
    training."""
    started, found, amp = time.perf_counter(), [], AMP[run.args.amp]
    for split in splits:
        features = infer_all(run.model.eval().forward_features, split, run.device, amp)
        features = torch.from_numpy(features).to(run.device)
        found.append(Split(features, np.arange(len(features)), split.y))
    n, seconds = sum(len(split.rows) for split in splits), time.perf_counter() - started
    run.say(f"features of {n:,} records in {seconds:.1f} s")
    return found


def fit(run, stage, trained, layers, train_split, val_split, amp):
    """Train the module `trained` for the remaining epochs of `stage`, with checkpoints."""
    args, device = run.args, run.device
    optimizer = make_optimizer(stage, layers)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    if run.finished(stage):
        optimizer.load_state_dict(run.state["optimizer"])
        scaler.load_state_dict(run.state["scaler"])
    net = torch.compile(trained) if args.compile and trained is run.model else trained
    if run.world > 1:
        ids = [device.index] if device.type == "cuda" else None
        net = torch.nn.parallel.DistributedDataParallel(net, device_ids=ids)

    for epoch in range(run.finished(stage), stage.epochs):
        started = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        torch.manual_seed(epoch_seed(args.seed, stage.name, epoch, 1 + run.rank))
        index = epoch_batches(len(train_split.rows), run.batch_size,
                              epoch_seed(args.seed, stage.name, epoch), run.rank, run.world)
        aurocs = [line["macro_auroc"] for line in run.history if line["stage"] == stage.name]
        rates = learning_rates(stage, epoch, len(index), aurocs)
        title = None if run.rank else f"{stage.name} {epoch + 1}/{stage.epochs}"
        loss, skipped = train_epoch(net, optimizer, scaler, train_split, index, rates, stage.clip,
                                    amp, title)
        rate = len(index) * run.batch_size / (time.perf_counter() - started)
        scores = validate(trained.eval(), val_split, device, amp)
        run.history.append({
            "stage": stage.name, "epoch": epoch + 1, "lr": rates[0], "train_loss": loss, **scores,
            "seconds": time.perf_counter() - started, "ecgs_per_second": rate})
        if device.type == "cuda":
            run.history[-1]["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        if run.rank == 0:  # last.pt first, so that --resume can restore the others from it
            save(run, "last.pt", optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        save_best(run)
        write_history(run)
        run.say(epoch_line(run.history[-1], stage.epochs, skipped))


def interpolate(run, val_split):
    """Validate interpolations of the probe's and the last epoch's weights (WiSE-FT, Wortsman et al.
    2022); best.pt becomes the best of them if it beats every epoch of fine-tuning."""
    model, amp = run.model, AMP[run.args.amp]
    start = best_probe(run)
    end = {key: value.clone() for key, value in model.state_dict().items()}
    for trial, share in enumerate(SHARES, 1):
        started = time.perf_counter()
        model.load_state_dict({key: torch.lerp(start[key].to(value), value, share)
                               for key, value in end.items()})
        try:
            scores = validate(model.eval(), val_split, run.device, amp)
        except NonFinite as error:
            run.say(f"interpolation {share:.2f}  {error}, left out")
            continue
        run.history.append({"stage": "interpolate", "epoch": trial, "share": share, **scores,
                            "seconds": time.perf_counter() - started})
        save_best(run)
        run.say(f"interpolation {share:.2f}  {scores_of(run.history[-1])}")
    write_history(run)


# ------------------------------------------------------------------------------------ a run's state

def begin(args, device, rank, world, described, train_split, n_val):
    """A new run, or the one that --resume continues."""
    n = len(train_split.rows)
    batch_size = min(args.batch_size, n) // world * world
    if not batch_size:
        raise InputError(f"{n} training records and batch size {args.batch_size} for {world} "
                         "processes; wanted at least one record per process")
    torch.manual_seed(args.seed)
    model = network.ecgfounder(len(described["classes"]), len(described["leads"]), args.drop_path,
                               args.drop_path_mode, args.dropout)
    path, last, weights = Path(args.out, "last.pt"), None, "random initialization"
    if args.resume and path.exists():
        last = evaluate.load_checkpoint(path)
        check_same_run(args, last, described)
        network.load_state(model, last["state_dict"], path, head=True)
        weights = f"resumed after {last['stage']} epoch {last['epoch']}"
    elif args.weights != "none":
        left_out = network.load_pretrained(model, args.weights, leads=described["leads"])
        reset_head(model, args.seed)
        weights = args.weights + (f" without {left_out} of its leads" if left_out else "")
    model.to(device)
    if AMP[args.amp]:
        check_precision(model.eval(), train_split, device, AMP[args.amp])
    history, state = [], {}
    if last:
        history, state = last["history"], {key: last[key] for key in ("optimizer", "scaler")}
    run = Run(args, device, rank, world, batch_size, model, described, history, state)
    asked = "" if batch_size == args.batch_size else f" (not {args.batch_size})"
    run.say(f"{args.task}, {n:,} records to train and {n_val:,} to validate on, batch {batch_size}"
            f"{asked}, {weights}, {world} x {device}, amp {args.amp}, seed {args.seed}")
    if last:
        save_best(run)  # the run may have ended between last.pt and best.pt
    write_history(run)
    return run


def load_splits(args, device, world):
    """(metadata for checkpoints, lines to print, training Split, validation Split); of fold 10 only
    the names and patients of the records are looked at."""
    labels, signals = data.load_records(args.data, args.task, args.preprocess, args.leads)
    folds = {"folds 1-8": data.TRAIN_FOLDS, "fold 9": [data.VAL_FOLD], "fold 10": [data.TEST_FOLD]}
    of_fold = {name: np.flatnonzero(np.isin(labels.fold, folds[name])) for name in folds}
    for name, index in of_fold.items():
        if not len(index):
            raise InputError(f"{args.data}: no record of {args.task} in {name}; wanted folds 1-8 "
                             "to train, 9 to validate and 10 to test on")
    positives, n = labels.y[of_fold["fold 9"]].sum(0), len(of_fold["fold 9"])
    if not ((positives > 0) & (positives < n)).any():
        raise InputError(f"{args.data}: no class of {args.task} has both positives and negatives "
                         "in fold 9, so that it cannot select an epoch; wanted a `fold` column "
                         "that gives it both")
    train = data.subset(of_fold["folds 1-8"], args.frac, args.seed)
    last = Path(args.out, "last.pt")
    path = last if args.resume and last.exists() else Path(args.weights)
    seen = network.read_checkpoint(path).get("trained_on", []) if path.is_file() else []
    notes = notes_on(args, labels, train, of_fold, seen)
    digest, splits = hashlib.sha256(), []
    for index in (train, of_fold["fold 9"]):
        digest.update(repr(labels.ecg_id[index].tolist()).encode() + labels.y[index].tobytes())
        y = torch.from_numpy(labels.y[index]).float().to(device)
        splits.append(Split(signals, labels.row[index], y))
    described = {"classes": labels.classes, "leads": args.leads, "processes": world,
                 "records": digest.hexdigest(),
                 "trained_on": sorted({*seen, *labels.record[train].tolist()})}
    return described, notes, *splits


def notes_on(args, labels, train, of_fold, seen):
    """What to know of the training records `train`, the three splits, and the records `seen` in
    the training of the initial weights, as lines to print."""
    notes = []
    if data.is_own(args.task):
        notes.append(f"{len(labels.classes)} classes: {', '.join(labels.classes)}")
    for name, index in (("training", train), ("validation", of_fold["fold 9"])):
        absent = [c for c, n in zip(labels.classes, labels.y[index].sum(0)) if not n]
        if absent:
            notes.append(f"no {name} record has {', '.join(absent)}")
    sets = train, of_fold["fold 9"], of_fold["fold 10"]
    patients = [set(labels.patient_id[index].tolist()) for index in sets]
    shared = set.union(*(a & b for a, b in itertools.combinations(patients, 2)))
    if shared:
        notes.append(f"{len(shared)} patients are in more than one of training, validation and "
                     "test: the scores will be optimistic")
    # A resumed run's checkpoint counts its own training records among those seen.
    trained = labels.of_patients(sorted({*seen} - {*labels.record[train]}))
    for name in ("fold 9", "fold 10"):
        n = trained[of_fold[name]].sum()
        if n:
            notes.append(f"{n:,} records of {name} are of patients in the training data of "
                         f"{args.weights}: their scores will be optimistic")
    return notes


def on_device(split, device):
    """The split with its signals on the GPU, if there is one with room; else unchanged."""
    signals, rows, _ = split
    if device.type != "cuda":
        return split
    if len(rows) * signals[0].nbytes > 0.25 * torch.cuda.mem_get_info(device)[0]:
        return split
    parts = [torch.from_numpy(signals[rows[i:i + 256]]).to(device)
             for i in range(0, len(rows), 256)]
    return split._replace(array=torch.cat(parts), rows=np.arange(len(rows)))


def check_precision(model, split, device, amp):
    """Raise InputError if the features of a few ECGs from `model` (in eval mode) under autocast to
    `amp` are far from those in float32: on some processors libraries compute some operations
    wrongly in low precision. Computed correctly, bf16 differs by less than 1 %."""
    exact, coarse = (evaluate.infer(model.forward_features, split.array, split.rows[:4], device,
                                    amp=dtype) for dtype in (None, amp))
    error, size = np.linalg.norm(coarse - exact), np.linalg.norm(exact)
    if not error <= 0.1 * size:
        raise InputError(f"this machine's features in {amp} differ from those in float32 by "
                         f"{100 * error / size:.0f} %; give --amp off, or bf16 instead of fp16, "
                         "with another --out if there is a last.pt")


def check_same_run(args, last, described):
    """Raise InputError unless the checkpoint `last` has these arguments, classes and records."""
    changed = [f"--{key.replace('_', '-')} was {last['args'].get(key)}, now {value}"
               for key, value in vars(args).items()
               if key not in FREE_ARGUMENTS and last["args"].get(key) != value]
    changed += [f"{key} differ" for key, value in described.items()
                if key != "trained_on" and last.get(key) != value]
    if changed or "optimizer" not in last:
        raise InputError(f"{args.out}/last.pt: this run cannot be resumed "
                         f"({'; '.join(changed) or 'no optimizer'}); give the same arguments and "
                         "data, or another --out without --resume")


# ---------------------------------------------------------------------------------------- its files

def save_best(run):
    """If the last line of the history, whose weights the model holds, is the best of its kind, save
    them: the probe's as probe.pt, those of fine-tuning or an interpolation as best.pt (without
    fine-tuning the probe's, too)."""
    stages_of_best = ["finetune", "interpolate"] if run.args.epochs else ["probe"]
    for name, stages in (("probe.pt", ["probe"]), ("best.pt", stages_of_best)):
        *before, last = run.history
        best = max((line["macro_auroc"] for line in before if line["stage"] in stages), default=-1)
        if run.rank == 0 and last["stage"] in stages and last["macro_auroc"] > best:
            save(run, name)


def save(run, name, **state):
    """Write a self-contained checkpoint of tensors and plain data. The last line of its history
    describes its weights; for an interpolation, it says the share."""
    import scipy
    import wfdb
    args, line = run.args, run.history[-1]
    checkpoint = {
        "layout": evaluate.CHECKPOINT_LAYOUT, "state_dict": run.model.state_dict(),
        "task": args.task, **run.described, "preprocessing": args.preprocess, "data": args.data,
        "args": dict(vars(args)), "stage": line["stage"], "epoch": line["epoch"],
        "versions": {m.__name__: str(m.__version__) for m in (torch, np, scipy, wfdb)},
        "history": run.history, **state}
    write_checkpoint(Path(args.out, name), checkpoint)


def write_checkpoint(path, checkpoint):
    def write(temporary):
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: cannot be written ({reason}); make room, and continue with "
                             "--resume") from None

    data.write_atomically(path, write)


def write_history(run):
    """Rewrite metrics.jsonl from the history, so that no kill leaves a partial or repeated line."""
    lines = "".join(json.dumps(line) + "\n" for line in run.history)
    if run.rank == 0:
        data.write_atomically(Path(run.args.out, "metrics.jsonl"), lambda p: p.write_text(lines))


def epoch_line(line, epochs, skipped):
    text = (f"{line['stage']} {line['epoch']}/{epochs}  lr {line['lr']:.1e}  "
            f"loss {line['train_loss']:.4f}  {scores_of(line)}  "
            f"{line['seconds']:.1f} s  {line['ecgs_per_second']:,.0f} ECGs/s")
    return f"{text}  {skipped} steps skipped" if skipped else text


def scores_of(line):
    auroc, auprc = (evaluate.digits(line[f"macro_{metric}"]).strip() for metric in evaluate.METRICS)
    return f"val loss {line['val_loss']:.4f}  AUROC {auroc}  AUPRC {auprc}"


# ------------------------------------------------------------------------------------- command line

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], epilog=SOURCES)
    add = parser.add_argument
    add("--task", required=True, metavar="TASK",
        help=f"one of {', '.join(data.TASKS)}, or a .csv table of your own (see README)")
    add("--frac", type=float, default=1.0,
        help="fraction of the training records; folds 9 and 10 stay whole (default: 1)")
    add("--data", default="ptbxl",
        help="the dataset's folder; its cache is built if missing (default: ptbxl)")
    add("--leads", default=",".join(data.LEADS), help="such as II,V1,V5 (default: all twelve)")
    add("--preprocess", choices=data.PREPROCESSING, default="filter",
        help="default: filter, as ECGFounder's authors require")
    add("--weights", default=network.OFFICIAL,
        help=f"checkpoint to start from, or none (default: {network.OFFICIAL})")
    add("--out", help="folder of the run (default: runs/<task>-frac<f>-<strategy>-seed<s>)")
    add("--seed", type=int, default=0,
        help="seeds initialization, training subset, batch order, drop path, dropout (default: 0)")
    add("--strategy", choices=("post", "baseline"), default="post",
        help="post: the paper's; baseline: ECGFounder's fine-tuning recipe (default: post)")
    add_recipe(parser)
    add("--drop-path-mode", choices=("constant", "linear"), default="constant",
        help="the same rate in every block, or growing with depth; the paper's is unknown "
             "(default: constant, ours)")
    add("--amp", choices=("auto", *AMP), default="auto",
        help="mixed precision (default: auto: fp16 on CUDA, off on the CPU; ours)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--resume", action="store_true", help="continue from last.pt in --out")
    add("--compile", action="store_true", help="torch.compile the network for fine-tuning")
    add("--skip-unreadable", action="store_true", help="leave out records that cannot be read")
    args = parser.parse_args(argv)
    defaults = {key: getattr(s, args.strategy) for key, s in RECIPE.items() if s.help}
    args = argparse.Namespace(**defaults | vars(args))
    name = f"{Path(args.task).stem}-frac{args.frac:g}-{args.strategy}-seed{args.seed}"
    args.out = args.out or f"runs/{name}"
    return args


def add_recipe(parser):
    """An option for each setting of RECIPE that has a help line."""
    for key, setting in RECIPE.items():
        if not setting.help:
            continue
        kind = {"type": type(setting.baseline)}
        if isinstance(setting.post, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        post, baseline = setting.sources
        parser.add_argument(
            f"--{key.replace('_', '-')}", **kind, default=argparse.SUPPRESS,
            help=f"{setting.help} (default: {setting.post}, {post}; with --strategy baseline "
                 f"{setting.baseline}, {baseline})")


def check(args):
    """Raise InputError for unusable arguments, before anything is read or written."""
    data.check_task(args.task)
    data.subset([0], args.frac, 0)  # raises for a bad --frac
    good = {"epochs": (args.epochs >= 0, "at least 0"),
            "probe_epochs": (args.probe_epochs == PREVIEW or args.probe_epochs >= 0, "at least 0"),
            "batch_size": (args.batch_size >= 1, "at least 1"),
            "seed": (0 <= args.seed < 2**32, "0 to 2^32 - 1"),
            "lr": (0 < args.lr < math.inf, "above 0"),
            "probe_lr": (0 < args.probe_lr < math.inf, "above 0"),
            "layer_decay": (0 < args.layer_decay <= 1, "0 < d <= 1"),
            "drop_path": (0 <= args.drop_path < 1, "0 <= p < 1"),
            "dropout": (0 <= args.dropout < 1, "0 <= p < 1")}
    for key, (fine, wanted) in good.items():
        if not fine:
            raise InputError(f"--{key.replace('_', '-')} is {getattr(args, key)}; wanted {wanted}")
    if not args.epochs and not args.probe_epochs:
        raise InputError("--epochs 0 and --probe-epochs 0 train nothing; give one above 0")
    going_on = args.resume and Path(args.out, "last.pt").exists()
    if args.weights != "none" and not os.path.exists(args.weights) and not going_on:
        raise InputError(f"{args.weights}: no such file; `python model.py --download` fetches the "
                         "official weights, --weights none starts from scratch")
    written = [Path(args.out, name) for name in OUTPUTS if name != "metrics.jsonl"]
    if not going_on and any(path.exists() for path in written):
        how = "without last.pt it cannot be resumed" if args.resume else "--resume continues it"
        raise InputError(f"{args.out}: holds a run already; {how}, another --out starts a new one")


def pick_device(name):
    """The device of this process: torchrun gives each of its processes a GPU."""
    device = evaluate.pick_device(name)
    if device.type == "cuda":
        device = evaluate.pick_device(f"cuda:{os.environ.get('LOCAL_RANK', device.index or 0)}")
        torch.cuda.set_device(device)
    return device


def post_train(args):
    """A whole run: cache, training, test."""
    check(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, out = pick_device(args.device), Path(args.out)
    if args.amp == "auto":
        args.amp = "fp16" if device.type == "cuda" else "off"
    args.data, args.leads = os.path.abspath(args.data), list(data.parse_leads(args.leads))
    if data.is_own(args.task):
        args.task = os.path.abspath(args.task)
    if args.resume and (out / "test.json").exists():
        check_same_run(args, evaluate.load_checkpoint(out / "last.pt"), {})
        if rank == 0:
            print(f"{out}: this run is finished, see test.json")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{data.line_of(error)}; give another --out") from None
    # The cache is built before the process group: it may take longer than the group's timeout.
    left_out = data.build_cache(args.data, args.task, args.preprocess, args.leads,
                                skip_unreadable=args.skip_unreadable).left_out()
    if rank == 0 and left_out:
        print(left_out)
    busy = "another process is training there; wait for it, or give another --out"
    with data.locked(out, OUTPUTS, busy) if rank == 0 else nullcontext():
        train_in_group(args, device, rank, world)
        if rank == 0:
            finish(args, device)


def train_in_group(args, device, rank, world):
    """`train`, in a process group where there are several processes."""
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, device, rank, world)
    if world > 1:
        # While a rank waits here, Gloo's threads release the last tensors. In torch 2.6 they cannot
        # do so during destroy_process_group, which waits for them and holds the GIL
        # (pytorch/pytorch#154976).
        dist.barrier()
        dist.destroy_process_group()


def finish(args, device):
    """Add to best.pt each class's threshold, of the best F1 on fold 9, and evaluate it on fold 10,
    which nothing has been evaluated on so far."""
    best = Path(args.out, "best.pt")
    checkpoint = evaluate.load_checkpoint(best)
    given = args.data, args.task, device, args.skip_unreadable
    p, _ = evaluate.predict_folds(best, [data.VAL_FOLD], *given)
    checkpoint["thresholds"] = evaluate.best_thresholds(p["y_true"], p["y_prob"]).tolist()
    checkpoint["positives"] = p["y_true"].sum(0).tolist()
    write_checkpoint(best, checkpoint)
    p, _ = evaluate.predict_folds(best, [data.TEST_FOLD], *given)
    scores = evaluate.score(p["y_true"], p["y_prob"], p["patient_id"])
    result = evaluate.report(scores, p["y_true"], p["classes"].tolist())
    evaluate.write_json(Path(args.out, "test.json"), result)
    print("\n".join(evaluate.model_lines([{"name": "best.pt on fold 10", **result}])))


def main(argv=None):
    args = parse(argv)
    try:
        post_train(args)
        return
    except (InputError, network.WeightsError, OSError) as error:
        status, message = 2, data.line_of(error)
    except NonFinite as error:
        status, message = 1, (f"{error}; a lower --lr (of the probe: --probe-lr), or instead of "
                              "fp16 --amp bf16 or off may help, with another --out if there is a "
                              "last.pt, which keeps the last good epoch")
    except torch.OutOfMemoryError:
        status, message = 1, ("the GPU's memory is too small to train on a batch of "
                              f"{args.batch_size}; a smaller --batch-size may fit, with another "
                              "--out if there is a last.pt")
    except KeyboardInterrupt:
        status, message = 130, ("stopped; the same command with --resume continues after the last "
                                f"finished epoch ({args.out}/last.pt)")
    sys.stderr.write(f"post_train.py: {message}\n")
    if dist.is_initialized():  # leaving the group would wait for the other processes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
