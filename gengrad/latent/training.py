"""Training the autoencoder: molecules and their properties from codes with noise, batches of one length, resumable."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gengrad.data.draws import generator_for
from gengrad.files import encode_json, write_json
from gengrad.latent.codec import KIND, Codec, Whitening, build_network, symbols_of
from gengrad.latent.labels import head_of, label_loss, labels_of
from gengrad.latent.reconstruction import reconstruction
from gengrad.latent.settings import AutoencoderSettings
from gengrad.molecules.autoencoder import CHUNK, Autoencoder, on_sphere
from gengrad.molecules.tokens import Alphabet
from gengrad.training.checkpoint import (
    CheckpointStore,
    load_module_state,
    load_optimizer_state_by_name,
    module_state,
    optimizer_state_by_name,
)
from gengrad.training.interrupt import Interrupts
from gengrad.training.lock import RunLock
from gengrad.training.schedule import learning_rate
from gengrad.training.tracking import Tracker

SAVE_EVERY = 60.0  # seconds between checkpoints
LOG_EVERY = 50  # steps
SEEN = 256  # held-out molecules decoded on the way


def digest_of(smiles: Sequence[str]) -> str:
    """The first digits of the SHA-256 of a list of molecules."""
    return hashlib.sha256("\n".join(smiles).encode()).hexdigest()[:16]


def split(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """(to train on, held out) of ``count`` molecules; at most a tenth is held out, and at least one."""
    held = max(1, min(held_out, count // 10))
    order = torch.randperm(count, generator=generator_for(seed, "molecules split"))
    return sorted(order[held:].tolist()), sorted(order[:held].tolist())


def losses_of(
    network: Autoencoder, head: nn.Module, tokens: Tensor, labels: Tensor, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean over tokens of -log p(token | tokens before it, z + noise), z = encoder(tokens) on its sphere; and the error
    of the properties that ``head`` reads from z + noise.

    Every token up to the first end counts, and nothing after it. tokens: (n, T); labels: (n, k), NaN left out.
    """
    z = network.encode(tokens)
    noisy = z + noise * torch.randn(z.shape, generator=generator).to(z)
    before = network.shifted(tokens)
    counted = torch.cat([torch.ones_like(tokens[:, :1]), tokens[:, :-1]], dim=1) != 0
    loss = cross_entropy(network.logits(noisy, before)[counted], tokens[counted].long())
    return loss, label_loss(head(on_sphere(noisy)), labels)


def batches_of(lengths: Tensor, size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of an epoch: molecules of nearly one length together, the batches in any order."""
    generator = generator_for(seed, "autoencoder/epoch", epoch)
    order = (lengths + 3 * torch.rand(len(lengths), generator=generator)).argsort()
    batches = order.split(size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class Fit:
    """The moving parts: network, optimiser, where the run stands; and their state by name.

    ``rows``: the molecules in numbers; ``labels`` (n, k): their standardised properties.
    """

    def __init__(
        self, settings: AutoencoderSettings, alphabet: Alphabet, rows: list[list[int]], labels: Tensor, device: str
    ):
        self.settings, self.device, self.step, self.seconds = settings, device, 0, 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(settings.seed, "init").initial_seed())
            self.network = build_network(settings.network, alphabet).to(device)
            self.head = head_of(settings.network.latent, labels.shape[1]).to(device)
        self.named = dict(nn.ModuleDict({"network": self.network, "head": self.head}).named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.tokens, self.labels = alphabet.rows(rows), labels
        self.lengths = (self.tokens != 0).sum(1)
        self._batches: tuple[int, list[Tensor]] = (-1, [])

    @property
    def share(self) -> float:
        """How much of the budget is spent, in [0, 1]."""
        s = self.settings
        return min(1.0, self.step / s.steps if s.steps else self.seconds / (60 * s.minutes))

    def batch(self) -> tuple[Tensor, Tensor]:
        """The tokens (n, T) and labels (n, k) of this step, a function of the seed and the step."""
        epoch, place = divmod(self.step, -(-len(self.tokens) // self.settings.batch_size))
        if self._batches[0] != epoch:
            self._batches = (epoch, batches_of(self.lengths, self.settings.batch_size, self.settings.seed, epoch))
        rows = self._batches[1][place]
        longest = int(self.lengths[rows].max())
        return self.tokens[rows, : longest + 1].to(self.device), self.labels[rows].to(self.device)

    def advance(self) -> dict[str, float]:
        """One step of the optimiser."""
        s, generator = self.settings, generator_for(self.settings.seed, "autoencoder/noise", self.step)
        ramp = min(1.0, (self.step + 1) / s.warmup) if s.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = ramp * learning_rate(round(1e6 * self.share), 1_000_000, s.lr, 0)
        tokens, labels = self.batch()
        written, read = losses_of(self.network, self.head, tokens, labels, s.noise, generator)
        loss = written + s.property_weight * read
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the autoencoder's loss is {loss.item()} at step {self.step}: start again with a lower lr "
                f"(now {s.lr:g}) in another folder"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        found = {"step": self.step, "loss": written.item(), "grad_norm": float(norm), "lr": group["lr"]}
        return found | ({"property_error": read.item()} if labels.shape[1] else {})

    def state(self) -> dict:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "network": module_state(self.network),
            "head": module_state(self.head),
            "optimizer": optimizer_state_by_name(self.optimizer, self.named),
        }

    def load(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        load_module_state(self.network, state["network"])
        load_module_state(self.head, state["head"])
        load_optimizer_state_by_name(self.optimizer, self.named, state["optimizer"])


def train_autoencoder(
    smiles: Sequence[str],
    out: str | Path,
    settings: AutoencoderSettings | None = None,
    *,
    processes: int = 1,
    device: str = "cpu",
    quiet: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Codec | int:
    """The codec trained on canonical SMILES, stored in the folder ``out``; taken from there where it is done already.

    An interrupted training saves and gives the signal's number; the same call goes on. Raises ``ValueError`` where no
    molecule can be written in SELFIES, or ``out`` holds a training on other molecules or with other settings.
    """
    out, settings = Path(out), settings or AutoencoderSettings()
    told = {"settings": settings.model_dump(mode="json"), "molecules": len(smiles), "data": digest_of(smiles)}
    if (out / f"{KIND}.json").is_file():
        codec = Codec.load(out)
        _same(out, {key: codec.info.get(key) for key in told}, told)
        return codec
    with RunLock(out):
        store, tracker = CheckpointStore(out / "checkpoints"), Tracker(out, quiet=quiet)
        found = store.load_latest()
        if found is not None:
            _same(out, found.shared["told"], told)
        symbols = symbols_of(smiles, processes)
        good = [i for i, s in enumerate(symbols) if not isinstance(s, ValueError)]
        if len(good) < 10:
            reason = next((str(s) for s in symbols if isinstance(s, ValueError)), "there are too few")
            raise ValueError(f"{len(good)} of {len(smiles)} molecules can be trained on, 10 are needed: {reason}")
        alphabet = Alphabet.of(symbols[i] for i in good)
        rows = [alphabet.numbers(symbols[i]) for i in good]
        train, held = split(len(rows), settings.held_out, settings.seed)
        labels = labels_of([smiles[good[i]] for i in train], settings, processes)
        fit = Fit(settings, alphabet, [rows[i] for i in train], labels, device)
        tracker.say(
            f"autoencoder: {len(train):,} molecules, {len(held):,} held out, {len(alphabet) - 1} symbols, longest "
            f"{alphabet.length}, {sum(p.numel() for p in fit.named.values()):,} parameters"
        )
        if found is not None:
            fit.load(found.shared["fit"])
            tracker.cut(found.shared["metrics_position"])
            tracker.say(f"  goes on at step {fit.step:,}, from {found.path}")
        with Interrupts() as interrupts:
            _run(fit, store, tracker, told, alphabet.rows([rows[i] for i in held[:SEEN]]), interrupts, clock)
        if interrupts.signal is not None:
            tracker.say(f"stopped at step {fit.step:,}, saved in {out}; the same command goes on")
            return interrupts.signal
        codec = _finished(fit, alphabet, {**told, "excluded": len(smiles) - len(good)})
        texts = [smiles[i] for i in good]
        codec.remember(texts, rows)
        report = reconstruction(codec, [rows[i] for i in held], [texts[i] for i in held])
        codec.info |= {"reconstruction": report}
        codec.save(out)
        write_json(out / "reconstruction.json", codec.report())
        tracker.say(
            f"autoencoder: {report['exact']:.1%} of {report['n']:,} held-out molecules come back exactly, "
            f"mean Tanimoto {report['tanimoto']:.3f}, validity {report['validity']:.1%}"
        )
        tracker.say(f"  {fit.step:,} steps, {fit.seconds:.0f} s")
    return codec


@torch.inference_mode()
def exact_tokens(network: Autoencoder, tokens: Tensor) -> float:
    """The share of rows (n, T) that come back token by token; ``reconstruction`` compares molecules, and finds more."""
    found = network.eval().decode(network.encode(tokens))[:, : tokens.shape[1]].to(tokens)
    network.train()
    return float((found == tokens).all(1).float().mean())


def _run(fit: Fit, store: CheckpointStore, tracker: Tracker, told: dict, seen: Tensor, interrupts, clock) -> None:
    """Steps until the budget is spent or a signal comes; a checkpoint every minute and at the end.

    Every 500 steps the held-out rows ``seen`` (n, T) are decoded: ``held_out_exact`` in the log.
    """
    before = saved = clock()

    def save() -> None:
        store.save(fit.step, {"told": told, "fit": fit.state(), "metrics_position": tracker.position})

    fit.network.train()
    tracker.start("autoencoder", fit.settings.steps or 1000, 0)
    while fit.share < 1 and interrupts.signal is None:
        row = fit.advance()
        now = clock()
        fit.seconds, before = fit.seconds + now - before, now
        tracker.advance() if fit.settings.steps else None
        if fit.step % LOG_EVERY == 0 or fit.share >= 1:
            shown = fit.step % (10 * LOG_EVERY) == 0 or fit.share >= 1
            exact = {"held_out_exact": exact_tokens(fit.network, seen.to(fit.device))} if shown else {}
            tracker.log({"stage": "autoencoder", **row, **exact, "spent_seconds": fit.seconds})
            if shown:
                tracker.say(
                    f"autoencoder step {fit.step:,}  loss {row['loss']:.4f}  "
                    f"held out, exact {exact['held_out_exact']:.1%}  {fit.seconds:.0f} s"
                )
        if now - saved > SAVE_EVERY:
            save()
            saved = now
    save()
    tracker.finish()


@torch.inference_mode()
def _finished(fit: Fit, alphabet: Alphabet, info: dict) -> Codec:
    """The codec with the whitening of the training codes."""
    network = fit.network.cpu().eval()
    z = torch.cat([network.encode(part) for part in fit.tokens.split(CHUNK)])
    return Codec(network, alphabet, Whitening.of(z), {**info, "steps": fit.step, "seconds": fit.seconds})


def _same(out: Path, before: dict, now: dict) -> None:
    """A folder belongs to one training."""
    changed = [key for key in now if encode_json(before.get(key), key) != encode_json(now[key], key)]
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)} there, {now[key]} here" for key in changed)
        raise ValueError(f"{out} holds an autoencoder of another training ({shown}). Give another folder")
