"""Text as bytes: reading a corpus, holding out whole files, and batches that depend on the step alone."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lm.errors import UsageError

HELD_OUT_FRACTION = 0.05
SEPARATOR = (
    b"\0"  # between files; decodable text files hold no NUL, so the model sees where a file ends
)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text.

    Attributes:
        name: where the text is from.
        train: training bytes, ``[num_bytes]`` uint8.
        held_out: bytes of other files, ``[num_bytes]`` uint8.
        num_files: files read, training and held-out.
        fingerprint: hash of both texts; a checkpoint goes on with the text it began with.
    """

    name: str
    train: Tensor
    held_out: Tensor
    num_files: int
    fingerprint: str


def load_corpus(path: Path | None) -> Corpus:
    """Read ``path``, a file or a folder; None means the standard library of the running Python."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in root.rglob("*.py") if not _is_installed(f.relative_to(root))]
        name = f"the standard library of Python in {root}"
    elif path.is_file():
        root, files, name = path.parent, [path], str(path)
    elif path.is_dir():
        root, name = path, f"{path}/"
        files = [f for f in path.rglob("*") if f.is_file() and not _is_hidden(f.relative_to(root))]
    else:
        raise UsageError(
            f"--text must be a file or a folder that exists, got {path}. Check the path."
        )

    texts = {}
    for file in files:
        text = _read_text(file)
        if text:
            texts[file.relative_to(root).as_posix()] = text
    if not texts:
        raise UsageError(f"--text must hold UTF-8 text, got none in {name}. Pass another path.")
    train, held_out = _split(texts)
    return Corpus(
        name=name,
        train=_to_tensor(train),
        held_out=_to_tensor(held_out),
        num_files=len(texts),
        fingerprint=hashlib.sha256(train + b"\xff" + held_out).hexdigest(),
    )


def _is_installed(relative: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(relative.parts))


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read_text(file: Path) -> bytes:
    """Bytes of a UTF-8 file; empty for anything else, such as the test data of Python's own decoders."""
    try:
        data = file.read_bytes()
        data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    return b"" if SEPARATOR in data else data


def _split(texts: dict[str, bytes]) -> tuple[bytes, bytes]:
    """Hold out whole files by the hash of their names; of a single file, its end."""
    if len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - max(1, int(len(text) * HELD_OUT_FRACTION))
        return text[:cut], text[cut:]
    rank = {name: _hash_fraction(name) for name in sorted(texts)}
    held_out = {name for name, value in rank.items() if value < HELD_OUT_FRACTION}
    if not held_out or len(held_out) == len(texts):
        held_out = {min(rank, key=rank.__getitem__)}
    train_text = SEPARATOR.join(
        text for name, text in sorted(texts.items()) if name not in held_out
    )
    held_out_text = SEPARATOR.join(texts[name] for name in sorted(held_out))
    return train_text, held_out_text


def _hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _to_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def order0_entropy(text: Tensor) -> float:
    """Bits per byte of the best model that knows byte frequencies and nothing else."""
    counts = torch.bincount(text.long(), minlength=256).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum())


class Batches:
    """Random windows of the training text and a fixed set of windows of the held-out text.

    The batch of a step depends on seed and step alone, so a resumed run sees the data it would have seen.

    Args:
        corpus: the text.
        batch: windows per batch.
        context: bytes per window that the model reads; the targets are the same window one byte later.
        seed: of the data order.
        device: where batches go.
        rank: which part of every batch to return.
        num_ranks: parts of a batch, equal ones.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch: int,
        context: int,
        seed: int,
        device: torch.device,
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        for name, text in (("training", corpus.train), ("held-out", corpus.held_out)):
            if len(text) <= context:
                raise UsageError(
                    f"--text must give more than --context = {context} bytes of {name} text, got {len(text)} "
                    f"from {corpus.name}. Pass more text or lower --context."
                )
        self._corpus = corpus
        self._batch = batch
        self._context = context
        self._seed = seed
        self._device = device
        self._rank = rank
        self._num_ranks = num_ranks

    def train(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training step, each ``[batch / num_ranks, context]`` int64."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        text = self._corpus.train
        starts = torch.randint(len(text) - self._context, (self._batch,), generator=generator)
        return self._windows(text, starts)

    def held_out(self, num_batches: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets of evenly spaced held-out windows: the same ones at each call."""
        text = self._corpus.held_out
        num_windows = num_batches * self._batch
        starts = torch.linspace(0, len(text) - self._context - 1, num_windows).long()
        return [self._windows(text, part) for part in starts.split(self._batch)]

    def _windows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        starts = starts.chunk(self._num_ranks)[self._rank]
        window = torch.arange(self._context + 1)
        tokens = text[starts[:, None] + window].long()  # [batch / num_ranks, context + 1]
        tokens = tokens.to(self._device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
