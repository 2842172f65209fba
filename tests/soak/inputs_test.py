"""Bad inputs, generated: damaged files and hostile flags. One line answers each, or none.

`SOAK_INPUTS` of them, from `SOAK_SEED` on; by default 50 from 0. If `SOAK_INPUT_MINUTES` is
given, as many as fit. A verdict is

- refused: status 1, and one line that begins with "error: " beside warnings; or the page of
  dynamical-label says such a line, and goes on;
- harmless: status 0, where a file was set aside and made again, say, or still means something;
- lost: something is gone that a person or a program had written;
- wrong: anything else, such as a traceback, or more lines than one.

dynamical-label is visited as `visits.Visit` says; half of its files are damaged while it runs.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter, defaultdict

import filelock
import numpy as np
import pytest
import uvicorn
import visits
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import dynamical_jax as dj
from dynamical_jax.programs import binary, select
from dynamical_jax.programs import label as label_program
from experiments import active_learning, fig4_approximation_ratio, report

COUNT = int(os.environ.get("SOAK_INPUTS", 50))
MINUTES = float(os.environ.get("SOAK_INPUT_MINUTES", "inf"))
SEED = int(os.environ.get("SOAK_SEED", 0))
PROGRAMS = {
    "select": select,
    "label": label_program,
    "active_learning": active_learning,
    "report": report,
    "fig4": fig4_approximation_ratio,
}
SECONDS = 300  # That one may take, on a machine with much else to do.


def truncate(data, generator):
    return data[: generator.integers(len(data))] if data else data


def flip_bits(data, generator):
    data = bytearray(data)
    for _ in range(generator.integers(1, 6)):
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
    return bytes(data)


def put_in(*texts):
    def damage(data, generator):
        place = generator.integers(len(data) + 1)
        return data[:place] + texts[generator.integers(len(texts))] + data[place:]

    return damage


def replace_number(data, generator):
    """A number becomes something else, where there is one."""
    places = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    if not places:
        return data[::-1]
    place = places[generator.integers(len(places))]
    others = (b"NaN", b"-1", b"1e999", b"null", b'"x"', b"[]", b"{}", b"9" * 400, b"0.5")
    return data[:place] + others[generator.integers(len(others))] + data[place + 1 :]


def shuffle_lines(data, generator):
    lines = data.splitlines(keepends=True)
    return b"".join(lines[i] for i in generator.integers(0, len(lines), len(lines)))


DAMAGES = {
    "truncated": truncate,
    "empty": lambda data, generator: b"",
    "bits flipped": flip_bits,
    "random bytes": lambda data, generator: generator.bytes(generator.integers(1, 2000)),
    "not UTF-8": put_in(b"\xff\xfe", b"\xc3(", b"\x80"),
    "control characters": put_in(b"\x00", b"\x1b[2J", b"\x85", b"\r"),
    "wrong type": replace_number,
    "quotes": put_in(b'"', b'""', b"'", b",", b"\n", b"{", b"]"),
    "nested": lambda data, generator: b"[" * 100_000,
    "lines repeated": shuffle_lines,
    "long": lambda data, generator: data + b"x" * 300_000,
    "directory": None,
    "dangling link": None,
    "circular link": None,
    "missing": None,
}


@contextlib.contextmanager
def held(lock):
    """Another process holds a lock."""
    lock.parent.mkdir(exist_ok=True)
    with filelock.FileLock(lock):
        yield


@contextlib.contextmanager
def permitted(folder, mode):
    """A folder that may not be written to, or read, by anyone but the superuser: become nobody."""
    nobody, us = 65534, os.geteuid()
    if us == 0:  # All of the trial is nobody's.
        trial = pathlib.Path.cwd()
        for path in (trial, *trial.rglob("*")):
            os.chown(path, nobody, nobody, follow_symlinks=False)
    folder.chmod(mode)
    try:
        if us == 0:
            os.setegid(nobody)
            os.seteuid(nobody)
        yield
    finally:
        if us == 0:
            os.seteuid(0)
            os.setegid(0)
        folder.chmod(0o700)


SURROUNDINGS = {
    "lock: held": lambda path: held(path),
    "folder: not to be written": lambda path: permitted(path, 0o500),
    "folder: not to be read": lambda path: permitted(path, 0o300),
    "folder: closed": lambda path: permitted(path, 0o000),
}


def damage(path, how, generator):
    """Damages a file, or puts something else in its place."""
    if DAMAGES[how] is not None:
        path.write_bytes(DAMAGES[how](path.read_bytes(), generator))
        return
    path.unlink()
    if how == "directory":
        path.mkdir()
        (path / "inside").write_text("")
    elif how == "dangling link":
        path.symlink_to("nowhere")
    elif how == "circular link":
        path.symlink_to(path.name)


WHOLE_NUMBERS = ("-1", "0", "1000000000000", "9223372036854775808", "-" + "9" * 30, "1e3", "", "x")
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e308", "1e-320", "", "x")
TEXTS = (
    "",
    " ",
    "/dev/null",
    "/dev/full",
    "/proc/self/mem",
    "nowhere/x",
    "a" * 5000,
    "ü\u2028",
    "..",
)
LISTS = ("", ",", "a,a", "random,random", "random,,margin", "0,-1", "nan", "9" * 5000, "inf")


def hostile_flag(program, generator):
    """Returns a flag of a program, or of another one, with a value that is probably wrong."""
    ours = [
        flag
        for name in sorted(flags.FLAGS)
        for flag in [flags.FLAGS[name]]
        if name in dj_flags(program) or generator.random() < 0.02
    ]
    flag = ours[generator.integers(len(ours))]
    kind = flag.flag_type()
    if kind == "bool":
        values = ("maybe", "")
    elif kind == "int":
        values = WHOLE_NUMBERS
    elif kind == "float":
        values = NUMBERS
    elif "list" in kind:
        values = LISTS
    else:
        values = TEXTS
    return f"--{flag.name}={values[generator.integers(len(values))]}"


def dj_flags(program):
    return {flag.name for flag in flags.FLAGS.get_key_flags_for_module(program)}


class Case:
    """A folder in which all is well, for one program."""

    def __init__(self, root, name, cache_dir, make=None):
        self.folder, self.name, self.program = root / name, name, PROGRAMS[name]
        # Where trials are made, too: logs hold the path of the folder of images.
        folder = root / "trial"
        folder.mkdir()
        os.chdir(folder)
        getattr(self, f"_make_{make or name}")(folder, cache_dir)
        folder.rename(self.folder)

    def _photos(self, folder):
        generator = np.random.default_rng(0)
        for number in range(12):
            path = folder / "photos" / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(path)
        return [f"{'ab'[number % 2]}/{number}.png" for number in range(12)]

    def _make_select(self, folder, cache_dir, program=select):
        paths = self._photos(folder)
        labels = "".join(f"{path},{path[0]}\n" for path in paths[:4])
        (folder / "labels.csv").write_text(f"path,label\n{labels}")
        self.arguments = ["--images=photos", "--batch_size=2", "--max_epochs=1"]
        # Its own cache, which is damaged, too.
        self.arguments += ["--cache_dir=cache"]
        status, errors = self.run(program=program)
        assert status == 0, errors
        filled = (folder / "to_label.csv").read_text().splitlines()
        rows = [line.replace(",,", f",{line[0]},", 1) for line in filled[1:]]
        (folder / "to_label.csv").write_text("\n".join([filled[0], *rows]) + "\n")

    def _make_page(self, folder, cache_dir):
        """Like `_make_label`, but there is no model."""
        paths = self._photos(folder)
        labels = "".join(f"{path},{path[0]}\n" for path in paths[:4])
        (folder / "labels.csv").write_text(f"path,label\n{labels}")
        rows = "".join(f"{path},,a,0.9,1,1\n" for path in paths[5:8])
        header = "path,label,predicted,confidence,score,rank"
        (folder / "to_label.csv").write_text(f"{header}\n{paths[4]},a,a,0.9,1,1\n{rows}")
        (folder / "to_label.jsonl").write_text(json.dumps({"folder": f"{folder}/photos"}) + "\n")
        self._add_answers(folder)

    def _make_label(self, folder, cache_dir):
        self._make_select(folder, cache_dir)
        self._add_answers(folder)

    def _add_answers(self, folder):
        answer = {"path": "a/0.png", "what": "label", "label": "a", "kind": "random", "round": 0}
        answer |= {"predicted": "", "confidence": None, "who": "me", "client": "1", "time": 1.5}
        log = [{"class": "a"}, {"answer": {**answer, "group": 1}}]
        (folder / "labels.answers.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
        self.arguments = ["photos", "--batch_size=2", "--max_epochs=1", "--cache_dir=cache"]

    def _make_active_learning(self, folder, cache_dir, program=active_learning):
        x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
        np.savez(folder / "own.npz", embedding=x, label=np.arange(60) % 3)
        self.arguments = ["--dataset=own.npz", "--strategies=random", "--num_seeds=1"]
        self.arguments += ["--initial_size=6", "--batch_size=3", "--max_epochs=1", "--num_rounds=1"]
        self.arguments += ["--output_dir=run", f"--cache_dir={cache_dir}"]
        status, errors = self.run(program=program)
        assert status == 0, errors
        lines = (folder / "run" / "rounds.jsonl").read_text().splitlines(keepends=True)
        (folder / "run" / "rounds.jsonl").write_text(lines[0])  # There is something left to do.

    def _make_report(self, folder, cache_dir):
        self._make_active_learning(folder, cache_dir)
        self.arguments = ["run"]

    def _make_fig4(self, folder, cache_dir):
        self._make_active_learning(folder, cache_dir)
        self.arguments = ["--dataset=own.npz", "--initial_size=6", "--ratio_sizes=2,4"]
        self.arguments += ["--num_queries=2", "--every=1", "--max_epochs=1", "--output_dir=figure"]
        self.arguments += [f"--cache_dir={cache_dir}"]

    def files(self, folder):
        return sorted(
            path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
        )

    def locks(self):
        """The files by which programs keep others away."""
        return (
            ("to_label.lock", ".labels.csv.lock")
            if self.name in ("select", "label")
            else ("run/.lock",)
        )

    def run(self, *more, program=None):
        """Returns the status, and what was printed to standard error; in the present folder."""
        errors = []
        with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", _Lines(errors))
            patch.setattr("sys.stdout", _Lines([]))
            try:
                argv = binary.parse_flags([self.name, *self.arguments, *more])
                status = (program or self.program).main(argv)
            except SystemExit as ended:
                status = ended.code
        return status or 0, errors


class _Lines:
    def __init__(self, lines):
        self._lines, self._text = lines, ""

    def write(self, text):
        *whole, self._text = (self._text + text).split("\n")
        self._lines += whole

    def flush(self):
        pass

    def isatty(self):
        return False  # Else there were progress bars.


def kind_of(path):
    """What sort of file it is, for the table."""
    name = path.name
    if "checkpoint" in str(path):
        return "checkpoint: manifest" if name.endswith(".json") else "checkpoint: arrays"
    if "cache" in path.parts:
        return f"cache: {path.suffix}"
    return "image" if name.endswith(".png") and "photos" in path.parts else name


def group_of(sort):
    """The column of a sort of file in the table."""
    if sort in ("labels.csv", "to_label.csv"):
        return "tables"
    if sort.endswith((".jsonl", "flags.json", "manifest")):
        return "records, logs, manifests"
    if sort.startswith("cache"):
        return "caches"
    return sort if sort in ("flag", "surroundings", "image", "checkpoint: arrays") else "others"


def work_of(folder, without):
    """What must not be lost: labels and records, as lines, but those of a file that is damaged."""
    kept = set()
    for name in ("labels.csv", "run/rounds.jsonl", "labels.answers.jsonl", "to_label.jsonl"):
        path = folder / name
        if path != without and path.is_file():
            kept |= {(name, line) for line in path.read_bytes().splitlines()}
    return kept


def labels_of(table):
    """The labels that a table holds; None if it cannot be read."""
    try:
        return set(dj.labeling.read_labels(table, "photos").by_path.items())
    except dj.UserError:
        return None


class Harm:
    """What is done to a file, and what there is to be kept after that."""

    def __init__(self, folder, target, how, generator):
        self.folder, self.target = folder, target
        self._how, self._generator = how, generator
        self._look()

    def __call__(self):
        damage(self.target, self._how, self._generator)
        self._look()

    def _look(self):
        self._kept = work_of(self.folder, self.target)
        self._bytes = self._read()
        self._labels = labels_of(self.folder / "labels.csv")

    def _read(self):
        return self.target.read_bytes() if self.target and self.target.is_file() else b""

    def has_lost(self, refused):
        """Whether something is gone; what was `refused` is as it was, for a person to look at."""
        if not self._kept <= work_of(self.folder, self.target):
            return True
        if self.target and self.target.name in ("labels.csv", "rounds.jsonl") and refused:
            whole = self._bytes[: self._bytes.rfind(b"\n") + 1]  # A line without an end is none.
            if not self._read().startswith(whole):
                return True
        labels = labels_of(self.folder / "labels.csv")
        return self._labels is not None and (labels is None or not self._labels <= labels)


def alarm(*_):
    raise TimeoutError(f"longer than {SECONDS} s")


def judge(case, harm, visit, around, *more):
    """Runs a program in a damaged folder; returns the verdict, and the lines that were said."""
    os.chdir(harm.folder)
    signal.alarm(SECONDS)
    try:
        with around, pytest.MonkeyPatch.context() as patch:
            patch.setattr(uvicorn.Server, "run", lambda server, sockets: visit(server))
            status, errors = case.run(*more)
        lines = [line for line in errors if line and not line.startswith("warning: ")]
        if status == 130 and lines == [label_program.STOPPED]:
            # Somebody labeled; where the page refused, it said why.
            lines = [f"error: {why}" for why in (*visit.refusals, visit.error) if why]
            status = int(bool(lines))
        elif status and len(lines) > 1 and case.name not in ("active_learning", "report"):
            raise AssertionError(f"status {status} and {len(lines)} lines")  # Else one a run.
        elif status and not lines:
            raise AssertionError(f"status {status}, and not a word")
        if status and not all(line.startswith("error: ") for line in lines):
            raise AssertionError(f"status {status}: {lines}")
        verdict = "refused" if status else "harmless"
        return ("lost", lines) if harm.has_lost(verdict == "refused") else (verdict, lines)
    except BaseException:
        if isinstance(traceback.sys.exc_info()[1], KeyboardInterrupt):
            raise
        return "wrong", traceback.format_exc().splitlines()[-12:]
    finally:
        signal.alarm(0)
        os.chdir(harm.folder.parent)


@pytest.fixture
def root(monkeypatch):
    """A folder that anybody can enter, unlike pytest's; what only takes time is left out."""
    monkeypatch.setattr("webbrowser.open", lambda address: None)
    monkeypatch.setattr(dj.labeling.proposal, "contact_sheet", lambda *_: None)
    monkeypatch.setattr(dj.plotting, "accuracy", lambda rounds, path: None)
    monkeypatch.setattr(dj.plotting, "approximation_ratio", lambda points, path: None)
    monkeypatch.setattr(dj.labeling.tables, "LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(label_program, "leave", lambda session: session.close(float(SECONDS)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["soak"])
    before = signal.signal(signal.SIGALRM, alarm)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        yield pathlib.Path(folder)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_bad_inputs(root, cache_dir):
    cases = [Case(root, name, cache_dir) for name in PROGRAMS]
    verdicts, examples, table = Counter(), defaultdict(list), defaultdict(Counter)
    end = time.monotonic() + 60 * MINUTES
    for number in range(SEED, SEED + COUNT):
        if time.monotonic() > end:
            break
        generator = np.random.default_rng(number)
        case = cases[generator.integers(len(cases))]
        folder = root / "trial"
        shutil.copytree(case.folder, folder, symlinks=True)
        more, target, around = [], None, contextlib.nullcontext()
        drawn = generator.random()
        if drawn < 0.35:
            more = [hostile_flag(case.program, generator)]
            what = ("flag", more[0].partition("=")[2][:12] or "(empty)")
        elif drawn < 0.45:
            how = sorted(SURROUNDINGS)[generator.integers(len(SURROUNDINGS))]
            places = sorted(path for path in (folder, *folder.rglob("*")) if path.is_dir())
            if how.startswith("lock"):
                places = [folder / lock for lock in case.locks()]
            place = places[generator.integers(len(places))]
            what = ("surroundings", f"{how}, {place.relative_to(folder)}")
            around = SURROUNDINGS[how](place)
        else:
            sorts = defaultdict(list)
            for path in case.files(folder):
                sorts[kind_of(path.relative_to(folder))].append(path)
            sort = sorted(sorts)[generator.integers(len(sorts))]
            target = sorts[sort][generator.integers(len(sorts[sort]))]
            what = (sort, list(DAMAGES)[generator.integers(len(DAMAGES))])
            if target.stat().st_size == 0:
                what = (sort, "random bytes")
        harm = Harm(folder, target, what[1], generator)
        visit = visits.Visit("labels.csv", "photos", SECONDS, review=generator.random() < 0.1)
        if target and case.name == "label" and generator.random() < 0.5:
            what = (what[0], f"{what[1]} (running)")
            visit.damage = harm
        elif target:
            harm()
        verdict, lines = judge(case, harm, visit, around, *more)
        verdicts[verdict] += 1
        how = what[1].removesuffix(" (running)").partition(", ")[0]
        table["" if more else how][group_of(what[0]), verdict] += 1
        print(f"seed {number}, {case.name}, {': '.join(what)}: {verdict}", flush=True)
        if verdict in ("lost", "wrong"):
            print(*more, *lines, sep="\n  ")
        elif verdict == "refused" and len(examples[what[0]]) < 3:
            examples[what[0]].append(f"{case.name}, {what[1]} (seed {number}): {lines[0][:200]}")
        shutil.rmtree(folder)
    print(f"\n{verdicts.total()} inputs from seed {SEED}: {dict(verdicts)}")
    groups = sorted({group for row in table.values() for group, _ in row})
    print("refused/harmless")
    print("|", *groups, sep=" | ", end=" |\n")
    print("| ---", *(["---:"] * len(groups)), sep=" | ", end=" |\n")
    for how, row in sorted(table.items()):
        cells = [f"{row[group, 'refused']}/{row[group, 'harmless']}" for group in groups]
        print(f"| {how}", *("" if cell == "0/0" else cell for cell in cells), sep=" | ", end=" |\n")
    for sort in sorted(examples):
        print(f"\n{sort}:", *examples[sort], sep="\n  ")
    assert not verdicts["wrong"] + verdicts["lost"]


def choose(folder, settings, is_open, report):
    """Takes the place of the model: everything is an a."""
    predicted = {
        folder.paths[row]: dj.labeling.Proposed(folder.paths[row], "a", 0.9, 1.0)
        for row in folder.unlabeled
    }
    wanted = [image for image in predicted.values() if is_open(image.path)]
    return dj.labeling.choosing.Chosen(wanted[: settings.batch_size], [], predicted, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_damage_to_what_label_keeps(root, cache_dir, monkeypatch):
    """Each file, damaged in each way, before the program begins and while it runs."""
    session = functools.partial(dj.labeling.Session, choose_next=choose)
    monkeypatch.setattr(dj.labeling, "Session", session)
    case = Case(root, "label", cache_dir, make="page")
    verdicts = defaultdict(list)
    for name in ("labels.csv", "to_label.csv", "labels.answers.jsonl", "to_label.jsonl"):
        for how in DAMAGES:
            for running in (False, True):
                folder = root / "trial"
                shutil.copytree(case.folder, folder)
                visit = visits.Visit("labels.csv", "photos", SECONDS)
                harm = Harm(folder, folder / name, how, np.random.default_rng(0))
                if running:
                    visit.damage = harm
                else:
                    harm()
                verdict, lines = judge(case, harm, visit, contextlib.nullcontext())
                verdicts[verdict].append((name, how, running))
                when = "running" if running else "before"
                print(f"{name}, {how}, {when}: {verdict}: {' '.join(lines[:1])[:150]}", flush=True)
                if verdict in ("lost", "wrong"):
                    print(*lines, sep="\n  ")
                shutil.rmtree(folder)
    print({verdict: len(played) for verdict, played in verdicts.items()})
    assert not verdicts["wrong"] + verdicts["lost"]
