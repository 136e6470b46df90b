"""Damaged and malicious PyTorch files: one test per defect of the zip and of the pickle in it, each refused by name.

Sound files, Meta's folders and pytorch_model.bin: test_torch_files.py.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import shown
from quantize.readers import pickles
from quantize.readers.pickles import MAX_TEXT_BYTES
from quantize.readers.torch_file import read_torch
from tests import make_sources as make
from tests.helpers_hostile import SMALL, WEIGHTS, refused
from tests.make_torch import (
    ORDERED_DICT,
    REBUILD,
    Call,
    Global,
    Persistent,
    Raw,
    TorchFile,
    Zip,
    ZipEntry,
    meta_params,
    meta_shards,
    opcodes,
    pickled,
    storage,
    tensor,
    torch_file,
    write_meta_folder,
)

ROOT = Path(__file__).resolve().parent.parent

ONE = {"t": np.arange(6, dtype=np.float32).reshape(2, 3)}
SOUND = torch_file(ONE)


def zipped(name: str = "data/0", *, zip64: bool = False, more: Any = (), end: Any = None, **changes: Any) -> bytes:
    """The sound file with an entry changed; `more`: further entries; `end`: what the zip's end says."""
    entries = SOUND.entries()
    for entry in entries:
        if entry.name == f"archive/{name}".encode():
            for key, value in changes.items():
                setattr(entry, key, value)
    return Zip([*entries, *more], zip64, **(end or {})).bytes()


def renamed(name: str, **changes: Any) -> ZipEntry:
    return ZipEntry(f"archive/{name}".encode(), b"x", **changes)


def test_the_sound_file_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.pth"
    for data in (
        zipped(),
        zipped(zip64=True),
        zipped("data/0", flags=0x0808),
        zipped("data/0", zip64=True, descriptor=None, flags=8),
        zipped("data.pkl", crc=0),
        zipped(align=0),
    ):
        path.write_bytes(data)
        rows = read_torch(path)["t"]
        assert np.array_equal(rows.read(np.arange(2)), ONE["t"])
    entries = SOUND.entries()
    for entry in entries:
        entry.zip64 = True
    path.write_bytes(Zip(entries, zip64=True).bytes())
    assert np.array_equal(read_torch(path)["t"].read(np.arange(2)), ONE["t"])


DATA = SOUND.storages["0"]
BAD_ZIPS: dict[str, tuple[bytes, str]] = {
    "two bytes": (b"PK", r"starts with b'PK', expected a zip file"),
    "only the first four": (b"PK\3\4", r"holds 4 bytes, fewer than"),
    "nothing but the end": (b"PK\3\4" + bytes(18), r"does not end with a zip directory"),
    "a comment behind the end": (zipped(end={"comment": b"hello"}), r"does not end with a zip directory"),
    "end cut off": (zipped()[:-1], r"does not end with a zip directory"),
    "end in a comment of another": (
        zipped() + zipped(end={"comment": b""})[-22:],
        r"claims bytes .* expected it to end",
    ),
    "several disks": (zipped(end={"disk": 1}), r"one disk of a zip file in several parts"),
    "too many entries claimed": (zipped(end={"count": 60000}), r"claims 60000 entries in \d+ bytes"),
    "a million entries claimed": (zipped(zip64=True, end={"count": 1 << 20}), r"at most 100000 in"),
    "fewer entries claimed": (zipped(end={"count": 3}), r"bytes follow the last of 3 entries"),
    "more entries than there are": (zipped(end={"count": 5}), r"ends within entry 4 of 5"),
    "directory of 2^62 bytes": (zipped(zip64=True, end={"size": 1 << 62}), r"at most 100000 in"),
    "directory at 2^63": (zipped(zip64=True, end={"start": 1 << 63}), r"zip directory claims .* the file holds"),
    "directory elsewhere": (zipped(end={"start": 8}), r"claims bytes 8 to \d+, expected it to end at"),
    "bytes between directory and end": (zipped(end={"before_end": b"abc"}), r"expected it to end at"),
    "two ends that disagree": (zipped(zip64=True, end={"small": (3, 0xFFFFFFFF, 0xFFFFFFFF)}), r"two ends .* disagree"),
    "deflated entry": (zipped(method=8), r"'archive/data/0' is compressed \(method 8\)"),
    "encrypted entry": (zipped(flags=1), r"is encrypted"),
    "unknown flags": (zipped(flags=0x2000), r"has flags 0x2000"),
    "entry on another disk": (zipped(disk=1), r"disk 1"),
    "entry with a comment": (zipped(comment=b"hi"), r"a comment of 2 bytes"),
    "entry longer than its room": (zipped(size=1 << 20), r"claims 1048576 bytes at byte \d+, only"),
    "entry shorter than its room": (zipped(size=8), r"bytes of nobody, or a damaged descriptor"),
    "storage of another size than its numbers": (zipped(data=DATA + b"x"), r"24 bytes; it holds 25"),
    "header and directory disagree in size": (
        zipped(local_size=20),
        r"header of zip entry .* says 20 bytes, the directory 24",
    ),
    "header and directory disagree in name": (
        zipped(local_name=b"archive/data/1"),
        r"differs from the directory in name",
    ),
    "no header where the directory says": (zipped(magic=b"PK\3\5"), r"expected the header of zip entry"),
    "entry that overlaps the one before": (zipped(offset=64), r"claims 239 bytes at byte 64, only 0 are left"),
    "two entries at one place": (zipped("version", offset=0), r"overlaps"),
    "bytes of nobody before an entry": (zipped(before=b"evil"), r"expected \d+: bytes of nobody"),
    "bytes of nobody at the start": (zipped("data.pkl", before=b"PK\3\4"), r"follows 4 bytes of nobody"),
    "missing descriptor": (zipped(flags=0x0808, descriptor=b""), r"bytes of nobody, or a damaged descriptor"),
    "descriptor with another size": (
        zipped(flags=0x0808, descriptor=b"PK\7\10" + struct.pack("<3I", 0, 23, 23)),
        r"damaged descriptor",
    ),
    "descriptor that nobody announced": (zipped(descriptor=b"PK\7\10" + bytes(12)), r"damaged descriptor"),
    "name twice": (zipped(more=[renamed("data/0")]), r"'archive/data/0' stands twice"),
    "name that is no text": (zipped(more=[renamed("a\nb")]), r"has the name b'archive/a\\nb'"),
    "name that is not UTF-8": (zipped(more=[ZipEntry(b"archive/\xff", b"")]), r"has the name"),
    "empty name": (zipped(more=[ZipEntry(b"", b"")]), r"has the name b''"),
    "very long name": (zipped(more=[ZipEntry(b"a" * 5000, b"")]), r"has the name"),
    "extra field cut off": (zipped(central_extra=b"\1\0\x20\0ab"), r"damaged extra field"),
    "zip64 record twice": (zipped(central_extra=struct.pack("<2H2H", 1, 0, 1, 0)), r"damaged extra field"),
    "zip64 size without a record": (zipped(size=0xFFFFFFFF), r"of zip64, but no zip64 record"),
    "zip64 record too short": (
        zipped(size=0xFFFFFFFF, central_extra=struct.pack("<2HI", 1, 4, 0)),
        r"zip64 record of 4 bytes",
    ),
    "no data.pkl": (Zip([renamed("x")]).bytes(), r"holds 0 entries called data.pkl"),
    "two archives in one": (zipped(more=[ZipEntry(b"other/data.pkl", b"x")]), r"holds 2 entries called data.pkl"),
    "TorchScript": (zipped(more=[renamed("constants.pkl")]), r"is a TorchScript program"),
    "big-endian": (zipped("byteorder", data=b"big"), r"byte order b'big'"),
    "damaged data.pkl": (zipped("data.pkl", crc=1234), r"data.pkl does not have the CRC"),
    "before torch 1.6": (pickled(0x1950A86A20F9469CFC6C), r"PyTorch file of before version 1.6.*torch.save"),
    "a tar file": (bytes(257) + b"ustar" + bytes(300), r"before version 1.6"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", r"git-lfs pointer.*git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>", r"starts with b'<!DO', expected a zip file"),
}


@pytest.mark.parametrize("defect", BAD_ZIPS)
def test_bad_zip(tmp_path: Path, defect: str) -> None:
    content, pattern = BAD_ZIPS[defect]
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    refused(read_torch, path, pattern)


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    whole = torch_file(ONE).bytes()
    path = tmp_path / "cut.pth"
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError, match=r"cut\.pth"):
            read_torch(path)


# --------------------------------------------------------------------------------------------------------- the pickle


def state(**items: Any) -> bytes:
    return pickled(Call(ORDERED_DICT, (), items))


def one(*arguments: Any) -> bytes:
    """A state_dict whose tensor was rebuilt with these arguments."""
    return state(t=Call(REBUILD, arguments))


T = storage("0", 6)
REST = (False, Call(ORDERED_DICT, ()))
SYSTEM = Call(Global("os system"), ("touch /tmp/pyllama-was-here",))

BAD_PICKLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"1 bytes expected, only 0 are left"),
    "protocol 4": (pickled({}, protocol=4), r"pickle protocol 4, expected 2"),
    "a function of the system": (pickled(SYSTEM), r"names 'os.system', which no checkpoint needs: nothing is imported"),
    "posix.system": (state(t=Call(Global("posix system"), ("id",))), r"names 'posix.system'"),
    "eval": (pickled(Call(Global("builtins eval"), ("1",))), r"names 'builtins.eval'"),
    "getattr": (state(t=Global("builtins getattr")), r"names 'builtins.getattr'"),
    "torch.load": (state(t=Call(Global("torch load"), ("x",))), r"names 'torch.load'"),
    "a dotted path": (state(t=Global("torch._utils os.system")), r"names 'torch._utils.os.system'"),
    "a name with a line end": (pickled(Raw(b"cos\rsystem\n\n")), r"names 'os\\rsystem.'"),
    "a name without an end": (pickled(Raw(b"c" + b"a" * 10000)), r"does not end within 4096 bytes"),
    "inst": (pickled(Raw(b"(ios\nsystem\n")), r"opcode b'i'"),
    "obj": (pickled(Raw(b"(o")), r"opcode b'o'"),
    "newobj": (pickled(Raw(b"\x81")), r"opcode b'\\x81'"),
    "stack_global": (pickled(Raw(opcodes("os") + opcodes("system") + b"\x93")), r"opcode b'\\x93'"),
    "extension": (pickled(Raw(b"\x82\x01")), r"opcode b'\\x82'"),
    "persistent id as a line": (pickled(Raw(b"P0\n")), r"opcode b'P'"),
    "a call of a number": (pickled(Call(Raw(b"K\1"), ())), r"calls a int"),  # type: ignore[arg-type]
    "a call of a class": (state(t=Call(Global("torch FloatStorage"), ())), r"calls a FloatStorage"),
    "a call with a list": (state(t=Call(ORDERED_DICT, [])), r"calls a OrderedDict with a list"),
    "OrderedDict with arguments": (state(t=Call(ORDERED_DICT, ([("a", 1)],))), r"OrderedDict: 1 arguments"),
    "attributes of a tensor": (
        state(t=Call(REBUILD, (T, 0, (2, 3), (3, 1), *REST), state={"a": 1})),
        r"sets attributes of a _tensor",
    ),
    "attributes from a tuple": (pickled(Call(ORDERED_DICT, (), {}, ({}, {}))), r"attributes from a tuple"),
    "takes from an empty stack": (pickled(Raw(b"R")), r"takes a value that is not there"),
    "takes below a mark": (pickled(Raw(b"K\1(\x85")), r"takes a value that is not there"),
    "no mark": (pickled(Raw(b"K\1t")), r"a mark that is not there"),
    "memo never written": (pickled(Raw(b"h\7")), r"takes value 7, which it never kept"),
    "appends to a number": (pickled(Raw(b"K\1K\2a")), r"appends to a int"),
    "items of a list": (pickled(Raw(b"](K\1K\2u")), r"sets items of a list"),
    "key without a value": (pickled(Raw(b"}(K\1u")), r"a key without a value"),
    "key that is a list": (pickled(Raw(b"}](K\1es")), r"takes a value that is not there|a key that is a list"),
    "key that is a dict": (pickled(Raw(b"}}K\1s")), r"a key that is a dict"),
    "key that is a tuple": (pickled({(): 1}), r"a key that is a tuple"),
    "key twice": (pickled(Raw(b"}(" + 2 * (opcodes("t") + b"K\1") + b"u")), r"key 't' appears twice"),
    "nothing at the end": (b"\x80\2.", r"ends with 0 values"),
    "two values at the end": (pickled(Raw(b"K\1K\2")), r"ends with 2 values"),
    "open mark at the end": (pickled(Raw(b"}(")), r"ends with 1 values"),
    "bytes after the end": (pickled({}) + b"cos\nsystem\n", r"10 bytes follow the end|\d+ bytes follow the end"),
    "no end": (pickled({}, end=b""), r"1 bytes expected, only 0 are left"),
    "text beyond the file": (pickled(Raw(b"X\xff\x0f\0\0abc")), r"4095 bytes expected, only"),
    "text of 4 GiB": (pickled(Raw(b"X\xff\xff\xff\xff")), rf"text of 4294967295 bytes, at most {MAX_TEXT_BYTES}"),
    "text that is not UTF-8": (pickled(Raw(b"X\2\0\0\0\xff\xff")), r"not valid UTF-8"),
    "integer of 255 bytes": (pickled(Raw(b"\x8a\xff" + bytes(255))), r"integer of 255 bytes"),
    "marks without end": (pickled(Raw(b"(" * 1000)), r"nests deeper than 64 levels"),
    "fifty thousand tuples in each other": (pickled(Raw(b"N" + b"\x85" * 50_000)), r"holds a tuple, expected a dict"),
    "a dict that holds itself": (pickled(Raw(b"}q\0" + opcodes("t") + b"h\0s")), r"entry 't' is a dict"),
    "a list": (pickled([1]), r"holds a list, expected a dict"),
    "a tensor alone": (pickled(tensor(T, (2, 3))), r"holds a _tensor, expected a dict"),
    "a number in the dict": (state(t=3), r"entry 't' is a int, expected a tensor"),
    "a dict in the dict": (state(model=Call(ORDERED_DICT, ())), r"entry 'model' is a dict, expected a tensor"),
    "a name that is a number": (pickled({3: tensor(T, (2, 3))}), r"an entry called 3"),
    "an empty name": (pickled({"": tensor(T, (2, 3))}), r"an entry called ''"),
    "storage that is not there": (state(t=tensor(storage("1", 6), (2, 3))), r"storage '1' is not in the file"),
    "storage outside the folder": (
        state(t=tensor(storage("../data.pkl", 6), (2, 3))),
        r"storage '\.\./data.pkl' is not",
    ),
    "storage of another size": (
        state(t=tensor(storage("0", 7), (2, 3))),
        r"claims 7 numbers of F32, 28 bytes; it holds 24",
    ),
    "storage of -6 numbers": (state(t=tensor(storage("0", -6), (2, 3))), r"claims -6 numbers"),
    "storage of 2^62 numbers": (state(t=tensor(storage("0", 2**62), (2, 3))), r"claims 4611686018427387904 numbers"),
    "storage of two types": (
        state(a=tensor(T, (2, 3)), b=tensor(storage("0", 6, "IntStorage"), (2, 3))),
        r"is I32 here and F32 before",
    ),
    "storage of an unknown class": (state(t=tensor(storage("0", 6, "QInt8Storage"), (2, 3))), r"'torch.QInt8Storage'"),
    "storage named by a text": (state(t=Persistent("0")), r"a storage named by a str"),
    "storage named by three parts": (
        state(t=Persistent(("storage", "0", 6))),
        r"a storage named by tuple of str, str, int",
    ),
    "storage whose class is OrderedDict": (
        state(t=Persistent(("storage", ORDERED_DICT, "0", "cpu", 6))),
        r"a storage named by tuple",
    ),
    "tensor without a storage": (one(1, 0, (2, 3), (3, 1), *REST), r"expected a storage, offset, shape"),
    "tensor of three arguments": (one(T, 0, (2, 3)), r"3 arguments, expected a storage"),
    "tensor beyond its storage": (one(T, 0, (2, 4), (4, 1), *REST), r"shape \[2, 4\] over a storage of 6 numbers"),
    "offset beyond its storage": (
        one(T, 1, (2, 3), (3, 1), *REST),
        r"from 1 reaches number 6, but storage '0' holds 6",
    ),
    "strides beyond its storage": (one(T, 0, (2, 3), (4, 1), *REST), r"reaches number 6"),
    "offset of 2^62": (one(T, 2**62, (2, 3), (3, 1), *REST), r"reaches number 4611686018427387909"),
    "product that would wrap to 0": (one(T, 0, (2**32, 2**32), (0, 0), *REST), r"over a storage of 6 numbers"),
    "stride that would wrap": (one(T, 0, (3, 2), (2**62, 1), *REST), r"reaches number 9223372036854775809"),
    "one number a million times": (one(T, 0, (1000, 1000), (0, 0), *REST), r"expected each of its own"),
    "negative offset": (one(T, -1, (2, 3), (3, 1), *REST), r"offset: expected numbers from 0 up, found -1"),
    "negative side": (one(T, 0, (-2, -3), (3, 1), *REST), r"shape: expected numbers from 0 up"),
    "negative stride": (one(T, 5, (2, 3), (-3, 1), *REST), r"strides: expected numbers from 0 up"),
    "side that is a float": (one(T, 0, (2.0, 3), (3, 1), *REST), r"shape: expected numbers from 0 up, found 2.0"),
    "side that is a tuple in tuples": (
        one(T, 0, Raw(b")" + b"\x85" * 5001), (1,), *REST),
        r"shape: expected numbers from 0 up, found tuple",
    ),
    "side that would be printed for ever": (
        one(T, 0, Raw(b")" + b"q\0h\0\x86" * 60), (1,), *REST),
        r"shape: expected numbers from 0 up, found tuple, tuple",
    ),
    "side that is true": (one(T, 0, (True, 3), (3, 1), *REST), r"shape: expected numbers"),
    "shape that is a list": (one(T, 0, [2, 3], (3, 1), *REST), r"shape: a list, expected a tuple"),
    "shape of nine sides": (one(T, 0, (1,) * 9, (1,) * 9, *REST), r"a tuple of at most 8"),
    "more strides than sides": (one(T, 0, (2, 3), (3, 1, 1), *REST), r"a shape of 2 numbers with 3 strides"),
    "empty tensor": (one(T, 0, (0, 3), (3, 1), *REST), r"shape \[0, 3\]"),
    "conjugate bit": (one(T, 0, (2, 3), (3, 1), *REST, {"conj": True}), r"conjugate, negative or other bits"),
    "a parameter of a number": (
        state(t=Call(Global("torch._utils _rebuild_parameter"), (3, True, None))),
        r"_rebuild_parameter: 3 arguments",
    ),
}


def test_a_storage_is_no_model_of_many_tensors(tmp_path: Path) -> None:
    """A few bytes of pickle must not make a tensor: what is written would have no bound."""
    place = storage("0", 2048)
    path = tmp_path / "many.bin"

    def write(**items: Any) -> None:
        path.write_bytes(TorchFile(state(**items), {"0": bytes(4 * 2048)}).bytes())

    write(a=tensor(place, (32, 64)), b=tensor(place, (32, 64)))  # a head that is the embedding
    assert list(read_torch(path)) == ["a", "b"]
    write(**{f"t{i}": tensor(place, (16, 64), offset=512 * (i % 3)) for i in range(5)})
    refused(read_torch, path, r"tensor 't4' and others before it take 5120 numbers of storage '0', which holds 2048")
    table = TorchFile(state(**{f"t{i}": tensor(T, (6,)) for i in range(100)}), {"0": bytes(24)})
    path.write_bytes(table.bytes())  # rotary frequencies that all layers share
    assert len(read_torch(path)) == 100


def test_messages_show_a_bounded_part_of_what_is_nested() -> None:
    deep: Any = ()
    for _ in range(100_000):
        deep = (deep,)
    wide: Any = "x"
    for _ in range(60):
        wide = [wide, {"a": wide}]
    for value in (deep, wide, list(range(1 << 20)), dict.fromkeys(range(1000), "y" * 1000)):
        assert len(shown(value)) <= 81
    assert shown(["é\n", 1, None, {"a": [2.5]}]) == r"['\xe9\n', 1, None, {'a': [2.5]}]"
    assert shown("é" * 100) == "'" + r"\xe9" * 19 + "\\xe…"


@pytest.mark.parametrize("defect", BAD_PICKLES)
def test_bad_pickle(tmp_path: Path, defect: str) -> None:
    pickle, pattern = BAD_PICKLES[defect]
    path = tmp_path / "bad.pth"
    path.write_bytes(TorchFile(pickle, SOUND.storages).bytes())
    refused(read_torch, path, pattern)


def test_a_pickle_larger_than_any_checkpoint_needs(tmp_path: Path) -> None:
    path = tmp_path / "large.pth"
    path.write_bytes(TorchFile(bytes((1 << 24) + 1), {}).bytes())
    refused(read_torch, path, r"data.pkl holds 16777217 bytes, at most")


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ("MAX_VALUES", b"N" * 1001),
        ("MAX_VALUES", b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(1001))),
        ("MAX_OPCODES", b"N" + b"\x85" * 1001),
    ],
)
def test_pickles_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, code: bytes) -> None:
    assert getattr(pickles, limit) >= 1 << 18  # ten times what the largest models need
    monkeypatch.setattr(pickles, limit, 1000)
    path = tmp_path / "long.pth"
    path.write_bytes(TorchFile(pickled(Raw(code)), {}).bytes())
    refused(read_torch, path, r"more than 1000 (values|steps)")


FROM_AUDIT = """
import sys
from pathlib import Path
from quantize.readers import open_source

seen = []
started = False

def hook(event, arguments):
    if started and event.split(".")[0] in ("socket", "subprocess", "ctypes", "pickle", "marshal", "exec", "compile"):
        seen.append(event)
    if started and event in ("import", "os.system", "os.exec", "os.fork", "os.posix_spawn"):
        seen.append(f"{event} {arguments[0]}")

sys.addaudithook(hook)
for path in sys.argv[1:3]:  # what is imported lazily, is imported by now
    source = open_source(path)
    values = [tensor.read() for tensor in source.tensors.values()]
    source.tokenizer_files()
started = True
for path in sys.argv[1:]:
    try:
        source = open_source(path)
        values = [tensor.read() for tensor in source.tensors.values()]
        source.tokenizer_files()
        print("read", Path(path).name)
    except Exception as error:
        print(type(error).__name__, Path(path).name)
started = False
print("seen", seen)
print("torch" in sys.modules, "zipfile" in sys.modules)
"""


def test_nothing_is_run_imported_or_fetched_while_loading(tmp_path: Path) -> None:
    """A sound folder of Meta's, one of Hugging Face's, and evil ones; Python itself reports what is done."""
    meta = write_meta_folder(tmp_path / "meta", meta_params(SMALL), meta_shards(SMALL, WEIGHTS), "F32")
    hf = make.write_hf_folder(tmp_path / "hf", SMALL, WEIGHTS)
    (hf / "model.safetensors").unlink()
    names = {make.hf_name(name): values for name, values in WEIGHTS.items()}
    (hf / "pytorch_model.bin").write_bytes(torch_file(names).bytes())
    mark = tmp_path / "was-here"
    evil = []
    for name, call in {
        "system": Call(Global("os system"), (f"touch {mark}",)),
        "eval": Call(Global("builtins eval"), (f"open({str(mark)!r}, 'w')",)),
        "open": Call(Global("io open"), (str(mark), "w")),
        "socket": Call(Global("socket create_connection"), (("127.0.0.1", 9),)),
        "import": Call(Global("importlib import_module"), ("antigravity",)),
    }.items():
        folder = write_meta_folder(tmp_path / name, meta_params(SMALL), [{}])
        bad = TorchFile(pickled({"tok_embeddings.weight": call}))
        (folder / "consolidated.00.pth").write_bytes(bad.bytes())
        evil.append(folder)
    paths = [str(path) for path in (meta, hf, *evil)]
    command = [sys.executable, "-c", FROM_AUDIT, *paths]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert out[:2] == ["read meta", "read hf"]
    assert out[2:7] == [f"ModelFormatError {path.name}" for path in evil]
    assert out[7:] == ["seen []", "False False"], out
    assert not mark.exists()
