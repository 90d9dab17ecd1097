"""Mutation testing of the guards: each is broken once in a copy of the repository, and the tests must notice.

    python -m tests.mutants                      # all of them: half an hour on one core
    python -m tests.mutants --only "CRC of checkpoints" "fsync of the file"
    python -m tests.mutants --list

A mutant that nobody notices is a guard without a test. tests/test_mutants.py checks that every text below still stands
exactly once in its file.
"""
import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 900  # of one run of the tests: a mutant that makes them hang is noticed too


class Mutant(NamedTuple):
    """A guard. file: where it stands. old, new: the text, and one that breaks it. tests: what should notice."""
    name: str
    file: str
    old: str
    new: str
    tests: tuple


CHECKPOINT, ENGINE, RUNS = ("tests/test_checkpoint.py",), ("tests/test_engine.py",), ("tests/test_runs.py",)
NO_DATA = ("tests/test_no_data.py",)
GUARDS = ("tests/test_guards.py",)  # for what no other test noticed
WEIGHTS, PRETRAINED = ("tests/test_weights.py", "tests/test_pretrained.py"), ("tests/test_pretrained.py",)
FILES, ERRORS, FAULTS = ("tests/test_files.py",), ("tests/test_errors.py",), ("tests/test_faults.py",)
IMAGES, LABELS, RANKS = ("tests/test_images.py",), ("tests/test_labels.py",), ("tests/test_distributed.py",)
ITEMS, SEG, CLS = ("tests/test_bad_items.py",), ("tests/test_data_seg.py",), ("tests/test_data_cls.py",)
RELIABILITY = ("tests/test_reliability.py",)
LOADER, FOLDS, BUILD = ("tests/test_loader.py",), ("tests/test_folds.py",), ("tests/test_build.py",)

MUTANTS = [
    # ---- checkpoints: written whole ----
    Mutant("fsync of the file", "utils/train/checkpoint.py", "                _sync(temporary)\n", "", CHECKPOINT),
    Mutant("fsync of the folder", "utils/train/checkpoint.py", "        _sync(path.parent)  # the rename itself\n", "",
           CHECKPOINT),
    Mutant("read back before the rename", "utils/train/checkpoint.py",
           "                tensors.check_records(temporary)\n", "",
           CHECKPOINT),
    Mutant("the previous checkpoint is kept", "utils/train/checkpoint.py", "if keep_previous and path.exists():",
           "if False:", CHECKPOINT),
    Mutant("the previous one is moved, not removed", "utils/train/checkpoint.py", 'os.replace(path, f"{path}.prev")',
           "os.unlink(path)", CHECKPOINT),
    Mutant("a folder that is gone is not made anew", "utils/train/checkpoint.py", "        os.stat(path.parent)",
           "        str(path.parent)", FAULTS),
    Mutant("an error of the disk is told", "utils/train/checkpoint.py",
           "raise error if isinstance(error, OSError) else OSError(str(error))", "raise error", CHECKPOINT),
    Mutant("last.pt is written after best.pt", "utils/train/engine.py", '    save()  # after the others',
           '    1  # after the others', FAULTS),

    # ---- checkpoints: read with suspicion ----
    Mutant("CRC of records", "utils/tensors.py", "archive.testzip() or ", "", (*CHECKPOINT, *WEIGHTS)),
    Mutant("nothing compressed", "utils/tensors.py", "entry.compress_type != zipfile.ZIP_STORED or ", "", RELIABILITY),
    Mutant("records that are folders", "utils/tensors.py", " or entry.external_attr & _FOLDER", "", CHECKPOINT),
    Mutant("names of records that stand twice", "utils/tensors.py", "len(set(names)) < len(names) or ", "",
           RELIABILITY),
    Mutant("records within records", "utils/tensors.py",
           "sum(entry.file_size for entry in entries) > os.path.getsize(path) or ",
           "", RELIABILITY),
    Mutant("the record of all records", "utils/tensors.py", "archive.read(name) != _described(archive)", "False",
           RELIABILITY),
    Mutant("an archive of torch", "utils/tensors.py", "not any(name.endswith(_PROGRAM) for name in names) or ",
           "False or ", CHECKPOINT),
    Mutant("what torch may call", "utils/tensors.py", "        if _REFUSED.fullmatch(name):\n", "        if False:\n",
           RELIABILITY),
    Mutant("lists in lists", "utils/tensors.py",
           "if count + len(todo) + len(value) > LARGEST or name.count(\".\") > DEEPEST:",
           "if False:", RELIABILITY),
    Mutant("the schema of headers", "utils/train/checkpoint.py", "if key in state and not _is(state[key], kind):",
           "if False:", RELIABILITY),
    Mutant("whole numbers of the schema", "utils/train/checkpoint.py", "type(value) is int and value in kind",
           "type(value) is int", RELIABILITY),
    Mutant("values of lists in the schema", "utils/train/checkpoint.py",
           "len(kind) in (1, len(value)) and all(\n                map(_is, value, kind * len(value)))",
           "len(kind) in (1, len(value))", RELIABILITY),
    Mutant("lengths of lists in the schema", "utils/train/checkpoint.py", "len(kind) in (1, len(value)) and all(",
           "all(", CHECKPOINT),
    Mutant("flags of a resumed run", "utils/train/args.py",
           "if not isinstance(value, TYPES.get(type(parser.get_default(flag)), TYPES[None])):",
           "if False:",
           RELIABILITY),
    Mutant("memory after shapes", "predict.py",
           "                checkpoint.load_weights(nets.build(state[\"arch\"]), state, path)\n",
           "                pass\n", RELIABILITY),
    Mutant("values of an input", "data/units.py",
           "            raise ValueError(\"the values of its input do not belong together\")\n", "            pass\n",
           RELIABILITY),
    Mutant("fallback to .prev", "utils/train/checkpoint.py", 'if not os.path.exists(f"{path}.prev"):', "if True:",
           CHECKPOINT),
    Mutant("the fallback is told", "utils/train/checkpoint.py",
           '        print(f"warning: {error}; going on from {path}.prev")\n', "", CHECKPOINT),
    Mutant("a regular file", "utils/tensors.py", "if not stat.S_ISREG(os.stat(path).st_mode):", "if False:",
           CHECKPOINT),
    Mutant("no code in files of tensors", "utils/tensors.py",
           'content = torch.load(file, map_location="cpu", weights_only=True)',
           'content = torch.load(file, map_location="cpu", weights_only=False)', (*CHECKPOINT, *WEIGHTS)),
    Mutant("modules only where they are asked for", "utils/tensors.py", "(file.name) if modules else []",
           "(file.name)", CHECKPOINT),
    Mutant("storages as large as their tensors", "utils/tensors.py",
           "if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():", "if False:", CHECKPOINT),
    Mutant("kinds of tensors", "utils/tensors.py", "tensor.layout is not torch.strided or tensor.is_quantized or "
           "tensor.device.type != \"cpu\" or \\\n            tensor.dtype not in _DTYPES", "False", RELIABILITY),
    Mutant("finite numbers at load", "utils/train/checkpoint.py", "        if not tensor.float().isfinite().all():",
           "        if False:",
           CHECKPOINT),
    Mutant("a checkpoint of this project", "utils/train/checkpoint.py",
           'if not {"task", "arch", "model"} <= state.keys():', "if False:",
           GUARDS),
    Mutant("one error for all damage", "utils/tensors.py", "        except Exception as error:  # zipfile",
           "        except ValueError as error:  # zipfile", CHECKPOINT),
    Mutant("names and shapes of weights", "utils/train/checkpoint.py", "    if differ:\n", "    if False:\n",
           CHECKPOINT),
    Mutant("a net's name leads nowhere else", "nets/__init__.py", ' and found.__module__ == f"nets.{module}"):', "):",
           BUILD),
    Mutant("a net's module is a name", "nets/__init__.py", " if module.isidentifier() else None", "", BUILD),

    # ---- numbers ----
    Mutant("finite numbers at save", "utils/train/state.py",
           "        self.finite &= torch.stack([tensor.isfinite().all().to(self.device) for _, tensor in "
           "tensors.walk(saved)]).all()\n", "", RELIABILITY),
    Mutant("finite loss", "utils/train/state.py", "        self.finite &= loss.detach().isfinite()\n", "", ENGINE),
    Mutant("finite gradients", "utils/train/state.py", "            self.finite &= norm.isfinite()\n",
           "            pass\n", GUARDS),
    Mutant("a scale that has fallen to nothing", "utils/train/state.py", "self.scaler.get_scale() < 1e-3", "False",
           ENGINE),
    Mutant("checked before the epoch's evaluation", "utils/train/engine.py", "    state.check()\n", "", ENGINE),
    Mutant("NaN is the lowest score", "utils/train/state.py",
           "return [-math.inf if math.isnan(score) else score for score in scores]", "return scores", ENGINE),
    Mutant("finite output in prediction", "utils/ops/decide.py", "    if not output.isfinite().all():",
           "    if False:", ("tests/test_predict_seg.py", "tests/test_predict_det.py")),

    # ---- resuming ----
    Mutant("steps per epoch of a resumed run", "utils/train/state.py",
           'if saved["steps_per_epoch"] != self.steps_per_epoch:', "if False:", ENGINE),
    Mutant("optimizer of a resumed run", "utils/train/state.py",
           'if saved["optimizer"].get("name") != type(self.optimizer).__name__:', "if False:", ENGINE),
    Mutant("shapes of moments", "utils/train/state.py",
           'raise ValueError("a moment has another shape than its weight")', "pass", RELIABILITY),
    Mutant("steps of a history", "utils/train/state.py", 'if not 0 <= saved["step"] - len(epochs)',
           'if False and 0 <= saved["step"] - len(epochs)', RELIABILITY),
    Mutant("numbers of a history", "utils/train/state.py", "epochs != [*range(1, len(epochs) + 1)]:", "False:",
           RELIABILITY),
    Mutant("what becomes infinite", "utils/train/checkpoint.py", "tensor.float().isfinite()", "tensor.isfinite()",
           CHECKPOINT),
    Mutant("finite values", "utils/train/checkpoint.py", "        return math.isfinite(value)\n", "        return True\n",
           CHECKPOINT),
    Mutant("a text that claims gigabytes", "utils/tensors.py",
           "            file = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))\n",
           "            pass\n", WEIGHTS),
    Mutant("a file of its own in every process", "data/images.py", "os.getpid(), threading.get_ident())", "0, 0)",
           IMAGES),
    Mutant("a file that was changed is opened anew", "data/images.py",
           "        yield _kept_open(path, os.stat(path).st_mtime_ns,", "        yield _kept_open(path, 0,", IMAGES),
    Mutant("the batch's random numbers", "utils/train/engine.py", "        torch.manual_seed(int(mixed[0]))\n", "",
           ENGINE),
    Mutant("only what can be resumed", "utils/train/runs.py", 'if not {"optimizer", "args"} <= saved.keys():',
           "if False:", RUNS),
    Mutant("lock of run folders", "utils/train/runs.py", "        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
           "", RUNS),
    Mutant("the lock stays until the end", "utils/train/runs.py", "    _locks.append(file)\n", "    file.close()\n",
           RUNS),
    Mutant("run folders are never overwritten", "utils/train/runs.py", "            path.mkdir(parents=True)\n",
           "            path.mkdir(parents=True, exist_ok=True)\n", RUNS),

    # ---- signals and ends ----
    Mutant("SIGTERM between two steps", "utils/train/dist.py", "        if number > 1:\n", "        if False:\n",
           ENGINE),
    Mutant("a signal in the validation", "utils/train/dist.py", "self.raises = world_size() == 1",
           "self.raises = False", (*ENGINE, *FAULTS)),
    Mutant("signals are held during a fork", "data/loader.py",
           "mask = signal.pthread_sigmask(signal.SIG_BLOCK, signums)",
           "mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())", (*LOADER, *FAULTS)),
    Mutant("held signals are raised after it", "data/loader.py", "            signal.raise_signal(signum)\n",
           "            pass\n", GUARDS),
    Mutant("a stopped run saves", "utils/train/engine.py",
           "            if state.saved != (state.step, state.epoch):\n                save()\n", "", FAULTS),
    Mutant("exit code of bad input", "utils/errors.py", "    code = 2\n", "    code = 1\n", ERRORS),
    Mutant("exit code of NaN", "utils/errors.py", "    code = 3\n", "    code = 2\n", ERRORS),
    Mutant("exit code of signals", "utils/errors.py", "self.code = 128 + signum", "self.code = signum", ERRORS),
    Mutant("exit code of a closed output", "utils/errors.py", 'return "", 141', 'return "", 1', ERRORS),
    Mutant("one line for memory", "utils/errors.py", 'or "out of memory" in text', "", ERRORS),
    Mutant("one line for dead workers", "utils/errors.py", 'text.startswith("DataLoader worker") or', "", ERRORS),
    Mutant("what steers a terminal", "utils/errors.py", "write(text.translate(STEERING))", "write(text)", RELIABILITY),
    Mutant("workers die with the script", "utils/errors.py", "        child.kill()\n", "        pass\n", ERRORS),
    Mutant("deaths of workers at the end", "utils/errors.py", "        except BaseException:  # raised by a handler",
           "        except KeyError:  # raised by a handler", ERRORS),
    Mutant("stuck workers", "data/loader.py", "return self._received(batches)",
           "return batches", FAULTS),
    Mutant("workers that an exception leaves", "data/loader.py", "        worker.kill()\n", "        pass\n",
           RELIABILITY),
    Mutant("stopped ranks", "utils/watchdog.py", "if idle[what] >= LOOKS * factor:", "if False:", (*FAULTS, *RANKS)),
    Mutant("signs of other ranks", "utils/watchdog.py", "_signs[f\"rank {other}\"] =", "_ =", RANKS),

    # ---- ranks ----
    Mutant("all ranks stop", "utils/train/dist.py", "number = any_rank(self.signum or number)",
           "number = self.signum or number", RANKS),
    Mutant("rank 0's error on every rank", "utils/train/runs.py", "            found = str(error)\n",
           "            raise\n", RANKS),
    Mutant("the restarted ranks' own store", "utils/train/dist.py", "    return dist.PrefixStore(name, store)\n",
           "    return store\n", RANKS),
    Mutant("what a lost rank means", "utils/errors.py", 'and any(word in trace for word in LOST)', "and False",
           (*ERRORS, *RANKS)),

    # ---- files ----
    Mutant("files appear whole", "utils/files.py",
           "            yield temporary\n            os.replace(temporary, path)\n", "            yield path\n",
           (*FILES, *CHECKPOINT)),
    Mutant("temporary files go away", "utils/files.py", "            temporary.unlink()\n", "            pass\n",
           FILES),
    Mutant("folders appear whole", "utils/files.py",
           "            yield whole\n            os.rename(whole, target)\n",
           "            os.rename(whole, target)\n            yield target\n", FILES),
    Mutant("existing results stay", "utils/files.py", "    if os.path.lexists(target):", "    if False:", FILES),
    Mutant("strict JSON is written", "utils/files.py", ", parse_constant=lambda name: None)", ")", FILES),
    Mutant("duplicate keys of JSON", "utils/files.py", ", object_pairs_hook=unique)", ")", LABELS),
    Mutant("deep JSON", "utils/files.py", "except (ValueError, RecursionError) as error:",
           "except ValueError as error:", LABELS),
    Mutant("pipes as label files", "utils/files.py", "if not stat.S_ISREG(found.st_mode):  # a pipe",
           "if False:  # a pipe", LABELS),
    Mutant("the length of texts", "utils/files.py", "if found.st_size > LARGEST_TEXT:", "if False:", RELIABILITY),
    Mutant("the whole file system", "utils/files.py",
           "if os.path.abspath(root) == os.path.abspath(os.sep):", "if False:", RELIABILITY),
    Mutant("room for --cache ram", "data/cache.py",
           "        if size * int(os.environ.get(\"LOCAL_WORLD_SIZE\", 1)) > free_memory():",
           "        if False:", RELIABILITY),
    Mutant("the user's repository", "utils/train/runs.py", '"git", "--no-optional-locks", "status"', '"git", "status"',
           RELIABILITY),
    Mutant("one process builds a cache", "utils/files.py", "        fcntl.lockf(file, fcntl.LOCK_EX)\n", "", GUARDS),
    Mutant("damaged caches", "utils/files.py",
           "with suppress(OSError, ValueError, TypeError, zlib.error), many_objects():",
           "with suppress(OSError):", LABELS),
    Mutant("a changed file in the disk cache", "data/cache.py", 'header["stamp"] == self._stamp() and ', "", SEG),
    Mutant("a cut disk cache", "data/cache.py", ' and header["bytes"] == len(self.array)', "", SEG),

    # ---- images ----
    Mutant("GDAL's drivers", "data/images.py", "rasterio.open(os.path.abspath(path), driver=driver, **options)",
           "rasterio.open(os.path.abspath(path), **options)", GUARDS),
    Mutant("names of GDAL", "data/images.py", "rasterio.open(os.path.abspath(path), driver",
           "rasterio.open(path, driver", GUARDS),
    Mutant("the kind by the first bytes", "data/images.py", "    if kind is None:\n", "    if False:\n", IMAGES),
    Mutant("pipes and devices as images", "data/images.py", 'open(path, "rb").read(HEAD) if regular else b""',
           'open(path, "rb").read(HEAD)', IMAGES),
    Mutant("overviews elsewhere", "data/images.py", 'else _open(path, kind, OVERVIEW_LEVEL="NONE")',
           "else _open(path, kind)", IMAGES),
    Mutant("overviews elsewhere, of windows", "data/images.py", 'header(path).kind, OVERVIEW_LEVEL="NONE")',
           "header(path).kind)", IMAGES),
    Mutant("PNG without data", "data/images.py", 'GDAL_PNG_WHOLE_IMAGE_OPTIM="NO", ', "", IMAGES),
    Mutant("claims of hugeness", "data/images.py", "if file.height * file.width > MAX_SCENE:", "if False:", IMAGES),
    Mutant("pixels of one read", "data/images.py", "if len(bands) * math.prod(shape or (h, w)) > MAX_VALUES:",
           "if False:", IMAGES),
    Mutant("pages of a TIFF", "data/images.py", "        if file.subdatasets:\n", "        if False:\n", NO_DATA),
    Mutant("frames of a GIF", "data/images.py", 'if getattr(file, "n_frames", 1) > 1:', "if False:", NO_DATA),
    Mutant("the size of the header", "data/images.py", "        if image.shape != (count, height, width):",
           "        if False:", GUARDS),
    Mutant("JPEGs without an end marker", "data/images.py", "if data.rfind(end) < data.rfind(b",
           "if False and data.rfind(b", GUARDS),
    Mutant("infinite pixels", "data/images.py", "if image.dtype == np.float32 and np.isinf(image).any():",
           "if False:", IMAGES),
    Mutant("a changed image is read again", "data/images.py", "    if known[:2] != stamp:\n", "    if not known:\n",
           IMAGES),

    # ---- labels ----
    Mutant("boxes that are not finite", "data/labels/__init__.py", "infinite = ~np.isfinite(corners).all(1)",
           "infinite = np.zeros(len(corners), bool)", LABELS),
    Mutant("unknown categories", "data/labels/__init__.py", "infinite, classes < 0,",
           "infinite, classes < -1,", LABELS),
    Mutant("boxes without area", "data/labels/__init__.py",
           "(inside[:, 2:] - inside[:, :2]).min(1) < MIN_SIDE", "classes < 0", LABELS),
    Mutant("boxes that stand twice", "data/labels/__init__.py",
           "_repeated(np.column_stack((owners, classes, infinite, inside)))))", "np.zeros(len(rows), bool)))", LABELS),
    Mutant("boxes are clipped", "data/labels/__init__.py", "np.fmin(np.fmax(corners, 0), sides)", "corners", LABELS),
    Mutant("classes of YOLO's files", "data/labels/yolo.py",
           "if not 0 <= category <= MAX_CLASS or category != int(category):", "if False:", LABELS),
    Mutant("entities in XML", "data/labels/records.py", "    if any(word in data.replace",
           "    if False and any(word in data.replace", LABELS),
    Mutant("images outside of the data", "data/labels/coco.py", ' and not path.startswith("../"):', ":", LABELS),
    Mutant("ids of images that stand twice", "data/labels/coco.py", "            if key in index_of:\n",
           "            if False:\n", LABELS),
    Mutant("values of masks", "data/seg.py", "    if wrong.any():\n", "    if False:\n", SEG),
    Mutant("sizes of masks", "data/seg.py", "    if tuple(labels.shape) != size:\n", "    if False:\n",
           (*SEG, *ITEMS)),
    Mutant("labels are 0 or 1", "data/cls.py", "if _truth(value) not in (0, 1)), None)", "if False), None)", CLS),
    Mutant("1 % of bad items", "data/bad.py", "if count > MAX_SHARE * total and not allow_bad:", "if False:", ITEMS),
    Mutant("bad items that are allowed", "data/bad.py", " and not allow_bad:", ":", ITEMS),
    Mutant("rows of a split", "data/folds.py", "type(fold_of) is not dict or type(fold_of.get(name)) is not int",
           "False", FOLDS),

    # ---- published weights ----
    Mutant("no class of a file is imported", "utils/tensors.py", "safe_globals([(_Inert, name) for name in foreign])",
           "safe_globals([])", WEIGHTS),
    Mutant("a given SHA-256", "nets/weights.py", "if wanted and ", "if False and ", RELIABILITY),
    Mutant("checkpoints as weights", "nets/weights.py", "checkpoint.checked(content, path) if", "content if",
           PRETRAINED),
    Mutant("header of a safetensors file", "utils/tensors.py", "    if start > len(data):", "    if False:",
           RELIABILITY),
    Mutant("spans of a safetensors file", "utils/tensors.py",
           "len(range(first, last)) != math.prod(shape) * dtype.itemsize or ", "",
           (*PRETRAINED, *RELIABILITY)),
    Mutant("gaps in a safetensors file", "utils/tensors.py", " or start + first != end:", ":", RELIABILITY),
    Mutant("the end of a safetensors file", "utils/tensors.py", "    if end != len(data):", "    if False:",
           RELIABILITY),
    Mutant("finite weights of others", "nets/pretrained.py", "elif not tensors.fits(tensor, target):", "elif False:",
           (*PRETRAINED, *RELIABILITY)),
    Mutant("kinds of weights", "utils/tensors.py", "tensor.is_floating_point() == target.is_floating_point() and ", "",
           RELIABILITY),
    Mutant("the whole encoder fits", "nets/pretrained.py", "    if wrong:\n", "    if False:\n", PRETRAINED),
    Mutant("hash of published weights", "nets/weights.py", "hash_prefix=digest and digest[1])", "hash_prefix=None)",
           PRETRAINED),
]


def breaks(mutant, root=ROOT):
    """-> the mutated text of its file. Raises ValueError unless the old text stands there exactly once."""
    text = (root / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        raise ValueError(f"{mutant.name}: its text stands {text.count(mutant.old)} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def run(mutant):
    """-> whether the tests noticed it, the first test that did, seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as scratch:
        copy, tmp = Path(scratch, "repository"), Path(scratch, "tmp")
        tmp.mkdir()
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(
            ".git", ".venv", "__pycache__", "runs", ".pytest_cache", "docs"))
        (copy / mutant.file).write_text(breaks(mutant), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=no",
             "-o", "timeout=120", "-W", "ignore", *mutant.tests],
            cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | {"TMPDIR": str(tmp), "OMP_NUM_THREADS": "1"})
        try:
            out, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            out = "FAILED (the tests did not end)"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    first = next((line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    noticed = process.returncode == 1 or "did not end" in first or process.returncode < 0
    if process.returncode not in (0, 1) and not noticed:
        first = out[-300:]
    return noticed, " ".join(first.split())[:100], time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants")
    parser.add_argument("--without", nargs="+", default=[], metavar="FILE", help="not those that need these tests")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time")
    parser.add_argument("--list", action="store_true", help="only show their names")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not args.only or mutant.name in args.only]
    chosen = [mutant for mutant in chosen if not set(mutant.tests) & set(args.without)]
    if args.list:
        print("\n".join(f"{mutant.name:45} {mutant.file}" for mutant in chosen))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the tests' processes are ended first
    print("| guard | file | noticed | by |\n|---|---|---|---|", flush=True)
    count = 0
    with contextlib.ExitStack() as stack:
        results = stack.enter_context(ThreadPoolExecutor(args.jobs)).map(run, chosen) if args.jobs > 1 else \
            map(run, chosen)
        for mutant, (noticed, first, seconds) in zip(chosen, results):
            count += noticed
            answer = "yes" if noticed else "NO"
            print(f"| {mutant.name} | {mutant.file} | {answer} | {first} ({seconds:.0f} s) |", flush=True)
    print(f"\n{count} of {len(chosen)} are noticed ({count / len(chosen):.1%})")
    return int(count < 0.95 * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
