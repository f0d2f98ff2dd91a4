"""Checkpoints whose files are damaged, swapped or foreign are refused by name, or loaded right; no text is run.

Honest damage leaves the digests as they were saved. Forged damage is what someone does who can write the folder:
digests fit, and what is loaded may be wrong, but nothing may be run and nothing may crash.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import resource
import shutil
import signal
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from checkpoint_checks import all_values, assert_equal, build

from moeops.distributed import load_checkpoint, merge_checkpoint, read_extra, save_checkpoint
from moeops.distributed.checkpoint import files
from processes import Ranks, launch, start_rank

ALONE = Ranks(0, 1, "cpu")
RANKS = 2  # that save
SECONDS = 20  # for one case
MEMORY = (
    2 << 30
)  # bytes that a case may ask for: a size that a file makes up must not stop the machine
STEPS = (1, 2)  # of the two checkpoints; the second is the one that is damaged
JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 1 << 40, 1 << 70, 0.5, float("inf")),
    *("", "x", "../../etc/passwd", "/dev/zero", "float32", "load", [], [-1], [[]], {}, {"a": 1}),
)


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Place(NamedTuple):
    """A copy of the checkpoints that a case may change.

    Attributes:
        path: what is loaded: a folder, or a merged file.
        other: the checkpoint of another step, of the same form.
        mark: what a bomb makes.
    """

    path: Path
    other: Path
    mark: Path

    @staticmethod
    def _files(path: Path) -> list[Path]:
        return sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]

    def one(self, rng: Random) -> Path:
        """A file of the checkpoint."""
        return rng.choice(self._files(self.path))

    def two(self, rng: Random) -> tuple[Path, Path]:
        """A file of the checkpoint, and another file of it or of the other one."""
        first = self.one(rng)
        rest = [f for f in self._files(self.path) + self._files(self.other) if f != first]
        return first, rng.choice(rest)


# --- honest damage -------------------------------------------------------------------------------------


def flip_bits(place: Place, rng: Random) -> None:
    """Some bits of a file."""
    file = place.one(rng)
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(place: Place, rng: Random) -> None:
    """The end of a file is missing, or all of it."""
    file = place.one(rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice((0, 1, len(data) - 1, rng.randrange(len(data))))])


def lengthen(place: Place, rng: Random) -> None:
    """A file has more than it should, at the end or at the start."""
    file = place.one(rng)
    data, more = file.read_bytes(), rng.randbytes(rng.choice((1, 100, 4096)))
    file.write_bytes(data + more if rng.random() < 0.5 else more + data)


def overwrite(place: Place, rng: Random) -> None:
    """A block of zeros or of noise, as a disk leaves it."""
    file = place.one(rng)
    data = bytearray(file.read_bytes())
    start, length = rng.randrange(len(data)), rng.choice((1, 16, 512, 4096))
    block = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    data[start : start + length] = block[: len(data) - start]
    file.write_bytes(data)


def remove(place: Place, rng: Random) -> None:
    """A file is gone."""
    place.one(rng).unlink()


def put_folder(place: Place, rng: Random) -> None:
    """A folder is where a file was."""
    file = place.one(rng)
    file.unlink()
    file.mkdir()


def swap(place: Place, rng: Random) -> None:
    """Two files have each other's names."""
    first, second = place.two(rng)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def put_foreign(place: Place, rng: Random) -> None:
    """Another program's file: pickles that would run something, archives, text."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("archive/data.pkl", pickle.dumps(Bomb(place.mark)))
        written.writestr("archive/version", "3\n")
    place.one(rng).write_bytes(
        rng.choice(
            (
                pickle.dumps(Bomb(place.mark), protocol=rng.choice((0, 2, 5))),
                saved_by_torch(Bomb(place.mark)),
                saved_by_torch({"format": files.FORMAT, "version": 1, "model": Bomb(place.mark)}),
                saved_by_torch(Bomb(place.mark), _use_new_zipfile_serialization=False),
                saved_by_torch({"weight": torch.zeros(3)}),
                archive.getvalue(),
                b'{"sha256": "", "contents": {}}',
                rng.randbytes(1000),
            )
        )
    )


# --- forged damage -------------------------------------------------------------------------------------


def forge(place: Place, rng: Random) -> None:
    """Files that fit their digests: data of noise or bombs, or an index that says something else."""
    if place.path.is_file():
        forge_merged(place, rng)
        return
    index = json.loads((place.path / files.INDEX).read_text())["contents"]
    data = place.path / index["folder"]
    name = rng.choice(sorted(index["files"]))
    how = rng.choice(("damaged data", "bomb", "index", "index"))
    if how == "damaged data":
        damage = rng.choice((flip_bits, cut, lengthen, overwrite))
        damage(Place(data / name, place.other, place.mark), rng)
    if how == "bomb":
        bomb = rng.choice(
            (saved_by_torch(Bomb(place.mark)), pickle.dumps(Bomb(place.mark), protocol=2))
        )
        (data / name).write_bytes(bomb)
        entries = [c for t in index["tensors"].values() for c in t["chunks"]]
        entry = rng.choice([*entries, *index["objects"].values()])
        entry.update(file=name, start=0, length=len(bomb))
    index["files"][name] = files.digest_of(data / name)
    if how == "index":
        change_value(index, rng)
    try:
        files.write_index(place.path, index)
    except (KeyError, TypeError, OSError):  # it has no folder any more
        text = json.dumps(index, sort_keys=True)
        digest = files.hashlib.sha256(text.encode()).hexdigest()
        whole = f'{{"sha256": "{digest}", "contents": {text}}}\n'
        (place.path / files.INDEX).write_text(whole)


def forge_merged(place: Place, rng: Random) -> None:
    """A merged file that says something else in one place, with checksums that fit."""
    merged = torch.load(place.path, weights_only=True)
    change_value(merged, rng, Bomb(place.mark))
    torch.save(merged, place.path)


def change_value(tree: Any, rng: Random, *more: Any) -> None:
    """Replace, remove or rename something inside of nested dicts and lists."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        inside = tree[key]
        if isinstance(inside, (dict, list)) and inside and rng.random() < 0.8:
            tree = inside
            continue
        how = rng.random()
        if how < 0.2:
            del tree[key]
        elif how < 0.3 and isinstance(tree, dict):
            tree["x"] = tree.pop(key)
        else:
            tree[key] = rng.choice((*JUNK, *more))
        return


def saved_by_torch(value: object, **options: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data, **options)
    return data.getvalue()


HONEST = {
    f.__name__: f
    for f in (flip_bits, cut, lengthen, overwrite, remove, put_folder, swap, put_foreign)
}
DAMAGES = {**HONEST, "forge": forge}
SHARES = dict.fromkeys(DAMAGES, 1) | {"flip_bits": 3, "put_foreign": 2, "forge": 5}
READERS = {"load": 4, "extra": 1, "merge": 1}


class Case(NamedTuple):
    """What is done to which checkpoint, and who reads it then."""

    number: int
    damage: str
    form: str  # "folder" or "merged"
    reader: str

    @classmethod
    def draw(cls, number: int) -> Case:
        """The case of a number."""
        rng = Random(number)
        damage = rng.choices(list(SHARES), list(SHARES.values()))[0]
        form = rng.choice(("folder", "folder", "merged"))
        reader = rng.choices(list(READERS), list(READERS.values()))[0]
        return cls(
            number, damage, form, "load" if form == "merged" and reader == "merge" else reader
        )


class Truth(NamedTuple):
    """A fresh model and optimizer for each case, and what each checkpoint holds."""

    net: Any
    optimizer: Any
    before: dict[str, object]
    values: dict[int, dict[str, object]]


def read(case: Case, place: Place, truth: Truth) -> str:
    """Read a damaged checkpoint; say how that ended, or raise AssertionError."""
    op = {"load": "load_checkpoint", "extra": "read_extra", "merge": "merge_checkpoint"}
    out = place.path.parent / "out.pt"
    names = {op[case.reader]: place.path}
    try:
        if case.reader == "load":
            extra = load_checkpoint(place.path, truth.net, truth.optimizer)
        elif case.reader == "extra":
            extra = read_extra(place.path)
        else:
            merge_checkpoint(place.path, out)
            names["load_checkpoint"] = out
            extra = load_checkpoint(out, truth.net, truth.optimizer)
    except (ValueError, RuntimeError, FileNotFoundError) as err:
        text = str(err)
        assert any(
            text.startswith(f"{op}: ") and str(path) in text for op, path in names.items()
        ), text
        assert not place.mark.exists(), f"a pickle was run, and then: {text}"
        if case.damage in HONEST:
            assert_equal(all_values(truth.net, truth.optimizer), truth.before)
        return "refused"
    assert not place.mark.exists(), "a pickle was run"
    if case.damage == "forge":
        return "loaded"
    assert extra["step"] in STEPS
    if case.reader != "extra":
        assert_equal(all_values(truth.net, truth.optimizer), truth.values[extra["step"]])
    # The other checkpoint in the place of the first one is a checkpoint too.
    assert extra["step"] == STEPS[1] or (case.damage == "swap" and case.form == "merged")
    return "loaded right"


# --- running cases ---------------------------------------------------------------------------------------


def run(first: int, cases: int, folder: Path, log: Callable[[str], None] = print) -> list[str]:
    """Play cases from number ``first`` on; the text of those that failed."""
    report = folder / "report.json"
    limit = 60 + cases * SECONDS
    save_all(folder)
    codes = launch(_play_all, (first, cases, str(folder)), 1, limit)
    assert codes == [0], f"the process that plays the cases ended with {codes}"
    found = json.loads(report.read_text())
    log(f"{cases} mutations: {found['outcomes']}")
    return found["failures"]


def save_all(folder: Path) -> None:
    """Checkpoints of two steps, by a job of two ranks, and both as merged files."""
    codes = launch(_save, (str(folder),), RANKS, 240)
    assert codes == [0] * RANKS
    for step in STEPS:
        merge_checkpoint(folder / f"folder{step}", folder / f"merged{step}")


def _save(rank: int, folder: str) -> None:
    ranks = start_rank(rank, RANKS, "gloo", folder, 120)
    for step in STEPS:
        extra = {"step": step, "random": torch.arange(5)}
        save_checkpoint(Path(folder, f"folder{step}"), *build(ranks, steps=step), extra)
    torch.distributed.barrier()
    os._exit(0)


def _play_all(_: int, first: int, cases: int, folder: str) -> None:
    """Fork a process for each case: this one has no threads, and all that they need."""
    torch.set_num_threads(1)
    net, optimizer = build(ALONE)
    truth = Truth(net, optimizer, snapshot(net, optimizer), {})
    for step in STEPS:
        truth.values[step] = snapshot(*build(ALONE, steps=step))
    failures: list[str] = []
    outcomes: collections.Counter = collections.Counter()
    for number in range(first, first + cases):
        case = Case.draw(number)
        outcome = play(case, Path(folder), truth)
        if outcome.startswith(("refused", "loaded")):
            outcomes[outcome] += 1
            outcomes[case.damage] += 1
        else:
            failures.append(f"{case}: {outcome}")
    report = {"outcomes": dict(outcomes), "failures": failures}
    (Path(folder) / "report.json").write_text(json.dumps(report))
    os._exit(0)


def snapshot(net, optimizer) -> dict[str, object]:
    """Values of model and optimizer that stay as they are."""
    values = all_values(net, optimizer)
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def play(case: Case, folder: Path, truth: Truth) -> str:
    """Damage a copy of the checkpoint and read it, in a process of its own."""
    own = folder / f"case{case.number}"
    own.mkdir()
    names = [f"{case.form}{step}" for step in STEPS]
    place = Place(own / "saved", own / "other", own / "mark")
    for name, target in zip(reversed(names), place[:2], strict=True):
        copy = shutil.copytree if case.form == "folder" else shutil.copy
        copy(folder / name, target)
    DAMAGES[case.damage](place, Random(case.number + 1))
    answer, writer = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "no outcome"
        try:
            signal.alarm(SECONDS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            outcome = read(case, place, truth)
        except BaseException:
            outcome = traceback.format_exc()
        finally:
            os.write(writer, outcome.encode()[-30_000:])
            os._exit(0)
    os.close(writer)
    with os.fdopen(answer) as stream:
        outcome = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if outcome.startswith(("refused", "loaded")):
        shutil.rmtree(own)
    return outcome if code == 0 else f"ended with {code}"
