"""
Make a data folder for train.py out of text, or out of token files that you have or download.

    python prepare_data.py                              Python's standard library: no network
    python prepare_data.py book.txt                     your text, a token a byte, to data/book
    python prepare_data.py books/ --tokenizer=gpt2      a folder of texts, in GPT-2's tokens
    python prepare_data.py train.jsonl --val=val.jsonl  with validation text of your own
    python prepare_data.py shards/ --tokenizer=gpt2     token files of llm.c or nanoGPT, as they are
    python prepare_data.py fineweb --tokens=1e9         web pages in GPT-2's tokens: 2 GB
    python prepare_data.py fineweb_edu --tokens=1e9     educational web pages, likewise
    python prepare_data.py shakespeare                  his plays: 1.1 MB

A text is a .txt, .md or .jsonl file in UTF-8, or in UTF-16 with a byte order mark. It may be packed
by gzip, as in book.txt.gz. A document ends with its file, at a line `<|endoftext|>`, or with its
line of a .jsonl file. The tokenizer's end-of-text token follows each; "byte" has none.

A data folder holds meta.json, in which these entries are needed:

    {"tokenizer": "gpt2", "vocab_size": 50257, "train": {"tokens": 9000}, "val": {"tokens": 1000}}

The tokens are in train.bin and val.bin, or in other files: "train": {"shards": {file: tokens}}.
A token file has llm.c's format: 256 little-endian int32 (magic, version, number of tokens, zeros),
then the tokens. With "format": "uint16" a split's files are nanoGPT's: tokens alone. "tokenizer"
may be null; then there is no sample. "bytes", of the text in "val", gives bits per byte.
"""
import argparse
import codecs
import contextlib
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing.pool
import os
import re
import shlex
import shutil
import sys
import sysconfig
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import tiktoken
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Constants

SPLITS = ("train", "val")

# token files
FORMATS = {                     # (magic, version): type of a token
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}
HEADER_BYTES = 256 * 4
MAX_TOKENS = 2 ** 31 - 1        # that the header can count
RAW = "uint16"                  # the "format" of files without a header, as nanoGPT writes them

# text
ENDINGS = (".txt", ".md", ".jsonl")
MARK = "<|endoftext|>"          # a line that ends a document; tiktoken's name of the token, too
MARK_LINE = re.compile(rf"^{re.escape(MARK)}[ \t]*\n?", re.MULTILINE)
SURROGATE = re.compile("[\ud800-\udfff]")
BYTE_ORDER_MARKS = {            # UTF-32's first: one of them begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
NOT_TEXT = {                    # first bytes: what the file is
    b"PK\x03\x04": "a zip file, as .docx and .epub are",
    b"%PDF-": "a PDF file",
    b"\xfd7zXZ\x00": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"BZh91AY&SY": "a bzip2 file",
    b"\x1f\x8b": "packed by gzip twice",
}
CHUNK = 2 ** 20                 # characters in a piece of text
VAL_ONE_IN = 20                 # one part in 20 of the text is for validation
SPLIT_BY_FILE_FROM = 200        # of so many files or more, each goes to one split as a whole
OUTPUT_FILES = ("train.bin", "val.bin", "meta.json")    # what is made of text
UNFINISHED = "unfinished.json"      # is there while these files get their names

# tiktoken's regular expressions overflow their stack at a run of a million blanks. The look-behind
# keeps the search linear in the length of the text.
BLANKS = re.compile(r"(?<!\s)\s{500000}")

# downloads
FINEWEB = {                     # name: (address, a file's name, number of training shards)
    "fineweb": ("https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/",
                "fineweb_{split}_{number:06d}.bin", 103),
    "fineweb_edu": ("https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards"
                    "/resolve/main/", "edu_fineweb_{split}_{number:06d}.bin", 1001),
}
SHARD_TOKENS = 100_000_000      # in each of these files; the last may have fewer
GPT2_VOCABULARY = 50257
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATIENCE = 8                    # seconds to wait for a server's answer, and then for more of it
ATTEMPTS = 5                    # to download a file
BACKOFF = 1                     # seconds before the second attempt


def require(condition, sentence):
    if not condition:
        raise ValueError(sentence)


# ------------------------------------------------------------------------------------------------
# Files


def sync(path):
    """Returns once the file, or the folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_aside(path, write):
    """Calls write(binary file). Whatever happens meanwhile, path is the old file or the whole new
    one, on the disk."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        sync(temporary)
        os.replace(temporary, path)
        sync(Path(path).parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    content = json.dumps(value, indent=1).encode() + b"\n"
    write_aside(path, lambda file: file.write(content))


def read_json(path):
    """The value in a file of JSON, or None if the file is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None


def sha256(path):
    """The sha256 of a file, in hexadecimal."""
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


def command(*words):
    """The text of a command of this script. meta.json records it as "made_by"."""
    return shlex.join(["prepare_data.py", *map(str, words)])


def made_by(folder):
    """The command that made a data folder, or None if prepare_data.py did not make it."""
    for name in ("meta.json", UNFINISHED):
        meta = read_json(Path(folder, name))
        if isinstance(meta, dict):
            return meta.get("made_by")
    return None


def refuse_foreign(out, names, maker):
    """Raises ValueError if the folder out has one of these files and another maker."""
    present = [name for name in names if os.path.lexists(out / name)]
    owner = made_by(out)
    if not present or owner == maker:
        return
    choices = "choose another folder with --out=, or replace them with --overwrite"
    require(owner is None, f"{out} holds the data of `{owner}`; {choices}")
    raise ValueError(f"{out} holds {' and '.join(present)}, not made by prepare_data.py; {choices}")


@contextlib.contextmanager
def claimed(out, names, maker, overwrite=False, wait=False):
    """Makes and locks the folder out, for a command that may write files of these names there.
    Raises ValueError if the files are not its own, or if another process writes there."""
    if not overwrite:
        refuse_foreign(out, names, maker)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as lock:
        how = fcntl.LOCK_EX
        if not wait:
            how |= fcntl.LOCK_NB
        try:
            fcntl.flock(lock, how)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {out}") from None
        if not overwrite:
            refuse_foreign(out, names, maker)       # another process may have written meanwhile
        yield


# ------------------------------------------------------------------------------------------------
# Token files and data folders


def header(path):
    """(magic, version, number of tokens) of a token file; zeros for what a short file lacks."""
    numbers = np.fromfile(path, dtype="<i4", count=3).tolist()
    return tuple(numbers + [0] * (3 - len(numbers)))


def read_tokens(path, expected=None, raw=False):
    """Tokens of a token file: a read-only memory map of uint16 or uint32, shape (tokens,). A raw
    file has no header. Raises ValueError if the file is missing or is no token file. Also if its
    length is not what its header says, or not `expected` tokens."""
    require(os.path.isfile(path), f"{path} is missing")
    size = os.path.getsize(path)
    if raw:
        dtype = np.dtype("<u2")
        offset = 0
        require(size > 0 and size % 2 == 0, f"{path} has {size:,} bytes, no tokens of two")
        tokens = size // 2
    else:
        magic, version, tokens = header(path)
        dtype = FORMATS.get((magic, version))
        offset = HEADER_BYTES
        require(dtype is not None and size >= HEADER_BYTES,
                f"{path} is not a token file with a header; if it is one of nanoGPT, "
                "`python prepare_data.py FOLDER --tokenizer=NAME` takes its folder as it is")
        require(size == offset + tokens * dtype.itemsize,
                f"{path} was cut: its {size:,} bytes cannot be {tokens:,} tokens")
    require(expected in (None, tokens),
            f"{path} has {tokens:,} tokens, but meta.json says {expected}")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(tokens,))


class Stream:
    """Arrays of tokens as one: len(stream), and stream[start:stop], which may cross from an array
    to the next."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, piece):
        first = np.searchsorted(self.ends, piece.start, side="right")
        last = np.searchsorted(self.ends, piece.stop - 1, side="right")
        parts = []
        for i in range(first, last + 1):
            array = self.arrays[i]
            begin = self.ends[i] - len(array)
            parts.append(array[max(0, piece.start - begin):piece.stop - begin])
        return np.concatenate(parts)


def scan(files, vocab_size):
    """(largest token, sha256 of the files one after the other) of files, {path: tokens}. Raises
    ValueError if a token is not in the vocabulary."""
    largest = 0
    digest = hashlib.sha256()
    for path, tokens in tqdm(files.items(), desc="checking", unit=" files", delay=2):
        in_file = int(tokens.max(initial=0))
        require(in_file < vocab_size, f"{path} has the token {in_file:,}, but a vocabulary of "
                                      f"{vocab_size:,} ends at {vocab_size - 1:,}")
        largest = max(largest, in_file)
        digest.update(np.memmap(path, np.uint8, "r"))
    return largest, digest.hexdigest()


def is_count(value):
    return type(value) is int and value >= 0        # True is no number here


def read_meta(folder):
    """The content of a data folder's meta.json. Raises ValueError if it is missing or not right."""
    path = folder / "meta.json"
    if not path.is_file():
        owner = made_by(folder)
        require(owner is None, f"{folder} is not finished; repeat its command: python {owner} "
                               f"--out={folder}")
        raise ValueError(f"{folder} is no data folder (it has no meta.json); make one with "
                         "prepare_data.py")
    meta = read_json(path)
    require(isinstance(meta, dict), f"{path} is damaged: it is no object of JSON")

    vocab_size = meta.get("vocab_size")
    require(is_count(vocab_size) and vocab_size > 0,
            f'{path}: "vocab_size" must be a number above 0, not {vocab_size!r}')
    # Training needs no tokenizer, so that a file without one is right. Its name is checked here,
    # and not only at the sample after the last step.
    tokenizer = meta.setdefault("tokenizer", None)
    require(tokenizer is None or tokenizer in tokenizer_names(),
            f'{path}: "tokenizer" must be null or one of {", ".join(tokenizer_names())}, '
            f"not {tokenizer!r}")
    for split in SPLITS:
        require(isinstance(meta.get(split), dict), f'{path}: "{split}" is missing, or no object')
        check_split(meta[split], f'{path}: "{split}"')
    return meta


def check_split(entry, name):
    """Raises ValueError if meta.json's entry of a split is not right. Fills in what may lack."""
    shards = entry.get("shards")
    if shards is None:
        require(is_count(entry.get("tokens")),
                f'{name} needs its number of "tokens", not {entry.get("tokens")!r}')
    else:
        require(isinstance(shards, dict) and shards and all(map(is_count, shards.values())),
                f'{name}: "shards" must be {{file: number of tokens, …}}')
        total = sum(shards.values())
        require(entry.setdefault("tokens", total) == total,
                f'{name}: "tokens" is {entry["tokens"]!r}, but its shards have {total:,}')
    num_bytes = entry.setdefault("bytes", None)     # unknown: then there are no bits per byte
    require(num_bytes is None or is_count(num_bytes) and num_bytes > 0,
            f'{name}: "bytes" must be null or a number above 0, not {num_bytes!r}')
    require(entry.get("format") in (None, RAW),
            f'{name}: "format" can only be "{RAW}", not {entry.get("format")!r}')
    largest = entry.get("largest")
    require(largest is None or is_count(largest),
            f'{name}: "largest" must be a number, not {largest!r}')
    digest = entry.get("sha256")
    require(digest is None or isinstance(digest, str),
            f'{name}: "sha256" must be a text, not {digest!r}')


def open_split(folder, split, entry):
    """The token files of a split, {path: tokens}. Raises ValueError if one is not right."""
    shards = entry.get("shards") or {f"{split}.bin": entry["tokens"]}
    raw = entry.get("format") == RAW
    # a shard's name may be an absolute path, which joining leaves as it is
    return {folder / name: read_tokens(folder / name, tokens, raw)
            for name, tokens in shards.items()}


def read_folder(folder):
    """(train Stream, val Stream, meta.json's content) of a data folder. Raises ValueError if a file
    is not right, or has a token outside the vocabulary."""
    folder = Path(os.path.expanduser(folder))
    try:
        meta = read_meta(folder)
        streams = []
        for split in SPLITS:
            entry = meta[split]
            files = open_split(folder, split, entry)
            # prepare_data.py records both; a file that somebody wrote may lack them
            known = entry.get("sha256") is not None and entry.get("largest") is not None
            if not known or entry["largest"] >= meta["vocab_size"]:
                entry["largest"], entry["sha256"] = scan(files, meta["vocab_size"])
            streams.append(Stream(list(files.values())))
        return streams[0], streams[1], meta
    except OSError as error:        # no permission, say
        raise ValueError(str(error)) from None


def fingerprint(meta):
    """16 characters that identify the tokens of both splits. meta: as read_folder returns it."""
    both = meta["train"]["sha256"] + meta["val"]["sha256"]
    # a letter first: a spreadsheet would rewrite 4128e517 as a number
    return "t" + hashlib.sha256(both.encode()).hexdigest()[:15]


# ------------------------------------------------------------------------------------------------
# Text

END = None      # among the pieces of a text: a document ends here
CUT = "\ufffd"  # how a character of which bytes are lacking is decoded


@dataclass
class Text:
    path: Path
    name: str                   # its path in the folder that was given
    field: str = "text"         # of a .jsonl file
    marks: bool = True          # lines <|endoftext|> end documents, and are no text
    encoding: str = ""          # filled in by measure, as are the characters
    characters: int = 0
    for_training: int = 0       # so many of its first characters; the rest is for validation


def ending(path):
    """The ending of a file's name, without .gz and in lower case."""
    return os.path.splitext(path.name.lower().removesuffix(".gz"))[1]


def stem(path):
    """A file's name without its ending and .gz."""
    without_gz = len(path.name.lower().removesuffix(".gz"))
    return path.name[:without_gz - len(ending(path))]


def walk(folder):
    """Paths of the files below a folder. Links are followed, but no folder is visited twice."""
    def fail(error):
        raise error

    visited = set()
    paths = []
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders.sort()          # so that the same one of two ways to a folder is taken everywhere
        if os.path.realpath(place) in visited:
            folders.clear()
        else:
            visited.add(os.path.realpath(place))
            paths += [Path(place, name) for name in files]
    return sorted(paths)


def without_others(texts, others, left_out):
    """The texts whose files are not among those of others. The rest goes to left_out."""
    elsewhere = {text.path.resolve() for text in others}
    kept = []
    for text in texts:
        if text.path.resolve() in elsewhere:
            left_out[text.name] = "it is for validation"
        else:
            kept.append(text)
    return kept


def find_texts(source):
    """(texts, left out) of a text file or a folder: a list of Text, and {file's name: the reason}.
    Raises ValueError if there is none."""
    source = Path(source)
    allowed = ", ".join(ENDINGS[:-1]) + " or " + ENDINGS[-1]
    require(os.path.lexists(source), f"there is no file or folder {source}; what can be downloaded "
                                     "is fineweb, fineweb_edu and shakespeare")
    if not source.is_dir():
        require(source.is_file(), f"{source} is neither a file nor a folder")
        require(ending(source) in ENDINGS, f"{source} is not taken: the name of a text ends in "
                f"{allowed}, each perhaps with .gz; of token files give the folder")
        return [Text(source, source.name)], {}

    texts = []
    left_out = {}
    for path in walk(source):
        name = str(path.relative_to(source))
        if not path.is_file():
            left_out[name] = "no file, or a broken link"
        elif ending(path) not in ENDINGS:
            left_out[name] = f"not {allowed}"
        else:
            texts.append(Text(path, name))
    require(texts or not made_by(source), f"{source} is a data folder already: python train.py "
                                          f"--data={shlex.quote(str(source))}")
    require(texts, f"{source} has no text ({allowed}) and no token files (*train*.bin, *val*.bin)")
    return texts, left_out


def is_packed(path):
    """Whether a file is gzip's, by its first bytes, whatever its name."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


@contextlib.contextmanager
def open_bytes(path):
    """The content of a file, unpacked. Raises ValueError if it is packed and damaged."""
    how = open
    if is_packed(path):
        how = gzip.open
    try:
        with how(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def to_utf8(path, encoding):
    """The command that converts a file to UTF-8."""
    old = shlex.quote(str(path))
    new = shlex.quote(str(path.with_name(stem(path) + ".utf8" + ending(path))))
    if is_packed(path):
        return f"gzip -dc < {old} | iconv -f {encoding} -t utf-8 > {new}"
    return f"iconv -f {encoding} -t utf-8 {old} > {new}"


def detect_encoding(path):
    """The name of a text's encoding, by its first bytes. Raises ValueError if it is no text."""
    with open_bytes(path) as file:
        start = file.read(4096)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding
    for mark, what in NOT_TEXT.items():
        require(not start.startswith(mark), f"{path} is {what}; unpack it or save it as text first")
    zero = start.find(0)
    if zero >= 0:
        encoding = "utf-16be"
        if zero % 2:        # the second byte of a Latin letter
            encoding = "utf-16le"
        raise ValueError(f"{path} has a zero byte at byte {zero + 1}: it is no text, or UTF-16 "
                         f"without a byte order mark, for which {to_utf8(path, encoding)} helps")
    return "utf-8"


def undecodable(path, encoding):
    """The sentence about a file that is not in its encoding: the place, and what to do."""
    encoding = encoding.removesuffix("-sig")
    advice = f"if it is Windows-1252, {to_utf8(path, 'windows-1252')} converts it"
    done = 0
    with open_bytes(path) as lines:
        if encoding != "utf-8":
            advice = f"{to_utf8(path, encoding + ' -c')} leaves out what is damaged"
            lines = [lines.read()]      # the byte of a line's end may belong to another character
        for number, line in enumerate(lines, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                number += line[:error.start].decode(encoding).count("\n")
                return (f"{path} is not {encoding.upper()} at line {number:,}, byte "
                        f"{done + error.start + 1:,} ({line[error.start]:#04x}); {advice}")
            done += len(line)


def text_pieces(file):
    """Yields a text in pieces that end where a line does, or after 2 CHUNK characters of one."""
    while True:
        piece = file.read(CHUNK) + file.readline(CHUNK)
        if not piece:
            return
        yield piece


def plain_documents(file, marks):
    for piece in text_pieces(file):
        parts = [piece]
        if marks:
            parts = MARK_LINE.split(piece)
        yield parts[0]
        for part in parts[1:]:
            yield END
            yield part
    yield END


def json_documents(file, path, field):
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        require(isinstance(value, dict) and isinstance(value.get(field), str),
                f'{path}, line {number:,}: no JSON object with a text "{field}" '
                "(--field=NAME chooses another)")
        require(not SURROGATE.search(value[field]),
                f"{path}, line {number:,}: half of a surrogate pair, which is no character")
        yield from text_pieces(io.StringIO(value[field], newline=None))
        yield END


def documents(text):
    """Yields the pieces of a text, with END after each document; empty ones are left out. Raises
    ValueError if the text is damaged or not in its encoding."""
    errors = "strict"
    if ending(text.path) == ".py":
        # Python's standard library: measurements rest on these bytes, which stay what they were
        errors = "replace"
    last = END
    try:
        with open_bytes(text.path) as raw:
            with io.TextIOWrapper(raw, encoding=text.encoding, errors=errors) as file:
                if ending(text.path) == ".jsonl":
                    pieces = json_documents(file, text.path, text.field)
                else:
                    pieces = plain_documents(file, text.marks)
                for piece in pieces:
                    empty = piece == "" or piece is END and last is END
                    if not empty:
                        yield piece
                        last = piece
    except UnicodeDecodeError:
        raise ValueError(undecodable(text.path, text.encoding)) from None


def measure(texts, progress=True):
    """Fills in each text's encoding and number of characters. Raises ValueError for a bad one.
    Returns how many marks are in the text itself."""
    marks = 0
    with tqdm(desc="reading", unit=" characters", unit_scale=True, disable=not progress) as bar:
        for text in texts:
            text.encoding = "utf-8"
            if ending(text.path) != ".py":
                text.encoding = detect_encoding(text.path)
            for piece in documents(text):
                if piece is not END:
                    text.characters += len(piece)
                    marks += piece.count(MARK)
                    bar.update(len(piece))
    return marks


# ------------------------------------------------------------------------------------------------
# Tokenizers


class ByteTokenizer:
    """A token is a byte of UTF-8."""
    name = "byte"
    vocab_size = 256
    end_of_text = None

    def encode(self, text):
        # a prompt on the command line may hold what is no character
        return np.frombuffer(text.encode(errors="replace"), np.uint8)

    def decode(self, tokens):
        return bytes(list(tokens)).decode(errors="replace")

    def bytes_per_token(self):
        return np.ones(256, dtype=np.int64)


class Tokenizer:
    """An encoding of tiktoken."""

    def __init__(self, name, encoding):
        self.name = name
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.end_of_text = None
        if MARK in encoding.special_tokens_set:
            self.end_of_text = encoding.eot_token

    def encode(self, text):
        """The tokens of a text. Raises ValueError if tiktoken cannot take it."""
        require(not BLANKS.search(text), "500,000 blanks or more in a row, too many for tiktoken")
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":    # of Rust; it is no Exception
                raise
            raise ValueError(f"tiktoken cannot take this text ({error})") from None

    def decode(self, tokens):
        return self.encoding.decode(list(tokens))

    def bytes_per_token(self):
        """How many bytes of text each token stands for, shape (vocab_size,)."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(self.vocab_size):
            with contextlib.suppress(KeyError):     # some numbers are no token
                lengths[token] = len(self.encoding.decode_single_token_bytes(token))
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0
        return lengths


def tokenizer_names():
    return ["byte", *tiktoken.list_encoding_names()]


def get_tokenizer(name):
    """The Tokenizer of this name: "byte" or an encoding of tiktoken. It has encode(text),
    decode(tokens), vocab_size and end_of_text (a token or None). Raises ValueError if there is none
    of this name, or no way to its vocabulary."""
    require(name in tokenizer_names(),
            f"there is no tokenizer {name!r}; choose one of {', '.join(tokenizer_names())}")
    if name == "byte":
        return ByteTokenizer()
    hint = ("set TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled elsewhere, or use "
            "--tokenizer=byte, or --vocab_size=N for tokens that you have")
    return Tokenizer(name, in_time(hint, tiktoken.get_encoding, name))


# ------------------------------------------------------------------------------------------------
# Splitting


def share_out(texts):
    """Fills in how much of each text is for training. Of SPLIT_BY_FILE_FROM or more each text goes
    to one split, by a hash of its name, and stays there when others are added. Of fewer the last
    part of each is for validation."""
    for text in texts:
        if len(texts) < SPLIT_BY_FILE_FROM:
            text.for_training = round(text.characters * (1 - 1 / VAL_ONE_IN))
        elif zlib.crc32(os.fsencode(text.name)) % VAL_ONE_IN != 0:
            text.for_training = text.characters


class Piece(NamedTuple):
    split: str
    content: str | None     # END, or some text
    path: Path


def split_text(text):
    """Yields the Pieces of a text. In both splits the last is END."""
    left = text.for_training        # characters
    split = "train" if left > 0 else "val"
    for content in documents(text):
        if content is END:
            yield Piece(split, END, text.path)
            if left == 0:
                split = "val"
            continue
        if split == "val":
            yield Piece("val", content, text.path)
            continue
        for_training = content[:left]
        for_validation = content[left:]
        left -= len(for_training)
        if for_training:
            yield Piece("train", for_training, text.path)
        if for_validation:
            # the border falls into this document
            yield Piece("train", END, text.path)
            yield Piece("val", for_validation, text.path)
            split = "val"


# ------------------------------------------------------------------------------------------------
# Writing


class TokenFile:
    """A token file that grows under the name path.tmp. `publish` gives it its own."""

    def __init__(self, path, vocab_size):
        self.temporary = Path(f"{path}.tmp")
        self.format = (20240520, 1)
        if vocab_size > 2 ** 16:
            self.format = (20240801, 7)
        self.dtype = FORMATS[self.format]
        self.tokens = 0
        self.bytes = 0
        self.largest = 0
        self.file = open(self.temporary, "wb")
        self.file.seek(HEADER_BYTES)

    def append(self, tokens, num_bytes):
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.tokens += len(tokens)
        self.bytes += num_bytes
        self.largest = max(self.largest, int(tokens.max(initial=0)))

    def finish(self):
        """Writes the header. Returns meta.json's entry."""
        self.file.seek(0)
        self.file.write(np.array([*self.format, self.tokens], "<i4").tobytes())
        self.file.close()
        sync(self.temporary)
        return {"tokens": self.tokens, "bytes": self.bytes, "largest": self.largest,
                "sha256": sha256(self.temporary)}

    def discard(self):
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def batches(pieces):
    """Yields lists of pieces that have CHUNK characters together: the work of a thread."""
    batch = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.content or "")
        if size >= CHUNK:
            yield batch
            batch = []
            size = 0
    yield batch


def encode_batch(tokenizer, batch):
    """[(split, tokens, bytes of text), …] of Pieces. Raises ValueError naming a bad file."""
    encoded = []
    for split, content, path in batch:
        if content is not END:
            try:
                tokens = tokenizer.encode(content)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            encoded.append((split, np.asarray(tokens), len(content.encode())))
        elif tokenizer.end_of_text is not None:
            encoded.append((split, np.array([tokenizer.end_of_text]), 0))
    return encoded


def write_tokens(texts, tokenizer, files, progress):
    """Appends the tokens of all texts to files, {split: TokenFile}. A thread a core encodes."""
    threads = os.cpu_count()
    work = batches(itertools.chain.from_iterable(map(split_text, texts)))
    total = sum(text.characters for text in texts)
    bar = tqdm(total=total, desc="encoding", unit=" characters", unit_scale=True, mininterval=1,
               disable=not progress)
    with bar, ThreadPoolExecutor(threads) as pool:
        while True:
            some = list(itertools.islice(work, threads))
            if not some:
                return
            for encoded in pool.map(encode_batch, itertools.repeat(tokenizer), some):
                for split, tokens, num_bytes in encoded:
                    files[split].append(tokens, num_bytes)
            for batch in some:
                bar.update(sum(len(piece.content or "") for piece in batch))


def unchanged(out, meta):
    """Whether the folder out already holds just these files."""
    if read_json(out / "meta.json") != meta:
        return False
    for split in SPLITS:
        path = out / f"{split}.bin"
        if not path.is_file() or sha256(path) != meta[split]["sha256"]:
            return False
    return True


def publish(out, meta):
    """Gives two finished token files their names and writes meta.json. If a kill comes between,
    there is no meta.json, and the same command mends that: see made_by."""
    if not unchanged(out, meta):        # else leave them: other processes may be reading
        write_json(out / UNFINISHED, {"made_by": meta["made_by"]})
        (out / "meta.json").unlink(missing_ok=True)
        for split in SPLITS:
            os.replace(out / f"{split}.bin.tmp", out / f"{split}.bin")
        sync(out)
        write_json(out / "meta.json", meta)
    (out / UNFINISHED).unlink(missing_ok=True)


def write_folder(texts, out, maker, tokenizer, progress=True):
    """Writes train.bin, val.bin and meta.json to the folder out; returns meta.json's content. Raises
    ValueError if a split has no text, or more tokens than a file can hold."""
    meta = {
        "made_by": maker,
        "files": len(texts),
        "encodings": Counter(text.encoding for text in texts),
        "characters": sum(text.characters for text in texts),
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
    }
    files = {}
    try:
        for split in SPLITS:
            files[split] = TokenFile(out / f"{split}.bin", tokenizer.vocab_size)
        write_tokens(texts, tokenizer, files, progress)
        for split, file in files.items():
            require(file.bytes > 0, f"{meta['characters']:,} characters, from {texts[0].path} on, "
                                    f"are too few: none is left for {split}")
            require(file.tokens <= MAX_TOKENS, f"{file.tokens:,} tokens for {split} are too many: "
                                               f"a file can hold {MAX_TOKENS:,}")
            meta[split] = file.finish()
        publish(out, meta)
    finally:
        for file in files.values():
            file.discard()
    return meta


def without_empty(texts, left_out):
    """The texts that are not empty. The others go to left_out."""
    for text in texts:
        if text.characters == 0:
            left_out[text.name] = "empty"
    return [text for text in texts if text.characters > 0]


def prepare_text(source, out, tokenizer="byte", val=None, field="text", overwrite=False,
                 progress=True):
    """Makes a data folder of a text or a folder of texts; returns its meta.json's content. val: a
    text or a folder for validation. Raises ValueError with one sentence if anything is not right."""
    out = Path(out)
    tokenizer = get_tokenizer(tokenizer)
    words = [os.path.abspath(source), f"--tokenizer={tokenizer.name}"]
    if val:
        words.append(f"--val={os.path.abspath(val)}")
    if field != "text":
        words.append(f"--field={field}")
    maker = command(*words)

    texts, left_out = find_texts(source)
    val_texts = []
    if val:
        val_texts, left_out_of_val = find_texts(val)
        left_out.update(left_out_of_val)
        texts = without_others(texts, val_texts, left_out)
        require(texts, f"{source} has no text beside that of {val}")
    for text in texts + val_texts:
        text.field = field
        text.marks = tokenizer.end_of_text is not None

    with claimed(out, OUTPUT_FILES, maker, overwrite):
        marks = measure(texts + val_texts, progress)
        texts = without_empty(texts, left_out)
        val_texts = without_empty(val_texts, left_out)
        require(texts, f"{source} is empty")
        require(val_texts or not val, f"{val} is empty")
        say_left_out(left_out)
        if marks > 0:
            print(f"{MARK} stays text in {marks:,} places: it ends a document only as a line of "
                  "its own, and if the tokenizer has an end-of-text token")
        if val:
            for text in texts:
                text.for_training = text.characters
        else:
            share_out(texts)
        return write_folder(texts + val_texts, out, maker, tokenizer, progress)


def prepare_stdlib(out="data/stdlib", progress=True, tokenizer="byte", overwrite=False):
    """Makes a data folder of Python's standard library, without its tests and what is installed
    beside it; returns its meta.json's content. A second process waits for the first."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not skipped & set(name.parts):
            texts.append(Text(path, str(name), marks=False))
    out = Path(out)
    maker = command(f"--tokenizer={tokenizer}")
    with claimed(out, OUTPUT_FILES, maker, overwrite, wait=True):
        measure(texts, progress)
        share_out(texts)
        return write_folder(texts, out, maker, get_tokenizer(tokenizer), progress)


def say_left_out(left_out):
    """Prints the names of files that are left out, {name: reason}: a line a reason."""
    names_by_reason = {}
    for name, reason in left_out.items():
        names_by_reason.setdefault(reason, []).append(name)
    for reason, names in names_by_reason.items():
        more = ""
        if len(names) > 5:
            more = f" and {len(names) - 5:,} more"
        print(f"left out ({reason}): {', '.join(names[:5])}{more}")


# ------------------------------------------------------------------------------------------------
# Token files that people have


def is_token_file(path):
    return header(path)[:2] in FORMATS


def find_tokens(folder):
    """The token files in a folder, {"train": [names], "val": [names]}. Both lists are empty if
    there is none, or if prepare_data.py made them of text. Raises ValueError for a name that says
    both."""
    found = {"train": [], "val": []}
    if made_by(folder):
        meta = read_json(folder / "meta.json") or {}
        if "shards" not in meta.get("train", {}):
            return found
    certain = False     # names alone do not tell: pretrained.bin
    for path in sorted(folder.glob("*.bin")):
        splits = [split for split in SPLITS if split in path.name.lower()]
        if not splits or not path.is_file():
            continue
        require(len(splits) == 1, f"{path}: its name says both train and val; which one is it for?")
        found[splits[0]].append(path.name)
        if is_token_file(path) or path.name in ("train.bin", "val.bin"):
            certain = True
    if certain:
        return found
    return {"train": [], "val": []}


def open_shards(folder, split, names, vocab_size, absolute=False):
    """({path: tokens}, meta.json's entry) of a split in token files. Raises ValueError if one is
    not right, or has a token outside the vocabulary."""
    raw = names == [f"{split}.bin"] and not is_token_file(folder / names[0])
    files = {}
    shards = {}
    for name in names:
        path = folder / name
        files[path] = read_tokens(path, raw=raw)
        if absolute:
            name = str(path)
        shards[name] = len(files[path])
    largest, digest = scan(files, vocab_size)
    entry = {"tokens": sum(shards.values()), "bytes": None, "largest": largest, "sha256": digest,
             "shards": shards}
    require(entry["tokens"] > 0, f"{folder} has no token for {split}")
    if raw:
        entry["format"] = RAW
        tokens = files[folder / names[0]]
        require(len(tokens) < 64 or tokens[1::2].any(), f"{folder / names[0]} has a zero as every "
                "second token: it seems to have tokens of four bytes, and only two are taken")
    return files, entry


def count_bytes(files, tokenizer):
    """How many bytes of text the tokens of files, {path: tokens}, stand for."""
    lengths = tokenizer.bytes_per_token()
    total = 0
    for tokens in files.values():
        for start in range(0, len(tokens), CHUNK):
            total += int(lengths[tokens[start:start + CHUNK]].sum())
    return total


def adopt_tokens(source, out=None, tokenizer=None, vocab_size=None, overwrite=False):
    """Makes a data folder, out, whose token files are those in the folder source; returns its
    meta.json's content. Token files are neither copied nor changed. Without a tokenizer vocab_size
    says what tokens there are. Without out it is data/NAME, but never source itself. Raises
    ValueError with one sentence if anything is not right."""
    given = out is not None
    if not given:
        out = default_out(source)
    out = Path(out)
    same = os.path.realpath(out) == os.path.realpath(source)
    source = Path(os.path.abspath(source))
    maker = command(source, f"--tokenizer={tokenizer}")
    if vocab_size is not None:
        maker = command(source, f"--vocab_size={vocab_size}")
    require(made_by(source) in (None, maker), f"{source} is a data folder already: "
                                              f"python train.py --data={shlex.quote(str(source))}")
    found = find_tokens(source)
    names = found["train"] + found["val"]
    holds = f"{source} holds token files ({', '.join(names[:4])})"
    for split in SPLITS:
        require(found[split], f"{holds}, but none for {split}: a *{split}*.bin is missing")
    require(tokenizer is None or vocab_size is None, "give --tokenizer or --vocab_size, not both")
    require(tokenizer or vocab_size is not None, f"{holds}: take them with --tokenizer=NAME, or "
            "with --vocab_size=N if it has no name here; to take a text beside them, give its file")
    if tokenizer:
        tokenizer = get_tokenizer(tokenizer)
        vocab_size = tokenizer.vocab_size
    require(vocab_size > 0, f"--vocab_size must be more than 0, not {vocab_size}")
    require(given or not same, f"{out} is the folder of your token files: --out={out} puts a "
                               "meta.json there, and another --out= leaves it alone")

    with claimed(out, ["meta.json"], maker, overwrite):
        _, train = open_shards(source, "train", found["train"], vocab_size, absolute=not same)
        val_files, val = open_shards(source, "val", found["val"], vocab_size, absolute=not same)
        name = None
        if tokenizer:
            name = tokenizer.name
            val["bytes"] = count_bytes(val_files, tokenizer)
        meta = {"made_by": maker, "files": len(names), "tokenizer": name,
                "vocab_size": vocab_size, "train": train, "val": val}
        write_json(out / "meta.json", meta)
    taken = {*names, "meta.json", ".lock"}
    others = [path.name for path in sorted(source.iterdir()) if path.name not in taken]
    say_left_out(dict.fromkeys(others, "not *train*.bin or *val*.bin"))
    return meta


# ------------------------------------------------------------------------------------------------
# Downloads


def in_time(hint, function, *args):
    """function(*args). Raises ValueError with the hint after PATIENCE seconds, even if a name
    server hangs."""
    try:
        with multiprocessing.pool.ThreadPool(1) as pool:
            return pool.apply_async(function, args).get(PATIENCE)
    except (OSError, ValueError, multiprocessing.TimeoutError) as error:
        raise ValueError(f"could not get {args[0]} ({type(error).__name__}): {hint}") from None


def download_once(url, part, bar):
    """Appends what the file part lacks of url. A server may send all of it again."""
    part.touch()
    headers = {"Range": f"bytes={part.stat().st_size}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as answer:
        if answer.status_code == 416:       # nothing is lacking
            return
        answer.raise_for_status()
        mode = "ab" if answer.status_code == 206 else "wb"
        with open(part, mode) as file:
            for block in answer.iter_content(2 ** 16):
                bar.update(file.write(block))


def download(url, path, verify, bar):
    """Downloads url to path.part, renamed to path once verify(path.part) passes. Raises ValueError
    after ATTEMPTS."""
    part = Path(f"{path}.part")
    for attempt in range(ATTEMPTS):
        time.sleep(BACKOFF * attempt ** 2)
        try:
            download_once(url, part, bar)
            verify(part)
        except requests.RequestException as error:
            trouble = f"{type(error).__name__}: {error}"
        except ValueError as error:     # what came is something else, such as an error page
            trouble = str(error)
            part.unlink()
        else:
            sync(part)
            os.replace(part, path)
            return
        bar.write(f"{url}: {trouble}")
    raise ValueError(f"{url} could not be downloaded ({trouble}); the same command continues")


def fetch(address, files, out, verify):
    """Downloads those of files, {name: bytes}, that the folder out lacks. Raises ValueError if one
    cannot be had, or if the disk has no room for all."""
    missing = [name for name in files if not (out / name).exists()]
    if not missing:
        return
    total = sum(files[name] for name in missing)
    parts = [out / f"{name}.part" for name in missing]
    have = sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(out).free
    require(total - have <= free, f"{total - have:,} bytes are to be downloaded to {out}, "
                                  f"which has room for {free:,}")
    # The answer does not matter. Without a network this says so within PATIENCE seconds.
    in_time("without a network, use `python prepare_data.py`", requests.head, address + missing[0])
    with tqdm(total=total, initial=have, desc=str(out), unit="B", unit_scale=True,
              mininterval=1) as bar:
        for name in missing:
            download(address + name, out / name, verify, bar)


def prepare_shakespeare(out, tokenizer="byte", overwrite=False):
    """Downloads Shakespeare's plays and makes a data folder of them; returns its meta.json's
    content."""
    def verify(path):
        require(sha256(path) == SHAKESPEARE_SHA256,
                f"{path} is not the text of Shakespeare's plays (its sha256 is another)")

    tokenizer = get_tokenizer(tokenizer)
    maker = command("shakespeare", f"--tokenizer={tokenizer.name}")
    with claimed(out, OUTPUT_FILES, maker, overwrite):
        fetch(SHAKESPEARE, {"input.txt": SHAKESPEARE_BYTES}, out, verify)
        verify(out / "input.txt")       # also if it was there
        texts = [Text(out / "input.txt", "input.txt")]
        measure(texts)
        share_out(texts)
        return write_folder(texts, out, maker, tokenizer)


def prepare_fineweb(name, out, tokens=1e9, overwrite=False):
    """Makes a data folder of downloaded shards; returns its meta.json's content. It has the
    validation shard of FINEWEB[name], and as many training shards as have so many tokens."""
    address, file_name, count = FINEWEB[name]
    require(1 <= tokens <= count * SHARD_TOKENS,
            f"--tokens must be between 1 and {count * SHARD_TOKENS:,}, not {tokens}")
    names = {"train": [], "val": [file_name.format(split="val", number=0)]}
    for i in range(count):
        if i * SHARD_TOKENS < tokens:
            names["train"].append(file_name.format(split="train", number=i + 1))

    def verify(path):
        scan({path: read_tokens(path)}, GPT2_VOCABULARY)

    with claimed(out, ["meta.json"], command(name), overwrite):
        sizes = dict.fromkeys(names["val"] + names["train"], HEADER_BYTES + 2 * SHARD_TOKENS)
        fetch(address, sizes, out, verify)
        _, train = open_shards(out, "train", names["train"], GPT2_VOCABULARY)
        val_files, val = open_shards(out, "val", names["val"], GPT2_VOCABULARY)
        try:
            val["bytes"] = count_bytes(val_files, get_tokenizer("gpt2"))
        except ValueError as error:
            print("bits per byte will be unknown, until this command is run again with GPT-2's "
                  f"vocabulary: {error}")
        meta = {"made_by": command(name), "files": len(sizes), "tokenizer": "gpt2",
                "vocab_size": GPT2_VOCABULARY, "train": train, "val": val}
        write_json(out / "meta.json", meta)
    return meta


# ------------------------------------------------------------------------------------------------
# Command line


def fail(sentence):
    sys.exit(f"prepare_data.py: {sentence}")


def refuse_usage(message):
    fail(f"{message} (see --help)")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse_usage
    path = os.path.expanduser       # the shell leaves --out=~/data as it is
    parser.add_argument("source", nargs="?", type=path,
                        help="a text, a folder of texts or of token files, fineweb, fineweb_edu or "
                             "shakespeare; default: Python's standard library")
    parser.add_argument("--tokenizer", metavar="NAME",
                        help="byte (the default for text), gpt2 or another of tiktoken")
    parser.add_argument("--val", type=path, metavar="TEXT",
                        help="your own validation text, a file or a folder; default: one part in "
                             "20 of the source")
    parser.add_argument("--field", metavar="NAME",
                        help="which field of a .jsonl file's objects is the text; default: text")
    parser.add_argument("--vocab_size", type=int, metavar="N",
                        help="of token files whose tokenizer has no name here; then no sample")
    parser.add_argument("--tokens", type=float, metavar="N",
                        help="of fineweb to train on, in whole shards of 1e8; default: 1e9")
    parser.add_argument("--out", type=path, metavar="FOLDER",
                        help="folder to write; default: data/NAME, after the source")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace what the output folder holds")
    return parser.parse_args()


def default_out(source):
    """data/NAME, after a source."""
    if source is None:
        return Path("data/stdlib")
    path = Path(os.path.abspath(source))
    if ending(path) in ENDINGS and not path.is_dir():
        return Path("data", stem(path))
    return Path("data", path.name)


def kind_of(source):
    """The kind of a source: "stdlib", "shakespeare", "fineweb", "tokens" or "text"."""
    if source is None:
        return "stdlib"
    if source == "shakespeare":
        return "shakespeare"
    if source in FINEWEB:
        return "fineweb"
    if os.path.isdir(source) and any(find_tokens(Path(source)).values()):
        return "tokens"
    return "text"


def prepare(args):
    """(folder, meta.json's content) of the data that the command line asks for."""
    source = args.source
    kind = kind_of(source)
    if kind != "text":
        require(args.val is None and args.field is None, "--val and --field go with your own text")
    if kind != "tokens":
        require(args.vocab_size is None, "--vocab_size goes with a folder of token files")
    if kind != "fineweb":
        require(args.tokens is None, "--tokens goes with fineweb and fineweb_edu alone")

    out = default_out(source)
    if args.out:
        out = Path(args.out)
    if kind == "tokens":
        return out, adopt_tokens(source, args.out, args.tokenizer, args.vocab_size, args.overwrite)
    if kind == "fineweb":
        require(args.tokenizer in (None, "gpt2"), f"{source} comes as tokens of gpt2")
        tokens = 1e9
        if args.tokens is not None:
            tokens = args.tokens
        return out, prepare_fineweb(source, out, tokens, args.overwrite)

    tokenizer = args.tokenizer or "byte"
    if kind == "stdlib":
        return out, prepare_stdlib(out, tokenizer=tokenizer, overwrite=args.overwrite)
    if kind == "shakespeare":
        return out, prepare_shakespeare(out, tokenizer, args.overwrite)
    field = args.field or "text"
    return out, prepare_text(source, out, tokenizer, args.val, field, args.overwrite)


def report(out, meta):
    """Prints what the data folder has, and how its text begins as the model will see it."""
    train, val, _ = read_folder(out)
    what = f"{meta['files']:,} file(s)"
    if "characters" in meta:
        encodings = [f"{count:,} in {name}" for name, count in meta["encodings"].items()]
        what += f" ({', '.join(encodings)}), {meta['characters']:,} characters"
    print(f"{out}: {what}, {len(train):,} tokens to train on and {len(val):,} to validate on")
    if meta["val"]["bytes"]:        # else there is no tokenizer, or no way to its vocabulary
        first = train[0:min(64, len(train))].tolist()
        words = get_tokenizer(meta["tokenizer"]).decode(first)[:80]
        print(f"it begins: {words.removesuffix(CUT)!r}")


def main():
    if sys.stdout:      # None if it is closed
        sys.stdout.reconfigure(errors="backslashreplace")       # as stderr: for any terminal
    args = parse_args()
    try:
        out, meta = prepare(args)
        report(out, meta)
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        fail("interrupted; a download goes on with the same command")
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:     # nobody reads what is printed: `… | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
