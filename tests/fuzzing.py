"""Files that are damaged at random, by seed, and what becomes of whoever reads them.

`python tests/fuzzing.py --seconds 10 --seed 0 [--only run.json=7] [TARGET …]` tries inputs target by target, in one
process; each input is made of the target's name and a number alone. It ends with a line of JSON: inputs tried, and what failed.
"""
import argparse
import copy
import errno
import io
import json
import logging
import math
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

SECONDS, MEMORY = 5, 2 ** 20   # that one input may take; KiB

# ---- mutations: of bytes ----

def _flip_bit(rng, content, _):
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return content

def _set_byte(rng, content, _):
    content[rng.integers(len(content))] = rng.choice([0, 1, 10, 34, 47, 92, 127, 128, 255, rng.integers(256)])
    return content

def _span(rng, content):
    start = int(rng.integers(len(content)))
    return start, min(len(content), start + int(rng.choice([1, 2, 4, 8, 64, 512, 4096])))

def _cut(rng, content, _): return content[:rng.integers(len(content))]
def _behead(rng, content, _): return content[rng.integers(len(content)):]
def _append(rng, content, _): return content + rng.bytes(int(rng.integers(1, 600)))
def _empty(rng, content, _): return b""
def _other(rng, content, others): return others[rng.integers(len(others))]
def _both(rng, content, others): return content + others[rng.integers(len(others))]

def _zero(rng, content, _):
    a, b = _span(rng, content)
    content[a:b] = bytes(b - a)
    return content

def _number(rng, content, _):
    a = int(rng.integers(max(1, len(content) - 8)))
    value = int(rng.choice([0, 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 62, 2 ** 63 - 1]))
    content[a:a + 8] = struct.pack(rng.choice(["<Q", ">Q"]), value)
    return content

def _double(rng, content, _):
    a, b = _span(rng, content)
    return content[:b] + content[a:]

def _remove(rng, content, _):
    a, b = _span(rng, content)
    return content[:a] + content[b:]

def _insert(rng, content, others):
    a, b = _span(rng, content)
    other = others[rng.integers(len(others))]
    start = int(rng.integers(len(other) + 1))
    return content[:a] + rng.choice([rng.bytes(b - a), bytes(other[start:start + b - a])]) + content[a:]

def _swap(rng, content, _):
    (a, b), (c, d) = sorted((_span(rng, content), _span(rng, content)))
    c, d = max(b, c), max(b, d)
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]

BYTES = (_flip_bit, _flip_bit, _set_byte, _cut, _behead, _append, _empty, _other, _both, _zero, _number, _double, _remove,
         _insert, _swap)

def bytes_of(rng, content, others):
    """`content`, changed once to three times; `others`: what else could stand there."""
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        if not content: break
        content = rng.choice(np.array(BYTES, object))(rng, bytearray(content), others)
    return bytes(content)

# ---- mutations: of structures ----

ODD = (None, True, False, 0, -1, 1, 2, 7, 10 ** 30, -10 ** 30, 2 ** 63, 2 ** 53 + 1, 1e308, 0.5, float("nan"), float("inf"),
       -float("inf"), "", "x", "../../x", "/x", "a/b", "\0", "\ud800", "é" * 300, "9" * 5000, [], {}, [[]], [None], {"": {}}, "nan",
       {"a": 1}, ["x", 1], [1e400], "<b>", "none", "digits", {"epochs": "x"}, [1, 2, 3], [[1, 2], [3]])

def _places(nest, at=()):
    """The (container, key) of all places in a nest."""
    for key in list(nest) if isinstance(nest, dict) else range(len(nest)):
        yield nest, key
        if isinstance(nest[key], (dict, list)): yield from _places(nest[key])

def nest_of(rng, nest):
    """A copy of the dict `nest` with one to three values dropped, replaced, renamed, moved or doubled."""
    nest = copy.deepcopy(nest)
    for _ in range(int(rng.integers(1, 4))):
        places = list(_places(nest))
        if not places: break
        top = [place for place in places if place[0] is nest]
        (one, key), (other, name) = (pool[rng.integers(len(pool))] for pool in (rng.choice(np.array([0, 1])) and top or places, places))
        what = rng.integers(6)
        if what == 0: del one[key]
        elif what == 1 and isinstance(one, dict): one[str(ODD[rng.integers(len(ODD))])[:99]] = one.pop(key)
        elif what == 2: one[key] = copy.deepcopy(other[name])
        elif what == 3 and isinstance(one, list): one.insert(key, copy.deepcopy(one[key]))
        else: one[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    return nest

def json_of(rng, content, whole):
    """The bytes of JSON, of `content`, a dict, written in an odd way."""
    text = json.dumps(content)
    key = next(iter(content), "a")
    deep = int(rng.choice([10, 900, 30_000]))
    ways = (lambda: text.encode(), lambda: text.encode(), lambda: text.encode(), lambda: b"\xef\xbb\xbf" + text.encode(),
            lambda: text.encode(str(rng.choice(["utf-16", "utf-32", "utf-16-be"]))), lambda: text.encode() + b"\xff",
            lambda: b"[" * deep + b"]" * deep, lambda: b'{"a":' * deep + b"1" + b"}" * deep,
            lambda: (text[:-1] + f', {json.dumps(key)}: {json.dumps(whole.get(key))}}}').encode(),
            lambda: ("{" + f'{json.dumps(key)}: 7, ' + json.dumps(whole)[1:]).encode(),
            lambda: text.replace("1", "1" * 5000, 1).encode(), lambda: f"[{text}]".encode(), lambda: json.dumps(text).encode())
    return ways[rng.integers(len(ways))]()

def parquet_of(rng, content):
    """A Parquet file of another schema or other rows than `content`."""
    frame = pd.read_parquet(io.BytesIO(content))
    name = str(rng.choice(list(frame)))
    values = [lambda n: [[1]] * n, lambda n: ["x"] * n, lambda n: [None] * n, lambda n: [{"a": 1}] * n, lambda n: [b"\xff"] * n,
              lambda n: [math.inf] * n, lambda n: [True] * n, lambda n: pd.to_datetime(["2020-01-01"] * n), lambda n: [2 ** 63] * n,
              lambda n: pd.Categorical(["a"] * n), lambda n: np.zeros(n, np.float16), lambda n: [-1] * n]
    what = rng.integers(7)
    if what == 0: frame = frame.drop(columns=name)
    elif what == 1: frame = frame.iloc[:int(rng.integers(len(frame)))]
    elif what == 2: frame = pd.concat([frame, frame])
    elif what == 3: frame = frame.rename(columns={name: str(rng.choice(["", "seed", "condition", "x", "image", "study", name.upper()]))})
    elif what == 4: frame = frame.sample(frac=1, random_state=int(rng.integers(99)))
    else: frame[name] = values[rng.integers(len(values))](len(frame))
    table = pa.Table.from_pandas(frame, preserve_index=bool(rng.integers(2)))
    if what == 6: table = table.replace_schema_metadata({b"pandas": json.dumps(
        nest_of(rng, json.loads(table.schema.metadata[b"pandas"]))).encode()})
    pq.write_table(table, file := io.BytesIO(), compression=str(rng.choice(["zstd", "none", "gzip"])))
    return file.getvalue()

def safetensors_of(rng, content):
    """A safetensors file whose header says other things than that of `content`."""
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:8 + size]), content[8 + size:]
    name = str(rng.choice([key for key in header if key != "__metadata__"]))
    entry, what = header[name], rng.integers(7)
    if what == 0: entry["dtype"] = str(rng.choice(["F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "C64", "F4", "X", "U64"]))
    elif what == 1: entry["shape"] = [[], [0], [10 ** 12], [-1], [1, *entry["shape"]], [2 ** 62, 4], [math.prod(entry["shape"])]][rng.integers(7)]
    elif what == 2: entry["data_offsets"] = [0, 4]
    elif what == 3: header[str(rng.choice(["../x", "", "clean", "é"]))] = header.pop(name)
    elif what == 4: del header[name]
    else: header = nest_of(rng, header)
    text = json.dumps(header).encode()
    size = int(rng.choice([2 ** 62, 2 ** 31, 0])) if rng.integers(10) == 0 else len(text)
    return struct.pack("<Q", size) + text + body

class Bomb:
    """What a pickle would execute."""
    def __reduce__(self): return os.mkdir, ("executed",)

def _npy(rng, content):
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (3,)}
    header |= {str(rng.choice(list(header))): [None, "|O", (-1,), (10 ** 13,), "<U9", [("a", "<f4")], (2, 2), "X", "|V0", ("a",)][rng.integers(10)]}
    texts = (repr(header), repr(header)[:-3], "(" * 900, "[" * 9000, "{'a': " * 400, "1" * 5000, "'''", "-" * 9000, "{'descr': 1e9}", "\\\n", "9L")
    text = texts[rng.integers(len(texts))].encode() if rng.integers(2) else repr(header).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n" + bytes(12)

def npz_of(rng, content):
    """An npz file with odd members beside those of `content`."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive: members = {m: archive.read(m) for m in archive.namelist()}
    name, what = str(rng.choice(list(members))), rng.integers(8)
    np.lib.format.write_array(objects := io.BytesIO(), np.array([Bomb()], object), allow_pickle=True)
    if what == 0: members[name] = objects.getvalue()
    elif what == 1: members[name] = pickle.dumps(Bomb())
    elif what == 2: members["../" + name] = members.pop(name)
    elif what == 3: members[name] = bytes_of(rng, members[name], list(members.values()))
    elif what == 4: members[name] = members[str(rng.choice(list(members)))]
    elif what == 5 and rng.integers(8) == 0: members[name] = members[name] + bytes(2 ** 27)
    elif what == 6: del members[name]
    else: members[name] = _npy(rng, members[name])
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for member, bytes_ in members.items(): archive.writestr(member, bytes_)
        if rng.integers(9) == 0: archive.writestr(member, bytes_)
    return file.getvalue()

YAML = ("!!python/object/apply:os.mkdir [executed]", "!!python/name:os.system ", "!!bool maybe", "!!timestamp then", "!!int ''", "!!float x",
        "!!binary '='", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [1]", "&a [*a]", "*a", "*none", "<<: 3", "{<<: [1]}", "2001-99-99", "1:30",
        "0x1f", "1_000", "0o17", "~", "[]", "{}", "{[1]: 2}", "{{}: 2}", "? a", "|\n a", "yes", "1e999", "-.inf", ".nan", "9" * 5000,
        "1e-3", "digits", "folder:/nowhere", "[none, none]", "'\\0'", '"\\0"', '"\\ud800"', "- - - -", "\t", "%YAML 9.9\n---", "---", "...", "#",
        "\0", "\x85", "\ufeff", "!<tag:yaml.org,2002:bool> 3", "!!str 3", "!!seq {}", "!!map []", "!!null x", "!!merge x", "=", "!!value x", "!!int 1",
        "!!float 1", "!!bool yes", "!!str", "!!int", "!!bool [a]", "!!timestamp {}", "mixup:1.0", "mixup: 1.0", "label-smoothing:2")

def yaml_of(rng, content):
    """YAML of a study with odd values and layouts."""
    lines = content.decode().splitlines()
    number = int(rng.integers(len(lines)))
    odd = YAML[rng.integers(len(YAML))]
    head, colon, value = lines[number].partition(": ")
    what = rng.integers(7)
    if what <= 2: lines[number] = f"{head}{colon}{odd}"
    elif what == 3: lines.insert(number, lines[int(rng.integers(len(lines)))])
    elif what == 4: lines.insert(number, " " * int(rng.integers(8)) + odd)
    elif what == 5: return yaml.dump(nest_of(rng, yaml.safe_load(content)), allow_unicode=bool(rng.integers(2))).encode("utf-8", "replace")
    else:
        bomb = "\n".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, int(rng.integers(2, 30))))
        lines.insert(0, str(rng.choice(["x0: &x0 [a]\n" + bomb, "- " * 9000, "[" * 60, "{a: " * 60, "? " * 3000, "a: " + "b " * 40_000])))
    return "\n".join(lines).encode("utf-8", "surrogatepass")

def _chunks(content):
    at = 8
    while at + 8 <= len(content):
        size = int.from_bytes(content[at:at + 4], "big")
        yield content[at + 4:at + 8], content[at + 8:at + 8 + size]
        at += size + 12

def _png(chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                                           for kind, body in chunks)

def png_of(rng, content):
    """A PNG with odd chunks or sizes; checksums fit."""
    if not content.startswith(b"\x89PNG"): return bytes_of(rng, content, [content])
    chunks, what = list(_chunks(content)), rng.integers(8)
    width, height = (int(rng.choice([0, 1, 7, 8, 9, 3_000, 13_000, 40_000, 2 ** 31 - 1])) for _ in range(2))
    depth = [1, 2, 4, 8, 16, 3, 255][rng.integers(7)], [0, 2, 3, 4, 6, 1, 255][rng.integers(7)], 0, 0, int(rng.integers(2))
    extra = ((b"tEXt", b"a\0" + bytes(99)), (b"zTXt", b"a\0\0" + zlib.compress(bytes(2 ** 22))), (b"iTXt", b"a\0\1\0\0\0" + b"x"), (b"eXIf", b"II*\0" + rng.bytes(20)),
             (b"eXIf", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"), (b"tRNS", b"\0\0"), (b"tRNS", b""), (b"PLTE", b"\0" * 3), (b"PLTE", b""), (b"acTL", bytes(8)), (b"gAMA", b""),
             (b"acTL", struct.pack(">II", 2 ** 31, 0)), (b"fcTL", bytes(26)), (b"iCCP", b"a\0\0" + zlib.compress(bytes(2 ** 20))), (b"IHDR", b""), (b"pHYs", b"1"))
    if what < 2: chunks[0] = chunks[0][0], struct.pack(">II", width, height) + bytes(depth if what else chunks[0][1][8:])
    elif what == 2:
        chunks[0] = chunks[0][0], struct.pack(">II", 13_000, 13_000) + bytes([1, 0, 0, 0, 0])
        chunks[1] = b"IDAT", zlib.compress(bytes(13_000 * 1_626), 9) if rng.integers(4) == 0 else b""
    elif what < 6: chunks.insert(int(rng.integers(len(chunks) + 1)), extra[rng.integers(len(extra))])
    elif what == 6: chunks.insert(int(rng.integers(len(chunks))), chunks[rng.integers(len(chunks))])
    else: chunks[i] = chunks[i := rng.integers(len(chunks))][0], bytes_of(rng, chunks[i][1] or b"x", [b"x"])
    return _png(chunks)

FORMS = {".json": None, ".jsonl": None, ".parquet": parquet_of, ".safetensors": safetensors_of, ".npz": npz_of, ".yaml": yaml_of, ".png": png_of}

# ---- what is there, and how it is damaged ----

def tree(root):
    """{relative name: bytes, or what a link says, or None for a folder} of all below `root`."""
    return {str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
            for path in sorted(root.rglob("*")) if path.name != ".lock"}

def restore(root, whole):
    """Make `root` as it was."""
    now = tree(root)
    for name in sorted(now.keys() - whole.keys(), reverse=True): _gone(root / name)
    for name, content in whole.items():
        if now.get(name, ...) == content: continue
        path = root / name
        if content is None: _gone(path) if path.is_symlink() or path.is_file() else None; path.mkdir(exist_ok=True)
        else:
            _gone(path)
            path.write_bytes(content)

def _gone(path):
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)

def place_of(rng, path, others):
    """Put something else where the file `path` is: nothing, a folder, a link."""
    content, what = path.read_bytes(), rng.integers(7)
    path.unlink()
    if what == 0: path.mkdir()
    elif what == 1: (path.mkdir(), (path / "x").write_bytes(content))
    elif what == 2: path.symlink_to(path.name)
    elif what == 3: path.symlink_to("nowhere")
    elif what == 4: path.symlink_to("/dev/null")
    elif what == 5: path.symlink_to(others[rng.integers(len(others))])

def crafted(form, rng, whole):
    """What `form` makes of `whole`; where that cannot be written, any damage."""
    try: return form(rng, whole)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, struct.error, pa.ArrowException):
        return bytes_of(rng, whole, [whole])

def damage(rng, target, root):
    """Damage one of the `target`'s files in `root` → (its relative name, whether it was sealed again)."""
    name = str(rng.choice(target.files(root)))
    path, whole = root / name, (root / name).read_bytes()
    others = [other for other in target.files(root) if other != name] or [name]
    what, form, sealed = rng.integers(10), FORMS.get(path.suffix), False
    if what == 0: place_of(rng, path, [root / other for other in others])
    elif what <= 3 and form: path.write_bytes(crafted(form, rng, whole))
    elif what <= 3 and path.suffix == ".json": path.write_bytes(json_of(rng, nest_of(rng, json.loads(whole)), json.loads(whole)))
    elif what <= 3 and path.suffix == ".jsonl":
        lines = whole.splitlines()
        number, run = rng.integers(len(lines)), json.loads(lines[0])
        lines[number] = json_of(rng, nest_of(rng, json.loads(lines[number])), run).replace(b"\n", b" ")
        path.write_bytes(b"\n".join(lines) + b"\n")
    else: path.write_bytes(bytes_of(rng, whole, [(root / other).read_bytes() for other in others]))
    if target.seal and what and rng.integers(2):
        with warnings.catch_warnings(): sealed = bool(target.seal(root, name))
    return name, sealed

# ---- targets ----

class Target:
    """What is read: `make(root)` writes it whole, `check(root, name, sealed)` reads it after a damage to `name`."""
    seal = None
    def files(self, root): return sorted(n for n, content in tree(root).items() if content and (root / n).is_file())

def refusal(error, *names):
    """The `ValueError` `error` must name what it is about."""
    assert any(name in str(error) for name in names), f"names none of {names}: {error}"
    assert len(str(error)) < 5000, f"an error of {len(str(error))} letters"

class Definition(Target):
    """A study's YAML."""
    TEXT = ("# A comment\nstudy: tiny\nseeds: [0, 3]\nround: 1\nmeasures: standard\ngrid:\n  - data: digits\n    models: [tiny-cnn, tiny-cnn-bn]\n"
            "    regularizers: [none, 'mixup:1.0']\n    feature_dim: 16\n    recipe:\n      epochs: 2\n      batch_size: 50\n      lr: 5e-2\n")

    def make(self, root): (root / "tiny.yaml").write_text(self.TEXT)

    def check(self, root, name, sealed):
        from repspace import study
        try: got = study.read(root / name)
        except ValueError as error: return refusal(error, str(root / name))
        says = yaml.safe_load((root / name).read_bytes())
        seeds = says["seeds"] if isinstance(says["seeds"], list) else range(says["seeds"])
        assert (got.name, list(got.seeds)) == (says["study"], list(seeds)), "another study"
        assert len(got.conditions) == sum(len(e["models"]) * len(e["regularizers"]) for e in says["grid"]), "other conditions"
        assert all(c.recipe["lr"] == float(e["recipe"]["lr"]) for e in says["grid"][:1] for c in got.conditions[:1]), "another recipe"

def _equal(one, other):
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True))

class Records(Target):
    """The fresh records of a study: three seeds of one condition, one of another."""
    source, unbound = "fresh", False

    def make(self, root):
        from repspace import records
        from test_records import CONDITION, made_up
        self.runs = [(CONDITION, 0), (CONDITION, 1), (CONDITION, 2), ("digits.tiny-cnn.mixup-1.0", 0)]
        for condition, seed in self.runs:
            records.write(records.run_folder("s", condition, seed, root / "runs"), *made_up(seed, condition))
        self.remember(root)

    def remember(self, root):
        from repspace import records
        self.whole = records.load("s", self.source, root / "runs", root / "results")
        self.arrays = {run: self.whole.arrays(*run) for run in self.runs}

    def seal(self, root, name):
        """Bind what was changed again, as one would who wants it to pass."""
        from repspace.records import files
        path = root / name
        try: run = json.loads((path.parent / "run.json").read_bytes())
        except (ValueError, RecursionError): return False
        if not isinstance(run, dict) or not isinstance(run.get("parts"), dict): return False
        if path.name in run["parts"]: run["parts"][path.name] = files.digest(path.read_bytes())
        try: (path.parent / "run.json").write_text(json.dumps(files.sealed(run)))
        except (ValueError, RecursionError): return False
        return True

    def hurt(self, name):
        """The runs that the file `name` is of."""
        _, _, condition, seed, _ = name.split("/")
        return [(condition, int(seed))]

    def check(self, root, name, sealed):
        from repspace import records
        hurt, names, sealed = self.hurt(name), (name, str(Path(name).parent)), sealed or self.unbound
        schema_2 = not sealed and Path(name).name in ("run.json", "manifest.json")   # without checksums, which is said
        with said() as lines:
            try: now = records.load("s", self.source, root / "runs", root / "results")
            except ValueError as error: refusal(error, *names); now = None
        if now is not None: self.compare(now, hurt, sealed or schema_2 and "without checksums" in "".join(lines), "\n".join(lines), names)
        for run in self.runs:
            try: arrays = records.arrays("s", *run, self.source, root / "runs", root / "results")
            except ValueError as error: (refusal(error, *names, "no fresh record", "no published record"), self.may(run in hurt or now is None, error))
            else: sealed or run in hurt and schema_2 or self.alike(arrays, self.arrays[run])
        self.publish(root, name, sealed, names)

    def may(self, allowed, why):
        assert allowed, f"the whole run of another file is lost: {why}"

    def alike(self, one, other):
        assert one.keys() == other.keys() and all(np.array_equal(one[k], other[k], equal_nan=True) for k in one), "other arrays"

    def compare(self, now, hurt, sealed, lines, names):
        there = set(zip(now.runs.condition, now.runs.seed))
        missing = set(self.runs) - there
        self.may(missing <= set(hurt), lines)
        assert not missing or self.unbound or "left out" in lines and any(name in lines for name in names), f"no word of {missing}: {lines}"
        if set(self.runs) & there == there:
            keep = set(self.runs) - set(hurt) if sealed else there
            for field in ("runs", "samples") if keep else ():
                one, other = (t[[(c, s) in keep for c, s in zip(t.condition, t.seed)]] for t in (getattr(now, field), getattr(self.whole, field)))
                if sealed: one, other = (t[self.whole_columns(field)].astype(object) for t in (one, other))
                _equal(one, other)

    def whole_columns(self, field): return ["condition", "seed"] + (["accuracy", "history"] if field == "runs" else ["image", "norm"])

    def publish(self, root, name, sealed, names):
        from repspace import records
        before = tree(root)
        try: records.publish("s", root / "runs", root / "results")
        except ValueError as error: refusal(error, *names, "published")
        else:
            _gone(root / "runs" / "s") if (root / "runs").is_dir() else None
            records.load("s", "published", root / "runs", root / "results")
            for run in self.runs:
                try: records.arrays("s", *run, "published", root / "runs", root / "results")
                except ValueError as error: self.may(sealed or "no published record" in str(error), error)
            return
        after = tree(root)
        assert {k: v for k, v in after.items() if "results" not in k} == {k: v for k, v in before.items() if "results" not in k}, "a reader writes"

class Published(Records):
    """A published study: four files and their manifest."""
    source = "published"

    def make(self, root):
        from repspace import records
        source, self.source = self.source, "fresh"
        super().make(root)
        self.source = source
        records.publish("s", root / "runs", root / "results")
        _gone(root / "runs")
        self.remember(root)

    def hurt(self, name): return self.runs

    def seal(self, root, name):
        from repspace.records import files
        path = root / name
        try: manifest = json.loads((path.parent / "manifest.json").read_bytes())
        except (ValueError, RecursionError): return False
        try:
            if path.name != "manifest.json": manifest["files"][path.name] = {"sha256": files.digest(path.read_bytes()), "bytes": 1}
            for line in path.read_bytes().splitlines() if path.suffix == ".jsonl" else ():
                run = json.loads(line)
                manifest["runs"].setdefault(f"{run['condition']}/{run['seed']}", {})["sha256"] = files.digest(line)
            (path.parent / "manifest.json").write_text(json.dumps(files.sealed(manifest)))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError): return False
        return True

    def may(self, allowed, why): pass

class Old(Published):
    """A published study of schema 2, which has no checksums: nothing but errors is asked of it."""
    unbound = True

    def make(self, root):
        from test_records import as_schema_2
        super().make(root)
        as_schema_2(root / "results" / "s")
        self.remember(root)

    def seal(self, root, name): return True

class Raw(Target):
    """Each kind of file as it is parsed, without what binds it."""
    def make(self, root):
        from repspace.records import files
        from test_records import made_up
        run, samples, logits, head = made_up(0)
        files.write_json(root / "a.json", run)
        files.write_frame(root / "a.parquet", samples)
        files.write_arrays(root / "a.safetensors", logits | head)
        (root / "a.npz").write_bytes(files.npz_content(logits | head))

    def check(self, root, name, sealed):
        from repspace.records import files
        read = {".json": files.read_json, ".parquet": files.read_frame, ".safetensors": files.read_arrays, ".npz": self.npz}
        try: read[Path(name).suffix](root / name)
        except files.Damaged as error: refusal(error, name)

    def npz(self, path):
        from repspace.records import files
        arrays = files.read_npz(path)
        with files.naming(path): return dict(arrays.items())

class Tensors(Target):
    """Weights and a checkpoint, on the way through a training."""
    OF = {"training": "t", "condition": "c", "seed": 0}

    def training(self):
        from repspace import data, regularize, train
        digits = data.load("digits")
        few = digits._replace(train=data.Split(*(x[:100] for x in digits.train)), test=data.Split(*(x[:10] for x in digits.test)))
        recipe = train.Recipe(epochs=2, batch_size=50, lr=.05)
        return train.new_classifier("tiny-cnn", few, recipe, 0), few, recipe, regularize.get("none")

    def make(self, root):
        from repspace import train
        from repspace.study import checkpoint
        classifier, few, recipe, regularizer = self.training()
        kept = checkpoint.Checkpoint(root / "t.checkpoint", every=0, of=self.OF)
        keep = kept.keep
        kept.keep = lambda training, history: (setattr(self, "state", training), keep(training, history))
        self.history = train.fit(classifier, few, recipe, regularizer, 0, "cpu", checkpoint=kept)
        checkpoint.write_bound(root / "t.safetensors", checkpoint.contents(classifier), {"seconds": 1.5}, self.OF)
        self.whole = {name: self.read(root / name) for name in ("t.checkpoint", "t.safetensors")}
        self.bytes = {name: (root / name).read_bytes() for name in self.whole}

    def read(self, path):
        from repspace.study.checkpoint import read_bound
        return read_bound(path, self.OF)

    def seal(self, root, name):
        from repspace.arrays import checksum
        from repspace.records import files
        from safetensors.torch import load, save
        from repspace.study.checkpoint import _seal
        content = self.bytes[name]
        try:
            tensors = load(content)
            said = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])["__metadata__"]["about"]
            rng = np.random.default_rng(list((root / name).read_bytes()[:99]))
            said = json.dumps(nest_of(rng, json.loads(said)))
            (root / name).write_bytes(save(tensors, {"about": said, "seal": _seal(said, tensors)}))
        except Exception: return False
        return True

    def check(self, root, name, sealed):
        from repspace.study.checkpoint import Checkpoint, Unusable
        try: about, tensors = self.read(root / name)
        except Unusable as error: refusal(error, name)
        except IsADirectoryError as error: return refusal(error, name)   # an error of the system, not damage
        except OSError: assert not (root / name).exists(), "it is there, and no `Unusable`"
        else:
            same, values = self.whole[name]
            assert sealed or about == same and tensors.keys() == values.keys() and all(bool((values[k] == tensors[k]).all()) for k in values), "other tensors"
        if name == "t.checkpoint":
            with said() as lines: history = Checkpoint(root / name, of=self.OF).resume(self.state)
            assert history is None and ("unusable-1" in "".join(lines) or not (root / name).exists()) or sealed or history == self.whole[name][0]["history"]

class Images(Target):
    """An image folder, with its digest."""
    def make(self, root):
        from PIL import Image
        ends = (".png", ".png", ".png", ".jpg", ".bmp", ".tif", ".webp", ".ppm")
        for part in ("train", "test"):
            for k, label in enumerate(("one", "two")):
                (root / "images" / part / label).mkdir(parents=True)
                for i in range(2):
                    image = Image.fromarray(np.random.default_rng(9 * k + i).integers(256, size=(8, 8, 3), dtype=np.uint8))
                    image.save(root / "images" / part / label / f"{i}{ends[4 * k + 2 * i + (part == 'test')]}")
        self.whole, self.digest = self.read(root)

    def read(self, root):
        from repspace import data
        from repspace.study import digests
        return data.load(f"folder:{root / 'images'}"), digests.data_digest(f"folder:{root / 'images'}")

    def check(self, root, name, sealed):
        try: now, digest = self.read(root)
        except ValueError as error: return refusal(error, str(root / name), str((root / name).parent), "the same classes")
        same = all(bool((x == y).all()) if x.shape == y.shape else False for part in (0, 1) for x, y in zip(now[part], self.whole[part]))
        assert same or digest != self.digest, "other images with the same digest"

TARGETS = {"definition": Definition, "records": Records, "published": Published, "old": Old, "raw": Raw, "tensors": Tensors, "images": Images}

# ---- the campaign ----

class said:
    """What the package logs, as a context: a list of lines."""
    def __enter__(self):
        self.lines, self.handler = [], logging.Handler()
        self.handler.emit = lambda record: self.lines.append(record.getMessage())
        logging.getLogger("repspace").addHandler(self.handler)
        return self.lines

    def __exit__(self, *_): logging.getLogger("repspace").removeHandler(self.handler)

def _is_loop(error, path):
    """Whether `error` says that `path` is a link to itself: `Unreadable`, which is no `ValueError`, and nothing is done to it."""
    from repspace.records import Unreadable
    return isinstance(error, Unreadable) and error.errno == errno.ELOOP and str(path) in str(error) and path.is_symlink()

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

class Campaign:
    """Inputs of one target, in a folder of its own beside which nothing may change."""
    def __init__(self, name, place):
        self.name, self.target, self.place = name, TARGETS[name](), Path(place)
        self.root = self.place / "in"
        self.root.mkdir(parents=True)
        self.target.make(self.root)
        self.whole, self.base = tree(self.root), peak()

    def around(self): return sorted(p.name for p in self.place.iterdir()), sorted(os.listdir("."))

    def one(self, seed):
        """None, or what is wrong with what is done about input number `seed`."""
        restore(self.root, self.whole)
        rng, begun, around = np.random.default_rng([seed, *self.name.encode()]), time.monotonic(), self.around()
        name, sealed = damage(rng, self.target, self.root)
        begun = time.monotonic()
        try:
            self.target.check(self.root, name, sealed)
            assert time.monotonic() - begun < SECONDS, f"it takes {time.monotonic() - begun:.0f} s"
            assert peak() - self.base < MEMORY, f"it takes {(peak() - self.base) >> 10} MiB"
            assert self.around() == around, "it writes where it has no business"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt): raise
            if _is_loop(error, self.root / name): return None
            self.base = max(self.base, peak() if "MiB" in str(error) else 0)
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{name}{' (sealed again)' * sealed}: {type(error).__name__}: {str(error)[:600]} [{Path(where.filename).name}:{where.lineno}]"

    def until(self, end, seed):
        """(how many, {seed: what is wrong}) of the inputs from `seed` on, until the clock says `end`."""
        number, faults = 0, {}
        while number == 0 or time.monotonic() < end and len(faults) < 40:
            print(f"\r{self.name} {seed + number}", end="", file=sys.stderr, flush=True)
            if fault := self.one(seed + number): faults[seed + number] = fault
            number += 1
        return number, faults

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], metavar="TARGET=SEED")
    words = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("repspace").propagate = False
    import torch
    torch.set_num_threads(1)
    tried, wrong = {}, {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        os.makedirs(f"{place}/cache"), os.makedirs(f"{place}/here"), os.chdir(f"{place}/here")
        only = [(name, int(seed)) for name, _, seed in (word.partition("=") for word in words.only)]
        names = dict.fromkeys(name for name, _ in only) if only else words.targets or list(TARGETS)
        for name in names:
            campaign = Campaign(name, f"{place}/{name}")
            if only: tried[name], faults = 1, {s: f for n, s in only if n == name and (f := campaign.one(s))}
            else: tried[name], faults = campaign.until(time.monotonic() + words.seconds / len(names), words.seed)
            wrong |= {f"{name}={seed}": fault for seed, fault in faults.items()}
    print(file=sys.stderr)
    print(json.dumps({"tried": tried, "wrong": wrong}))

if __name__ == "__main__": main()
