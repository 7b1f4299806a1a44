"""Post-training of ECGFounder: preview linear probing, then fine-tuning with stochastic depth.

    python post_train.py --task diagnostic44 --frac 0.1                         # the method
    python post_train.py --task diagnostic44 --frac 0.1 --strategy baseline     # plain fine-tuning
    python post_train.py --data clinic --task clinic.csv --leads I              # your own dataset
    torchrun --nproc_per_node 4 post_train.py --task all71                      # several GPUs

Method: Zhou et al., "Bridging Performance Gaps for Foundation Models: A Post-Training Strategy for
ECGFounder" (arXiv 2509.12991). Folds 1-8 train, fold 9 selects the checkpoint, fold 10 is evaluated
once, at the end. Writes to --out: metrics.jsonl (a line per epoch or interpolation), probe.pt and
best.pt (best validation macro AUROC of the probe and of fine-tuning), last.pt (for --resume),
test.json. Needs data.py, model.py and evaluate.py beside it.
"""
import argparse
import copy
import io
import json
import math
import os
import sys
import time
import zlib
from collections import Counter, namedtuple
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  now: later its defaults would hold the process group
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
import model as network
from data import InputError

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}
SHARES = (0.0, 0.25, 0.5, 0.75)     # interpolation weights: 0 is the probe, 1 the last epoch
SAVE_EVERY = 60     # seconds between checkpoints, unless an epoch takes longer

SOURCES = """Sources of the values, of post and baseline if they are two: community, a third-party
re-implementation, as the paper's own were not available; official, ECGFounder's fine-tuning recipe,
which has no probe; ours, tuned on fold 9 or chosen untuned."""
RECIPE = {  # option: (with --strategy post, with baseline, what it is and the values' sources)
    "probe_epochs": (None, 0, "auto: those of about 200 steps, 1 to 30; 30 if --epochs 0; ours"),
    "probe_lr": (1e-3, 1e-3, "learning rate of the probe, by cosine to 0; ours"),
    "probe_weight_decay": (0.1, 0.1, "community"),
    "epochs": (30, 30, "of fine-tuning; community; ours"),
    "lr": (5e-4, 1e-4, "learning rate of fine-tuning; community; official"),
    "final_lr": (1e-5, 0.0, "where the cosine ends, at most --lr; community"),
    "schedule": ("cosine", "plateau", "plateau: lr / 10 if 11 epochs stall; community; official"),
    "optimizer": ("adamw", "adam", "adamw: with no weight decay of vectors; community; official"),
    "weight_decay": (0.05, 1e-5, "community; official"),
    "clip": (1.0, math.inf, "largest norm of the gradient, above 0; ours; official"),
    "drop_path": (0.5, 0.0, "share of residual branches dropped, below 1; community; official"),
    "drop_path_mode": ("constant", "constant", "linear: growing with depth; ours"),
    "dropout": (0.05, 0.0, "before the head, below 1; community; official"),
    "batch_size": (32, 256, "ECGs per step, a multiple of the processes; ours; official"),
    "interpolate": (True, False, "after a probe: at the end try mixtures with its weights; ours"),
}
CHOICES = {"schedule": ("cosine", "plateau"), "optimizer": ("adamw", "adam"),
           "drop_path_mode": network.MODES}
Stage = namedtuple("Stage", "name epochs lr final_lr schedule optimizer weight_decay clip")


def stages_of(args, steps):
    """The two Stages of a run with `steps` steps per epoch."""
    # A preview is short: a head that fits the pretrained features closely leaves fine-tuning little
    # incentive to improve them (Ren et al. 2023).
    preview = min(30, max(1, round(200 / steps))) if args.epochs else 30
    epochs = preview if args.probe_epochs is None else args.probe_epochs
    probe = Stage("probe", epochs, args.probe_lr, 0.0, "cosine", "adamw", args.probe_weight_decay,
                  math.inf)
    return probe, Stage("finetune", *(getattr(args, option) for option in Stage._fields[1:]))


def learning_rates(stage, epoch, steps, aurocs):
    """The learning rate of each step of an epoch, which is counted from 0, after epochs with these
    validation AUROCs. It has no state, so that resuming needs none."""
    if stage.schedule == "plateau":
        optimizer = torch.optim.SGD([torch.zeros(1)], stage.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=10)
        for auroc in aurocs:
            plateau.step(auroc)
        return [optimizer.param_groups[0]["lr"]] * steps
    final = min(stage.final_lr, stage.lr)
    progress = [(epoch + step / steps) / stage.epochs for step in range(steps)]
    return [final + (stage.lr - final) * (1 + math.cos(math.pi * p)) / 2 for p in progress]


def make_optimizer(stage, parameters):
    """Adam, or AdamW, which spares one-dimensional parameters from the weight decay."""
    if stage.optimizer == "adam":
        return torch.optim.Adam(parameters, weight_decay=stage.weight_decay, fused=True)
    groups = [{"params": [p for p in parameters if p.dim() > 1]},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=stage.weight_decay, fused=True)


def epoch_seed(seed, stage, epoch, stream=0):
    """A separate seed for each epoch, so that a resumed run draws what an uninterrupted one draws.
    stream: 0 for the batch order, 1 + rank for a process's dropout and drop path."""
    entropy = seed, sum(map(ord, stage)), epoch, stream
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def epoch_batches(n, batch_size, seed):
    """This process's share of each batch of one epoch, as arrays of indices: strided slices of a
    permutation of n. A short last batch is left out."""
    rank, world = place()
    size = min(batch_size, n) // world * world
    order = np.random.RandomState(seed).permutation(n)
    return [order[i:i + size][rank::world] for i in range(0, n - size + 1, size)]


def place():
    """(rank, number) of this process among those that torchrun started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Split(namedtuple("Split", "x rows y")):
    """Record i is x[rows[i]], of a memory map (N, leads, 5000) or of a tensor on the device; y is
    (n, L) float32 of 0 and 1, on the device."""

    def batch(self, index):
        """Signals (B, leads, 5000) or features (B, 1024), and targets (B, L), on the device."""
        x = evaluate.take(self.x, self.rows[index], self.y.device)
        return x, evaluate.take(self.y, index, self.y.device)


def make_split(signals, labels, device):
    """A Split; its signals are on the GPU if they fit into a quarter of its free memory."""
    y, n = torch.from_numpy(labels.y).float().to(device), len(labels.row)
    if device.type != "cuda" or n * signals[0].nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return Split(signals, labels.row, y)
    parts = np.array_split(labels.row, 1 + n // 1024)
    x = torch.cat([torch.from_numpy(signals[part]).to(device) for part in parts])
    return Split(x, np.arange(n), y)


def choose_records(args, labels):
    """Labels of all records -> Labels to train on, --frac of them, Labels to validate on."""
    folds = data.TRAIN_FOLDS, data.VAL_FOLD, data.TEST_FOLD
    parts = train, val, _ = [labels.take(np.isin(labels.fold, some)) for some in folds]
    train = train.take(data.subset(np.arange(len(train.row)), args.frac, args.seed))
    sizes = [len(part.row) for part in (train, *parts[1:])]
    if min(sizes) < place()[1] or not (val.y.any(0) & ~val.y.all(0)).any():
        raise InputError(f"{args.task}: folds 1-8, 9 and 10 hold {sizes} records; wanted "
                         f"{place()[1]} or more, and both labels of a class in 9: give a column "
                         "`fold`, or more records")
    if data.is_own(args.task):
        print(f"{len(labels.classes)} classes: {', '.join(labels.classes)}")
    if alone := sum(map(data.is_unknown, labels.patient_id.tolist())):
        print(f"{alone:,} records name no patient (0, negative, unknown): each is taken as one")
    parts_of = Counter(who for part in parts for who in {*part.patient_id.tolist()})
    if shared := sum(n > 1 for n in parts_of.values()):
        print(f"{shared} patients are in several of folds 1-8, 9 and 10: scores are optimistic")
    return train, val


def train(args, device, labels, signals):
    """Train both stages, or what is left of them; writes the run's files to args.out."""
    chosen = choose_records(args, labels)
    train_split, val_split = (make_split(signals, some, device) for some in chosen)
    run = Run(args, *chosen, device)
    if place()[0] == 0 and not args.resume:     # or stop: another run may have begun meanwhile
        Path(args.out, "metrics.jsonl").touch(exist_ok=False)
    model, amp = run.model, AMP[args.amp]
    steps = len(epoch_batches(len(train_split.rows), args.batch_size, seed=0))   # of each epoch
    probe, finetune = stages_of(args, steps)

    # Stage 1, preview linear probing: the backbone is frozen, so it runs once.
    if len(run.lines("probe")) < probe.epochs:
        head = torch.nn.Sequential(model.dropout, model.dense)
        features = [extract_features(model, split, amp) for split in (train_split, val_split)]
        for _ in epochs(run, probe, head, *features, amp=None):
            if run.best("probe") is run.history[-1]:
                best = copy.deepcopy(head.state_dict())
        head.load_state_dict(best)      # later epochs may overfit
        run.save("probe.pt", **run.best("probe"))

    # Stage 2, fine-tuning: everything, with stochastic depth.
    best, saved = None, time.perf_counter()
    for states in epochs(run, finetune, model, train_split, val_split, amp):
        line = run.history[-1]
        if run.best("finetune") is line:
            best = {**line, "state_dict": copy.deepcopy(model.state_dict())}
        if line["epoch"] == finetune.epochs or time.perf_counter() - saved > SAVE_EVERY:
            if best:
                run.save("best.pt", **best)
            run.save("last.pt", **line, **states)
            best, saved = None, time.perf_counter()

    if not finetune.epochs:
        run.save("best.pt", **run.best("probe"))
    elif probe.epochs and args.interpolate:
        interpolate(run, val_split)


def extract_features(model, split, amp):
    """A Split of signals -> a Split of the network's features (n, 1024), on the device."""
    x = infer_all(model.eval().forward_features, split, amp)
    return Split(torch.from_numpy(x).to(split.y.device), np.arange(len(x)), split.y)


def epochs(run, stage, module, train_split, val_split, amp):
    """Train `module` for the epochs of `stage` that are left; after each, once its line is logged,
    yields the states of optimizer and scaler, for last.pt."""
    args, device, rank = run.args, train_split.y.device, place()[0]
    done = len(run.lines(stage.name))
    optimizer = make_optimizer(stage, list(module.parameters()))
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    if done:
        optimizer.load_state_dict(run.states["optimizer"])
        scaler.load_state_dict(run.states["scaler"])
        for group in optimizer.param_groups:    # as without a graph
            group.update(lr=stage.lr, capturable=False)
    step, net = GraphedStep(optimizer, device) if args.graph else train_step, module
    if dist.is_initialized():
        net = torch.nn.parallel.DistributedDataParallel(module)

    for epoch in range(done, stage.epochs):
        torch.manual_seed(epoch_seed(args.seed, stage.name, epoch, 1 + rank))
        batches = epoch_batches(len(train_split.rows), args.batch_size,
                                epoch_seed(args.seed, stage.name, epoch))
        aurocs = [line["macro_auroc"] for line in run.lines(stage.name)]
        rates = learning_rates(stage, epoch, len(batches), aurocs)
        bar = tqdm(batches, f"{stage.name} {epoch + 1}/{stage.epochs}", leave=False, unit="step",
                   disable=True if rank else None)  # None: hidden unless in a terminal
        loss = train_epoch(net, optimizer, scaler, train_split, bar, rates, stage.clip, amp, step)
        scores = validate(module.eval(), val_split, amp)
        if not math.isfinite(loss + scores["val_loss"]):
            raise InputError(f"{stage.name} epoch {epoch + 1}: the loss is not finite; try --amp "
                             "off, or a lower --lr or --probe-lr, with another --out")
        run.log(stage=stage.name, epoch=epoch + 1, lr=rates[0], train_loss=loss, **scores)
        yield {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}


def train_step(net, optimizer, scaler, x, y, clip, amp):
    """One step on a batch -> its loss, a tensor on the device, which is not waited for. scaler: a
    GradScaler, which does nothing unless enabled (fp16). amp: autocast's dtype, None: float32."""
    with torch.autocast(x.device.type, amp, enabled=amp is not None):
        logits = net(x)
    loss = F.binary_cross_entropy_with_logits(logits.float(), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    scaler.step(optimizer)      # in fp16 it skips steps with infinite gradients
    scaler.update()
    optimizer.zero_grad()
    return loss.detach()


class GraphedStep:
    """`train_step` as a CUDA graph: a CPU takes longer to launch a step's thousand kernels one by
    one than a GPU to run them. The first steps are taken as usual: in them cuDNN picks its kernels,
    and the optimizer and the scaler make their state. The next is recorded and, like all that
    follow, replayed on the memory it was recorded with: so batches have one shape and are copied to
    one place, and learning rates are tensors. Random numbers are drawn anew."""

    def __init__(self, optimizer, device, first=3):
        self.first, self.graph, self.stream = first, None, torch.cuda.Stream()
        for group in optimizer.param_groups:
            group.update(lr=torch.zeros((), device=device), capturable=True)

    def __call__(self, net, optimizer, scaler, x, y, clip, amp):
        if self.first:
            self.first -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):    # where it is recorded, too
                loss = train_step(net, optimizer, scaler, x, y, clip, amp)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.graph, self.x, self.y = torch.cuda.CUDAGraph(), x.clone(), y.clone()
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.loss = train_step(net, optimizer, scaler, self.x, self.y, clip, amp)
            except RuntimeError as error:
                raise InputError("the step cannot be recorded as a CUDA graph "
                                 f"({str(error).splitlines()[0]}); leave out --graph") from None
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss.clone()


def train_epoch(net, optimizer, scaler, split, batches, rates, clip=math.inf, amp=None,
                step=train_step):
    """One pass over `batches` of indices, with a learning rate for each -> the mean loss, over all
    processes. step: `train_step` or a GraphedStep; see `train_step` for the rest."""
    net.train()
    losses = []
    for index, rate in zip(batches, rates):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)     # where a graph reads it
            else:
                group["lr"] = rate
        losses.append(step(net, optimizer, scaler, *split.batch(index), clip, amp))
    loss = torch.stack(losses).mean()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def infer_all(forward, split, amp):
    """`evaluate.infer`, shared among the processes, which all get the whole result."""
    rank, world = place()
    mine = np.array_split(split.rows, world)[rank]
    own = evaluate.infer(forward, split.x, mine, split.y.device, amp)
    parts = [own] * world
    if dist.is_initialized():
        dist.all_gather_object(parts, own)
    return np.concatenate(parts)


def validate(forward, split, amp):
    """Mean loss, macro AUROC and AUPRC of one fold; where the loss is not finite, these are of
    equal probabilities."""
    logits, y = infer_all(forward, split, amp), split.y.cpu()
    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits), y).item()
    prob = evaluate.probabilities(logits) if math.isfinite(loss) else np.zeros(y.shape)
    auroc, auprc = evaluate.macro(evaluate.auroc_auprc(y, prob)[0]).tolist()
    return {"val_loss": loss, "macro_auroc": auroc, "macro_auprc": auprc}


def interpolate(run, val_split):
    """Validate interpolations of the probe's and the last epoch's weights (WiSE-FT, Wortsman et al.
    2022); best.pt becomes the best of them if it beats every epoch of fine-tuning."""
    start = network.read_checkpoint(Path(run.args.out, "probe.pt"))["state_dict"]
    end = {key: value.clone() for key, value in run.model.state_dict().items()}
    for trial, share in enumerate(SHARES, 1):
        run.model.load_state_dict({key: torch.lerp(start[key].to(value), value, share)
                                   for key, value in end.items()})
        scores = validate(run.model.eval(), val_split, AMP[run.args.amp])
        run.log(stage="interpolate", epoch=trial, share=share, **scores)
        if run.best("finetune", "interpolate") is run.history[-1]:
            run.save("best.pt", **run.history[-1])


class Run:
    """A run in progress: its network, the lines of metrics.jsonl so far, and its checkpoints."""

    def __init__(self, args, train, val, device):
        self.args, self.history, self.states, self.clock = args, [], {}, time.perf_counter()
        records = repr([(part.ecg_id.tolist(), part.y.tobytes()) for part in (train, val)])
        self.described = {"task": args.task, "classes": train.classes, "leads": args.leads,
                          "preprocessing": args.preprocess, "processes": place()[1],
                          "records": zlib.crc32(records.encode())}
        torch.manual_seed(args.seed)
        self.model = network.ecgfounder(len(train.classes), len(args.leads), args.drop_path,
                                        args.drop_path_mode, args.dropout)
        last, origin = Path(args.out, "last.pt"), f"weights {args.weights}"
        if args.resume and last.exists():
            self.go_on(last)
            origin = f"resumed after epoch {self.history[-1]['epoch']}"
        elif args.weights != "none":
            file = network.load_pretrained(self.model, args.weights, args.leads)
            if file.get("preprocessing", args.preprocess) != args.preprocess:
                print(f"{args.weights} was trained with --preprocess {file['preprocessing']}")
            # The seed alone might draw the head that these weights were trained with.
            digest = zlib.crc32(self.model.first_conv.conv.weight.detach().numpy().tobytes())
            entropy = np.random.SeedSequence((args.seed, digest))
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            self.model.dense.reset_parameters()
        self.model.to(device)
        print(f"{args.task}, {len(train.row):,} records to train and {len(val.row):,} to validate "
              f"on, {origin}, {place()[1]} x {device}, amp {args.amp}, seed {args.seed}")

    def go_on(self, path):
        """Load last.pt. Raises InputError if the arguments or the data are not the same."""
        self.states = network.read_checkpoint(path)
        before = {**self.states, **self.states.get("args", {})}
        changed = [f"{key} was {before.get(key)}, now {value}"
                   for key, value in {**vars(self.args), **self.described}.items()
                   if before.get(key) != value
                   and key not in ("resume", "out", "data", "task", "device", "graph")]
        if changed:
            raise InputError(f"{path}: this run cannot be resumed ({'; '.join(changed)[:400]}); "
                             "give the same arguments and data, or another --out")
        network.load_state(self.model, self.states["state_dict"], path)
        self.history = self.states["history"]

    def lines(self, *stages):   # of the history
        return [line for line in self.history if line["stage"] in stages]

    def best(self, *stages):
        """The line of these stages with the best validation AUROC, the first of equals."""
        return max(self.lines(*stages), key=lambda line: line["macro_auroc"])

    def log(self, **line):
        """Add a line to metrics.jsonl, with the seconds since the one before, and print it."""
        before, self.clock = self.clock, time.perf_counter()
        self.history.append({**line, "seconds": self.clock - before})
        if place()[0] == 0:
            with data.whole_file(Path(self.args.out, "metrics.jsonl")) as f:
                f.write("".join(json.dumps(line) + "\n" for line in self.history).encode())
        print("  ".join(f"{key.removeprefix('macro_')} {value:.4g}" if key != "stage" else value
                        for key, value in self.history[-1].items()))

    def save(self, name, **fields):
        """Write a self-contained checkpoint of tensors and plain data, with a line of the history
        in `fields`, and other weights than the model's if they are there."""
        if place()[0] == 0:
            save_checkpoint(Path(self.args.out, name), {
                "state_dict": self.model.state_dict(), **self.described, "data": self.args.data,
                "args": dict(vars(self.args)), "history": self.history, **fields,
                "versions": {name: metadata.version(name)
                             for name in ("torch", "numpy", "scipy", "wfdb")}})


def save_checkpoint(path, checkpoint):
    whole = io.BytesIO()    # of a full disk torch tells in its own way
    torch.save(checkpoint, whole)
    with data.whole_file(path) as f:
        f.write(whole.getbuffer())


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], epilog=SOURCES)
    add = parser.add_argument
    add("--task", required=True,
        help=f"one of {', '.join(data.TASKS)}, or a .csv table of your own (see README)")
    add("--frac", type=float, default=1.0, help="fraction of the training records (default: 1)")
    data.add_options(add)
    add("--weights", default=network.OFFICIAL,
        help=f"checkpoint to start from, or none (default: {network.OFFICIAL})")
    add("--out", help="folder of the run (default: runs/<task>-frac<f>-<strategy>-seed<s>)")
    add("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    add("--strategy", choices=("post", "baseline"), default="post",
        help="post: the paper's; baseline: ECGFounder's fine-tuning recipe (default: post)")
    add("--amp", choices=AMP, help="mixed precision (default: fp16 on CUDA, off on the CPU; ours)")
    add("--device", help="cpu, cuda; without torchrun cuda:1 (default: cuda if there is one)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--graph", action="store_true", help="on one GPU: take the steps as a CUDA graph")
    for name, (post, baseline, text) in RECIPE.items():
        kind = {"type": type(baseline), "choices": CHOICES.get(name)}
        if isinstance(post, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        values = f" (default: {post}; with --strategy baseline {baseline})".replace("None", "auto")
        add(f"--{name.replace('_', '-')}", **kind, help=text + values)
    args = parser.parse_args(argv)
    for name, (post, baseline, _) in RECIPE.items():
        if getattr(args, name) is None:
            setattr(args, name, post if args.strategy == "post" else baseline)
    args.out = args.out or (
        f"runs/{Path(args.task).stem}-frac{args.frac:g}-{args.strategy}-seed{args.seed}")
    return args


def check(args):
    """Raise InputError for unusable arguments, before anything is read or written."""
    numbers = {key: value for key, value in vars(args).items() if isinstance(value, (int, float))}
    ends = {"drop_path": 1, "dropout": 1, "seed": 2**32}    # comparisons with NaN are false
    bad = [key for key, x in numbers.items() if not x >= 0 or x >= ends.get(key, math.nan)]
    bad += ["frac"] * (not 0 < args.frac <= 1) + ["batch_size"] * (args.batch_size < place()[1])
    bad += ["probe_epochs"] * (args.probe_epochs == args.epochs == 0) + ["clip"] * (not args.clip)
    if bad:
        raise InputError(f"--{bad[0].replace('_', '-')} is {getattr(args, bad[0])}, see --help")
    if Path(args.out, "metrics.jsonl").exists() and not args.resume:
        raise InputError(f"{args.out}: holds a run; give --resume to continue it, or another --out")
    if args.weights != "none" and not Path(args.weights).exists() and not args.resume:
        raise InputError(f"{args.weights}: no such file; `python model.py --download` fetches it")


def post_train(args):
    """A whole run: cache, training, test."""
    check(args)
    device, (rank, world), out = evaluate.pick_device(args.device), place(), Path(args.out)
    local_rank = int(os.environ.get("LOCAL_RANK", device.index or 0))
    if device.type == "cuda":
        device = evaluate.pick_device(f"cuda:{local_rank}")     # torchrun may start too many
        torch.cuda.set_device(device)
    if args.graph and (device.type != "cuda" or world > 1):
        raise InputError("--graph: wanted one GPU")
    if rank:
        sys.stdout = open(os.devnull, "w")      # one process prints
    args.amp = args.amp or ("fp16" if device.type == "cuda" else "off")
    args.data, args.leads = os.path.abspath(args.data), list(data.parse_leads(args.leads))
    if data.is_own(args.task):
        args.task = os.path.abspath(args.task)
    if (out / "test.json").exists():
        print(f"{out}: a run is finished there, see test.json; no arguments were compared")
        return
    # One process of a machine builds the cache, before they form a group, which has a timeout.
    labels, signals = data.load_records(
        args.data, args.task, args.preprocess, args.leads, skip_unreadable=args.skip_unreadable,
        wait=world > 1 and local_rank > 0)
    out.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, device, labels, signals)
    if world > 1:
        dist.barrier()      # else torch 2.6 may hang in the next line (pytorch/pytorch#154976)
        dist.destroy_process_group()
    if rank == 0:
        finish(args, device, labels, signals)


def finish(args, device, labels, signals):
    """Add to best.pt each class's threshold, of the best F1 on fold 9, and evaluate it on fold 10,
    which nothing has been evaluated on so far."""
    path = Path(args.out, "best.pt")
    checkpoint, model = evaluate.load_model(path, device)
    val, test = (evaluate.predict(checkpoint, model, labels.take(labels.fold == fold), signals,
                                  device) for fold in (data.VAL_FOLD, data.TEST_FOLD))
    checkpoint["thresholds"] = evaluate.best_thresholds(val["y_true"], val["y_prob"]).tolist()
    checkpoint["positives"] = val["y_true"].sum(0).tolist()
    save_checkpoint(path, checkpoint)
    result = evaluate.report(evaluate.score(test), test)
    evaluate.write_json(Path(args.out, "test.json"), result)
    print(evaluate.macro_line("best.pt on fold 10", result))


def main(argv=None):
    try:
        with data.errors_in_one_line("post_train.py", network.WeightsError, torch.OutOfMemoryError,
                                     interrupted="stopped; the same command with --resume goes on"):
            post_train(parse(argv))
    except SystemExit as stop:
        if dist.is_initialized():   # leaving the group would wait for the other processes
            sys.stdout.flush()
            os._exit(stop.code)
        raise


if __name__ == "__main__":
    main()
