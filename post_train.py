"""Post-training of ECGFounder on PTB-XL: preview linear probing, then fine-tuning with stochastic depth.

    python post_train.py --task diagnostic44 --frac 0.1                          # the method, a tenth of the training data
    python post_train.py --task diagnostic44 --frac 0.1 --strategy baseline      # plain fine-tuning, the official recipe
    torchrun --nproc_per_node 4 post_train.py --task all71                       # several GPUs

Method: Zhou et al., "Bridging Performance Gaps for Foundation Models: A Post-Training Strategy for ECGFounder"
(arXiv 2509.12991). Folds 1-8 train, fold 9 selects the checkpoint, fold 10 is read once, at the end.
Writes to --out: metrics.jsonl (a line an epoch), best.pt (best validation macro AUROC), last.pt (to --resume from), test.json.
Needs data.py, model.py and evaluate.py beside it.
"""
import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  DDP imports it later; where a group exists by then, its default arguments keep that alive
import torch.nn.functional as F

import data
import evaluate
import model as network
from data import InputError

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}
# What a strategy sets unless an option says otherwise.
STRATEGIES = {"post": {"probe_epochs": 30, "lr": 5e-4, "layer_decay": 1.0, "drop_path": 0.5, "dropout": 0.05, "interpolate": True},
              "baseline": {"probe_epochs": 0, "lr": 1e-4, "layer_decay": 1.0, "drop_path": 0.0, "dropout": 0.0, "interpolate": False}}
SHARES = (0.0, 0.25, 0.5, 0.75)  # of fine-tuning in the weights between the probe's (0) and the last epoch's (1)
OUTPUTS = ("probe.pt", "best.pt", "last.pt", "metrics.jsonl", "test.json")
FREE_ARGUMENTS = ("resume", "out", "data", "device", "compile")  # may differ when a run goes on


class Stage(NamedTuple):
    name: str
    epochs: int
    optimizer: str          # "adamw": decoupled weight decay, none on one-dimensional parameters; "adam": coupled, on all
    lr: float
    weight_decay: float
    schedule: str           # "cosine" from lr to final_lr, or "plateau" on the validation AUROC
    final_lr: float
    clip: Optional[float]   # of the gradient norm
    layer_decay: float = 1.0  # the head trains at the learning rate, each stage of the network before it at this share of the next one's


def stages_of(args):
    """The run as a table: what its stages are and how they differ."""
    probe = Stage("probe", args.probe_epochs, "adamw", args.probe_lr, 0.1, "cosine", 0.0, None)
    finetune = {"post": Stage("finetune", args.epochs, "adamw", args.lr, 0.05, "cosine", 1e-5, 1.0, args.layer_decay),
                "baseline": Stage("finetune", args.epochs, "adam", args.lr, 1e-5, "plateau", 0.0, None, args.layer_decay)}
    return probe, finetune[args.strategy]


class Split(NamedTuple):
    array: object           # the cache's memory map (N, 12, 5000), a tensor of such signals, or one of features (n, 1024)
    rows: np.ndarray        # (n,), record i is array[rows[i]]
    y: torch.Tensor         # (n, L) float32 of 0 and 1, on the device


class NonFinite(ArithmeticError):
    """The loss or a gradient is not finite, so that training cannot go on."""


# ------------------------------------------------------------------------------------------------- schedule and randomness

def learning_rate(stage, progress, aurocs):
    """The rate at `progress` (0 to 1) through a stage whose finished epochs had these validation AUROCs. No state."""
    if stage.schedule == "plateau":
        return stage.lr * 0.1 ** plateaus(aurocs)
    final = min(stage.final_lr, stage.lr)
    return final + (stage.lr - final) * (1 + math.cos(math.pi * progress)) / 2


def plateaus(aurocs, patience=10, threshold=1e-4):
    """How often torch's ReduceLROnPlateau(mode="max", patience=10) would have reduced the rate after these epochs."""
    best, waited, reductions = -math.inf, 0, 0
    for value in aurocs:
        if value is not None and value > best * (1 + threshold):
            best, waited = value, 0
        else:
            waited += 1
        if waited > patience:
            reductions, waited = reductions + 1, 0
    return reductions


def epoch_seed(seed, stage, epoch, stream=0):
    """A seed of its own for each epoch, so that a resumed run draws what an undisturbed one would have drawn.

    stream: 0 for the order of the batches, which all ranks share; 1 + rank for a rank's dropout and drop path.
    """
    return int(np.random.SeedSequence((seed, sum(map(ord, stage)), epoch, stream)).generate_state(1)[0])


def new_head(model, seed):
    """Draw the head of a loaded network anew, from a stream that depends on its weights as well as on the seed.

    A stream of the seed alone may be the one from which a pretraining run drew its head: the network's features would know
    the "new" head already.
    """
    digest = zlib.crc32(model.first_conv.conv.weight.detach().numpy().tobytes())
    torch.manual_seed(int(np.random.SeedSequence((seed, digest)).generate_state(1)[0]))
    model.dense.reset_parameters()


def epoch_batches(n, batch_size, seed, rank, world):
    """This rank's share of each batch of one epoch: strided slices of a permutation of n; the short last batch is dropped."""
    order = np.random.RandomState(seed).permutation(n)
    return [order[i:i + batch_size][rank::world] for i in range(0, n - batch_size + 1, batch_size)]


# ---------------------------------------------------------------------------------------------------------------- training

def make_optimizer(stage, layers):
    """The optimizer of `layers`, modules in order from input to output. A group's "scale" is its share of the learning rate."""
    groups = []
    for depth, layer in enumerate(reversed(layers)):
        scale, parameters = stage.layer_decay ** depth, list(layer.parameters())
        if stage.optimizer == "adam":
            groups.append({"params": parameters, "scale": scale})
        else:
            groups.append({"params": [p for p in parameters if p.dim() > 1], "scale": scale})
            groups.append({"params": [p for p in parameters if p.dim() == 1], "scale": scale, "weight_decay": 0.0})
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[stage.optimizer]
    return make(groups, weight_decay=stage.weight_decay, fused=True)


def train_epoch(net, optimizer, scaler, split, index, rates, clip=None, amp=None, title=None):
    """One pass over the batches `index` of `split` with the learning rates `rates`; returns (mean loss, steps skipped).

    scaler: torch's GradScaler, which does nothing unless it is enabled (fp16); steps with infinite gradients are skipped.
    amp: dtype of autocast, None for float32. title: of the progress bar, None for none. Raises NonFinite for a loss, or
    without the scaler a gradient, that is not finite.
    """
    from tqdm import tqdm
    net.train()
    device = split.y.device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    check_every = 1 if device.type == "cpu" else 16  # each check waits for the GPU
    losses, norms = [], []
    batches = data.batches(split.array, (split.rows[i] for i in index), device)
    for step, x in enumerate(tqdm(batches, title, len(index), leave=False, unit="step", disable=None if title else True)):
        for group in optimizer.param_groups:
            group["lr"] = rates[step] * group.get("scale", 1.0)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = net(x)
        y = split.y.index_select(0, torch.as_tensor(index[step], device=device))
        loss = F.binary_cross_entropy_with_logits(logits.float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf))
        losses.append(loss.detach())
        if (step + 1) % check_every == 0 or step + 1 == len(index):
            check_finite(losses, norms, scaler.is_enabled(), len(index))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    skipped = int(torch.stack(norms).isfinite().logical_not().sum())
    return float(across_ranks(torch.stack(losses).mean())), skipped


def check_finite(losses, norms, scaled, steps):
    """Raise NonFinite for the first loss so far (or gradient norm, unless a scaler skips those) that is not finite."""
    good = torch.stack(losses).isfinite() & (torch.stack(norms).isfinite() | scaled)
    if not good.all():
        at = int((~good).nonzero()[0])
        raise NonFinite(f"the loss is {losses[at]:g} and the gradient norm {norms[at]:g} at step {at + 1} of {steps}")


def across_ranks(value):
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def infer_all(function, split, device, batch_size, amp):
    """evaluate.infer, shared out over the ranks: each takes a strided slice, every rank gets the whole, in order."""
    if not dist.is_initialized():
        return evaluate.infer(function, split.array, split.rows, device, batch_size, amp)
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [None] * world
    mine = split.rows[rank::world]
    dist.all_gather_object(parts, evaluate.infer(function, split.array, mine, device, batch_size, amp) if len(mine) else None)
    whole = np.empty((len(split.rows), *parts[0].shape[1:]), np.float32)
    for r, part in enumerate(parts):
        if part is not None:
            whole[r::world] = part
    return whole


def on_device(split, device):
    """The split with its signals on the GPU, where there is one with room to spare; else as it is."""
    signals, rows, _ = split
    if device.type != "cuda" or len(rows) * signals[0].nbytes > 0.25 * torch.cuda.mem_get_info(device)[0]:
        return split
    parts = [torch.from_numpy(signals[rows[i:i + 256]]).to(device) for i in range(0, len(rows), 256)]
    return split._replace(array=torch.cat(parts), rows=np.arange(len(rows)))


def peak_memory_mb(device):
    """On a GPU the epoch's peak of allocated memory; on a CPU the process's so far (Linux counts it in kB, macOS in bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def check_precision(model, split, device, amp):
    """Raise InputError where `model` (in eval mode) gives other features of a few ECGs with autocast to `amp` than in float32.

    Some libraries compute single operations wrongly in low precision on some processors. Right ones differ by 1 to 3 %.
    """
    rows = split.rows[:4]
    exact, coarse = (evaluate.infer(model.forward_features, split.array, rows, device, amp=dtype) for dtype in (None, amp))
    error, size = np.linalg.norm(coarse - exact), np.linalg.norm(exact)
    if not error <= 0.1 * size:
        raise InputError(f"this machine computes the network wrongly in {str(amp).removeprefix('torch.')}: the features of {len(rows)} ECGs "
                         f"are off by {100 * error / size:.0f} % from float32's; give --amp off")


def validate(function, split, device, amp):
    """Mean loss, macro AUROC and macro AUPRC of one fold (None where undefined), by the one metric of evaluate.py."""
    logits, y = infer_all(function, split, device, 64, amp), split.y.cpu()
    loss = float(F.binary_cross_entropy_with_logits(torch.from_numpy(logits), y))
    if not math.isfinite(loss):
        raise NonFinite(f"the validation loss is {loss:g}")
    scores = [evaluate.macro(m) for m in evaluate.auroc_auprc(y.numpy(), evaluate.probabilities(logits))]
    return loss, *(None if np.isnan(s) else float(s) for s in scores)


# --------------------------------------------------------------------------------------------------------------------- run

def train(args, device, rank=0, world=1):
    """Train both stages from where the run stands; leaves best.pt, last.pt and metrics.jsonl in args.out."""
    say = print if rank == 0 else lambda *a, **k: None
    out, amp = Path(args.out), AMP[args.amp]
    about, train_split, val_split = load_splits(args, device)
    n = len(train_split.rows)
    batch_size = min(args.batch_size, n) // world * world
    if not batch_size:
        raise InputError(f"{n} training records and batch size {args.batch_size} for {world} processes; wanted at least one record each")
    torch.manual_seed(args.seed)
    model = network.ecgfounder(len(about["classes"]), drop_path=args.drop_path, drop_path_mode=args.drop_path_mode, dropout=args.dropout)
    last = evaluate.load_checkpoint(out / "last.pt")[1] if args.resume and (out / "last.pt").exists() else None
    if last:
        check_arguments(args, last)
        if other := [key for key, value in about.items() if last.get(key) != value]:
            raise InputError(f"{out}/last.pt was begun with other {other[0]} than {args.data} has; give the same --data, or another --out")
        network.load_state(model, last["state_dict"], out / "last.pt", head=True)
        if rank == 0:
            save_outcome(out, last, stages_of(args))  # the run may have ended before these files
        say(f"going on after {last['stage']} epoch {last['epoch']}")
    elif args.weights != "none":
        network.load_pretrained(model, args.weights)
        new_head(model, args.seed)
    model.to(device)
    if amp:
        check_precision(model.eval(), train_split, device, amp)
    history = last["history"] if last else []
    if rank == 0:
        write_history(out, history)
    say(f"{args.task}, {n:,} records to train and {len(val_split.rows):,} to validate on, batch {batch_size}"
        f"{'' if batch_size == args.batch_size else f' (not {args.batch_size})'}, "
        f"{'random initialization' if args.weights == 'none' else args.weights}, {device}{f' x {world}' if world > 1 else ''}, "
        f"amp {args.amp}, seed {args.seed}")

    for stage in stages_of(args):
        finished = sum(line["stage"] == stage.name for line in history)
        if finished >= stage.epochs:
            continue
        if stage.name == "probe":  # the backbone is frozen: run it once, in eval mode, and train the head on what it gives
            started = time.perf_counter()
            model.eval()
            splits = [Split(torch.from_numpy(infer_all(model.forward_features, split, device, 64, amp)).to(device),
                            np.arange(len(split.rows)), split.y) for split in (train_split, val_split)]
            trained, stage_amp = torch.nn.Sequential(model.dropout, model.dense), None
            say(f"features of {n + len(val_split.rows):,} records in {time.perf_counter() - started:.1f} s")
        else:
            splits, trained, stage_amp = (on_device(train_split, device), val_split), model, amp
        layers = [model.first_conv, *model.stage_list, model.dense] if trained is model else [model.dense]
        optimizer = make_optimizer(stage, layers)
        scaler = torch.amp.GradScaler(device.type, enabled=stage_amp == torch.float16)
        if finished:
            optimizer.load_state_dict(last["optimizer"])
            scaler.load_state_dict(last["scaler"])
        # What computes: `trained` itself, or compiled, or wrapped for several GPUs.
        net = torch.compile(trained) if args.compile and trained is model else trained
        if world > 1:
            net = torch.nn.parallel.DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)

        for epoch in range(finished, stage.epochs):
            started = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            torch.manual_seed(epoch_seed(args.seed, stage.name, epoch, 1 + rank))
            index = epoch_batches(n, batch_size, epoch_seed(args.seed, stage.name, epoch), rank, world)
            aurocs = [line["macro_auroc"] for line in history if line["stage"] == stage.name]
            rates = [learning_rate(stage, (epoch + step / len(index)) / stage.epochs, aurocs) for step in range(len(index))]
            title = None if rank else f"{stage.name} {epoch + 1}/{stage.epochs}"
            try:
                train_loss, skipped = train_epoch(net, optimizer, scaler, splits[0], index, rates, stage.clip, stage_amp, title)
                training_seconds = time.perf_counter() - started
                val_loss, auroc, auprc = validate(trained.eval(), splits[1], device, stage_amp)
            except NonFinite as error:
                raise NonFinite(f"{stage.name} epoch {epoch + 1}: {error}") from None
            history.append({"stage": stage.name, "epoch": epoch + 1, "lr": rates[0], "train_loss": train_loss, "val_loss": val_loss,
                            "macro_auroc": auroc, "macro_auprc": auprc, "seconds": time.perf_counter() - started,
                            "ecgs_per_second": len(index) * batch_size / training_seconds, "peak_memory_mb": peak_memory_mb(device)})
            if rank == 0:
                checkpoint = make_checkpoint(args, model, about, history)
                save(out / "last.pt", {**checkpoint, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
                save_outcome(out, checkpoint, stages_of(args))
                write_history(out, history)
            say(epoch_line(history[-1], stage.epochs, skipped), flush=True)

    if args.interpolate and args.probe_epochs and args.epochs:
        for line in interpolate(model, out / "probe.pt", val_split, device, amp):
            history.append(line)
            if rank == 0:
                save_outcome(out, make_checkpoint(args, model, about, history), stages_of(args))
                write_history(out, history)
            say(f"{line['share']:.0%} of fine-tuning  val loss {line['val_loss']:.4f}  {scores_of(line)}  {line['seconds']:.1f} s", flush=True)


def interpolate(model, probe, val_split, device, amp):
    """Weights on the line from the probe's checkpoint to `model`, which takes them one after the other (WiSE-FT, Wortsman et al. 2022).

    Yields a line of history for each: fold 9 tells whether fine-tuning took too much of the probe away.
    """
    start = network.read_checkpoint(probe)["state_dict"]
    end = {key: value.clone() for key, value in model.state_dict().items()}
    for epoch, share in enumerate(SHARES, 1):
        started = time.perf_counter()
        model.load_state_dict({key: torch.lerp(start[key].to(value), value, share) for key, value in end.items()})
        loss, auroc, auprc = validate(model.eval(), val_split, device, amp)
        yield {"stage": "interpolate", "epoch": epoch, "share": share, "val_loss": loss, "macro_auroc": auroc, "macro_auprc": auprc,
               "seconds": time.perf_counter() - started}


def load_splits(args, device):
    """(what a checkpoint says of them, training Split, validation Split); fold 10 is only counted, not read."""
    labels = data.load_labels(args.data, args.task)
    cache = data.load_cache(args.data, args.preprocess)
    labels, rows = data.align(labels, cache)
    for folds, name in ((data.TRAIN_FOLDS, "folds 1-8"), ([data.VAL_FOLD], "fold 9"), ([data.TEST_FOLD], "fold 10")):
        if not np.isin(labels.fold, folds).any():
            raise InputError(f"{args.data}: no record of {args.task} in {name}; wanted PTB-XL's ten folds")
    train = data.subset(np.flatnonzero(np.isin(labels.fold, data.TRAIN_FOLDS)), args.frac, args.seed)
    val = np.flatnonzero(labels.fold == data.VAL_FOLD)
    digest = hashlib.sha256(b"".join(labels.ecg_id[i].tobytes() + labels.y[i].tobytes() for i in (train, val))).hexdigest()
    splits = (Split(cache.signals, rows[i], torch.from_numpy(labels.y[i]).float().to(device)) for i in (train, val))
    return {"classes": labels.classes, "records": digest}, *splits


def best_epoch(history, stages):
    """Index of the first line with the best validation AUROC among fine-tuning and interpolation, or the probe's with --epochs 0."""
    names = ("finetune", "interpolate") if stages[1].epochs else ("probe",)
    lines = [i for i, line in enumerate(history) if line["stage"] in names]
    return max(lines, key=lambda i: -1.0 if history[i]["macro_auroc"] is None else history[i]["macro_auroc"], default=None)


def save_outcome(out, checkpoint, stages):
    """Write best.pt where the checkpoint's last epoch is its best, and probe.pt at the probe's end.

    It comes after last.pt, so that this always names best.pt's epoch.
    """
    history, (probe, _) = checkpoint["history"], stages
    checkpoint = {key: value for key, value in checkpoint.items() if key not in ("optimizer", "scaler")}
    if best_epoch(history, stages) == len(history) - 1:
        save(out / "best.pt", checkpoint)
    if (history[-1]["stage"], history[-1]["epoch"]) == ("probe", probe.epochs):
        save(out / "probe.pt", checkpoint)


def make_checkpoint(args, model, about, history):
    """A checkpoint: tensors and plain data that say all there is to know of it. about: the classes, a digest of the records."""
    return {"layout": evaluate.CHECKPOINT_LAYOUT, "state_dict": model.state_dict(), "task": args.task, **about,
            "preprocessing": args.preprocess, "data": os.path.abspath(args.data), "args": dict(vars(args)),
            "stage": history[-1]["stage"], "epoch": history[-1]["epoch"], "history": history,
            "versions": {"torch": str(torch.__version__), **data.versions()}}


def save(path, checkpoint):
    def write(temporary):
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise InputError(f"{path}: cannot be written ({str(error).splitlines()[0]}); make room, and go on with --resume") from None
    data.write_atomically(path, write)


def write_history(out, history):
    """metrics.jsonl anew from the history, so that no kill leaves a torn or doubled line."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    data.write_atomically(out / "metrics.jsonl", lambda temporary: temporary.write_text(lines))


def check_arguments(args, last):
    if "optimizer" not in last:
        raise InputError(f"{args.out}/last.pt: holds no optimizer; wanted what post_train.py wrote there, or another --out without --resume")
    changed = [f"--{key.replace('_', '-')} was {last['args'].get(key)}, now {value}" for key, value in vars(args).items()
               if key not in FREE_ARGUMENTS and last["args"].get(key) != value]
    if changed:
        raise InputError(f"{args.out}/last.pt was begun with other arguments ({'; '.join(changed)}); give the same ones, or another --out")


def epoch_line(line, epochs, skipped):
    return (f"{line['stage']} {line['epoch']}/{epochs}  lr {line['lr']:.1e}  loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}  "
            f"{scores_of(line)}  {line['seconds']:.1f} s  "
            f"{line['ecgs_per_second']:,.0f} ECGs/s{f'  {skipped} steps skipped' if skipped else ''}")


def scores_of(line):
    return "  ".join(f"{m.upper()} {evaluate.show(line[f'macro_{m}']).strip()}" for m in evaluate.METRICS)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    source = "community-derived: the paper's own value could not be read"
    add = parser.add_argument
    add("--task", required=True, metavar="TASK", help=f"one of {', '.join(data.TASKS)}")
    add("--frac", type=float, default=1.0, help="fraction of the training records, set by --seed; folds 9 and 10 stay whole")
    add("--data", default="ptbxl", help="PTB-XL's folder; its cache is built when missing")
    add("--preprocess", choices=data.PREPROCESSING, default="filter", help="as ECGFounder's authors demand")
    add("--weights", default=network.OFFICIAL, help="checkpoint to start from, or none for random initialization")
    add("--out", help="folder of the run (default: runs/<task>-frac<f>-<strategy>-seed<s>)", default=argparse.SUPPRESS)
    add("--seed", type=int, default=0, help="sets initialization, fraction, order of the batches, drop path and dropout")
    add("--strategy", choices=tuple(STRATEGIES), default="post", help="post: the paper's; baseline: ECGFounder's official fine-tuning recipe")
    for name, kind, text in (("probe-epochs", int, "epochs of preview linear probing, 0: none"), ("lr", float, "learning rate of fine-tuning"),
                             ("layer-decay", float, "each stage trains at this share of the next one's rate, 0 < d <= 1, 1: all at the same"),
                             ("drop-path", float, "share of residual branches dropped, 0 <= p < 1"), ("dropout", float, "dropout before the head")):
        key = name.replace("-", "_")
        add(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {STRATEGIES['post'][key]}, {source}; "
            f"with --strategy baseline {STRATEGIES['baseline'][key]}, the official recipe)")
    add("--interpolate", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="at the end try weights between the probe's and the last epoch's too (default: with --strategy post; ours)")
    add("--epochs", type=int, default=30, help=f"epochs of fine-tuning; {source}; an official script has 30 too")
    add("--batch-size", type=int, default=256, help="over all devices; community-derived and official")
    add("--probe-lr", type=float, default=5e-3, help=f"learning rate of the probe; {source}")
    add("--drop-path-mode", choices=("constant", "linear"), default="constant", help="the same rate in every block, or growing with depth; the paper's is unknown, this default is ours")
    add("--amp", choices=("auto", *AMP), default="auto", help="mixed precision; auto: fp16 on CUDA, off on the CPU; ours")
    add("--device", default=argparse.SUPPRESS, help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--resume", action="store_true", help="go on from last.pt in --out")
    add("--compile", action="store_true", help="torch.compile the network for fine-tuning")
    add("--skip-unreadable", action="store_true", help="leave out records that cannot be read")
    args = parser.parse_args(argv)
    for key, value in STRATEGIES[args.strategy].items():
        setattr(args, key, getattr(args, key, value))
    args.out = str(getattr(args, "out", f"runs/{args.task}-frac{args.frac:g}-{args.strategy}-seed{args.seed}"))
    args.device = getattr(args, "device", None)
    return args


def check(args):
    """Raise InputError for what no run can use, before anything is read or written."""
    data.check_task(args.task)
    data.subset([0], args.frac, 0)  # raises for a bad --frac
    for key, good, wanted in (("epochs", args.epochs >= 0, "at least 0"), ("probe_epochs", args.probe_epochs >= 0, "at least 0"),
                              ("batch_size", args.batch_size >= 1, "at least 1"), ("seed", 0 <= args.seed < 2**32, "0 to 2^32 - 1"),
                              ("lr", 0 < args.lr < math.inf, "above 0"), ("probe_lr", 0 < args.probe_lr < math.inf, "above 0"),
                              ("drop_path", 0 <= args.drop_path < 1, "0 <= p < 1"),
                              ("layer_decay", 0 < args.layer_decay <= 1, "0 < d <= 1"), ("dropout", 0 <= args.dropout < 1, "0 <= p < 1")):
        if not good:
            raise InputError(f"--{key.replace('_', '-')} is {getattr(args, key)}; wanted {wanted}")
    if not args.epochs and not args.probe_epochs:
        raise InputError("--epochs 0 and --probe-epochs 0 train nothing; give one of them")
    if args.weights != "none" and not os.path.exists(args.weights) and not (args.resume and Path(args.out, "last.pt").exists()):
        raise InputError(f"{args.weights}: no such file; `python model.py --download` fetches the official weights, --weights none starts at random")
    if not args.resume and any(Path(args.out, name).exists() for name in ("last.pt", "best.pt", "test.json")):
        raise InputError(f"{args.out}: holds a run already; --resume goes on with it, another --out begins a new one")


def run(args):
    check(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = evaluate.pick_device(args.device)
    if device.type == "cuda":  # torchrun gives each of its processes a GPU
        device = evaluate.pick_device(f"cuda:{os.environ.get('LOCAL_RANK', device.index or 0)}")
        torch.cuda.set_device(device)
    if args.amp == "auto":
        args.amp = "fp16" if device.type == "cuda" else "off"
    args.data = os.path.abspath(args.data)
    out = Path(args.out)
    if args.resume and (out / "test.json").exists():
        if (out / "last.pt").exists():
            check_arguments(args, evaluate.load_checkpoint(out / "last.pt")[1])
        if rank == 0:
            print(f"{out}: this run is finished, see test.json")
        return
    if args.resume and not (out / "last.pt").exists() and rank == 0:
        print(f"{out}: no last.pt to go on from, starting anew")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror.lower()}); give another --out") from None
    data.build_cache(args.data, args.preprocess, skip_unreadable=args.skip_unreadable)  # may take longer than ranks wait for each other
    with data.locked(out, OUTPUTS, "another process is training there; wait for it, or give another --out") if rank == 0 else nullcontext():
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            train(args, device, rank, world)
            if world > 1:
                # While a rank waits here, Gloo's threads let go of the last tensors. Up to torch 2.7 they cannot do so
                # during destroy_process_group, which waits for them and holds Python's lock (pytorch/pytorch#154976).
                dist.barrier()
        finally:
            if world > 1:
                dist.destroy_process_group()
        if rank == 0:
            p = evaluate.predict_folds(out / "best.pt", [data.TEST_FOLD], args.data, device)
            result = evaluate.report(evaluate.score(p["y_true"], p["y_prob"], p["patient_id"]), p["y_true"], p["classes"].tolist())
            evaluate.write_json(out / "test.json", result)
            print("\n".join(["test fold 10 with best.pt:", *evaluate.summary(result)]))


def stop(number, frame):
    raise KeyboardInterrupt(number)


def main(argv=None):
    args = parse(argv)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run(args)
        return
    except (InputError, network.WeightsError, OSError) as error:
        status, message = 2, data.line_of(error)
    except NonFinite as error:
        status, message = 1, f"{error}; last.pt keeps the last good epoch; --amp bf16 or off, or a lower --lr, with another --out may mend it"
    except torch.OutOfMemoryError:
        status, message = 1, f"the GPU's memory is too small to train on a batch of {args.batch_size}; --batch-size {max(1, args.batch_size // 2)} may fit, with another --out if there is a last.pt"
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        status, message = 128 + number, f"stopped; the same command with --resume goes on after the last finished epoch ({args.out}/last.pt)"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.stderr.write(f"post_train.py: {message}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
