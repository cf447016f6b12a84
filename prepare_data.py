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
line of a .jsonl file. The tokenizer's end-of-text token follows each; "byte" has none. Hidden files
of a folder are left out.

A data folder holds meta.json, in which these entries are needed:

    {"tokenizer": "gpt2", "vocab_size": 50257, "train": {"tokens": 9000}, "val": {"tokens": 1000}}

The tokens are in train.bin and val.bin, or in other files: "train": {"shards": {file: tokens}}.
A token file has llm.c's format: 256 little-endian int32 (magic, version, number of tokens, zeros),
then the tokens. With "format": "uint16" a split's files are nanoGPT's: tokens alone. "tokenizer"
may be null; then there is no sample. "bytes", of the text in "val", gives bits per byte.

HF_ENDPOINT and HF_TOKEN, if set, are the Hugging Face mirror and token to download fineweb with.
"""
import argparse
import codecs
import contextlib
import errno
import filecmp
import functools
import glob
import gzip
import hashlib
import inspect
import io
import itertools
import json
import math
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
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
import tiktoken
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Constants

SPLITS = ("train", "val")
OUTPUT_FILES = ("train.bin", "val.bin", "meta.json")    # what is made of text

# token files
FORMATS = {                     # (magic, version): type of a token
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}
HEADER_BYTES = 256 * 4
MAX_TOKENS = 2 ** 31 - 1        # that the header can count
RAW = "uint16"                  # the "format" of files without a header, as nanoGPT writes them
MAX_OPEN = 50                   # files of a split; some systems allow a process 256

# text
ENDING = re.compile(r"\.(txt|md|jsonl)(\.gz)?\Z", re.IGNORECASE)
MARK = "<|endoftext|>"          # a line that ends a document; tiktoken's name of the token, too
SURROGATE = re.compile("[\ud800-\udfff]")
NO_TEXT = re.compile("[\0\ud800-\udfff]")     # of a file that was decoded
CHUNK = 2 ** 20                 # characters in a piece of text
FOR_TRAINING = 0.95             # so much of the text; the rest is for validation
SPLIT_BY_FILE_FROM = 200        # of so many files or more, each goes to one split as a whole

# tiktoken's regular expressions overflow their stack at a run of a million blanks. The look-behind
# keeps the search linear in the length of the text.
BLANKS = re.compile(r"(?<!\s)\s{500000}")

# downloads
FINEWEB = {                     # name: (data set, a file's name, number of training shards)
    "fineweb": ("kjj0/fineweb10B-gpt2", "fineweb_{}_{:06d}.bin", 103),
    "fineweb_edu": ("karpathy/fineweb-edu-100B-gpt2-token-shards",
                    "edu_fineweb_{}_{:06d}.bin", 1001),
}
SHARD_TOKENS = 100_000_000      # in each of these files; the last may have fewer
GPT2_VOCABULARY = 50257
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATIENCE = 8                    # seconds to wait for a server's answer, and then for more of it
ATTEMPTS = 5                    # to download a file
BACKOFF = 1                     # seconds before the second attempt
LONGEST_WAIT = 60               # seconds, if a server asks to wait


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
    except OSError as error:
        # some file systems cannot do that with a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
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
    """The object in a file of JSON; {} if the file is missing, damaged or holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def command(*words):
    """The text of a command of this script. meta.json records it as "made_by"."""
    return shlex.join(["prepare_data.py", *map(str, words)])


def made_by(folder):
    """The command that made a data folder, or None if prepare_data.py did not make it."""
    return read_json(Path(folder, "meta.json")).get("made_by")


def check_place(out, names, maker, overwrite):
    """Raises ValueError if the folder out has one of these files and another maker."""
    present = [name for name in names if os.path.lexists(out / name)]
    owner = made_by(out)
    if overwrite or not present or owner == maker:
        return
    what = f"{' and '.join(present)}, not made by prepare_data.py"
    if owner:
        what = f"the data of `{owner}`"
    raise ValueError(f"{out} holds {what}; choose another folder with --out=, or replace them with "
                     "--overwrite")


@contextlib.contextmanager
def new_folder(out, maker, overwrite):
    """A hidden folder for OUTPUT_FILES. After the with-block it is renamed to out. If there is a
    folder out, which may hold other files too, OUTPUT_FILES are moved into it."""
    check_place(out, OUTPUT_FILES, maker, overwrite)
    home = out.parent
    if out.exists():
        home = out      # which may be a disk of its own
    home.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.unfinished-"
    for path in home.glob(f"{glob.escape(prefix)}*"):
        print(f"if no other command is running, remove what a killed one left: {path}")
    folder = home / (prefix + os.urandom(4).hex())
    folder.mkdir()
    try:
        yield folder
        check_place(out, OUTPUT_FILES, maker, overwrite)    # others may have written meanwhile
        try:
            os.rename(folder, out)
            sync(home)
        except OSError:
            move_files(folder, out, maker)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_files(folder, out, maker):
    """Moves OUTPUT_FILES from a folder to the folder out, if they are not the same there."""
    same, _, _ = filecmp.cmpfiles(folder, out, OUTPUT_FILES, shallow=False)
    if len(same) == len(OUTPUT_FILES):
        return      # others may be reading them
    # Until the last of the files is moved, meta.json says no more than whose they are.
    write_json(out / "meta.json", {"made_by": maker})
    for name in OUTPUT_FILES:
        os.replace(folder / name, out / name)
        sync(out)


# ------------------------------------------------------------------------------------------------
# Token files and data folders


def header(path):
    """(magic, version, number of tokens) of a token file; zeros for what a short file lacks."""
    numbers = np.fromfile(path, dtype="<i4", count=3).tolist()
    return tuple(numbers + [0] * (3 - len(numbers)))


def is_token_file(path):
    return header(path)[:2] in FORMATS


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
            f"{path} has {tokens:,} tokens, but meta.json says {expected!r}")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(tokens,))


class Shard:
    """Tokens of a token file that is open only while some are read."""

    def __init__(self, path, length, raw):
        self.arguments = (path, length, raw)

    def __len__(self):
        return self.arguments[1]

    def __getitem__(self, piece):
        return read_tokens(*self.arguments)[piece].copy()


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
        in_file = int(tokens[:].max(initial=0))
        require(in_file < vocab_size, f"{path} has the token {in_file:,}, but a vocabulary of "
                                      f"{vocab_size:,} ends at {vocab_size - 1:,}")
        largest = max(largest, in_file)
        digest.update(np.memmap(path, np.uint8, "r"))
    return largest, digest.hexdigest()


def is_count(value):
    return type(value) is int and value > 0         # True is no number here


def read_meta(folder):
    """The content of a data folder's meta.json. Raises ValueError if it is missing or not right."""
    path = folder / "meta.json"
    require(path.is_file(), f"{folder} is no data folder (it has no meta.json); make one with "
                            "prepare_data.py")
    meta = read_json(path)
    require(meta, f"{path} is damaged: it is no object of JSON")
    require(set(meta) != {"made_by"}, f"{folder} is not finished; repeat its command: "
                                      f"python {meta.get('made_by')} --out={folder}")
    meta.setdefault("tokenizer", None)
    require(is_count(meta.get("vocab_size")),
            f'{path}: "vocab_size" must be a number above 0, not {meta.get("vocab_size")!r}')
    for split in SPLITS:
        entry = meta.get(split)
        require(isinstance(entry, dict), f'{path}: "{split}" is missing, or no object')
        shards = entry.get("shards", {"train.bin": 0})
        require(isinstance(shards, dict) and shards and entry.get("format", RAW) == RAW,
                f'{path}: "shards" must be {{file: number of tokens, …}}, and "format" "{RAW}"')
    return meta


def complete(folder, split, entry, vocab_size):
    """The Stream of a split. Fills in what the split's entry of meta.json lacks. Raises ValueError
    if a file is not right, or has a token outside the vocabulary."""
    shards = entry.get("shards", {f"{split}.bin": entry.get("tokens")})
    raw = entry.get("format") == RAW
    files = {}
    for name, length in shards.items():
        path = folder / name        # or name alone, if it is an absolute path
        tokens = read_tokens(path, length, raw)
        if len(shards) > MAX_OPEN:
            tokens = Shard(path, len(tokens), raw)
        shards[name] = len(tokens)
        files[path] = tokens
    entry["tokens"] = sum(shards.values())
    require(entry["tokens"] > 0, f"{folder} has no token for {split}")
    if not is_count(entry.get("bytes")):
        entry["bytes"] = None       # unknown: then there are no bits per byte
    largest = entry.get("largest")
    known = type(largest) is int and isinstance(entry.get("sha256"), str)
    if not known or largest >= vocab_size:
        entry["largest"], entry["sha256"] = scan(files, vocab_size)
    return Stream(list(files.values()))


def read_folder(folder):
    """(train Stream, val Stream, meta.json's content) of a data folder. Raises ValueError if a file
    is not right, or has a token outside the vocabulary."""
    folder = Path(os.path.expanduser(folder))
    try:
        meta = read_meta(folder)
        streams = [complete(folder, split, meta[split], meta["vocab_size"]) for split in SPLITS]
    except OSError as error:        # no permission, say
        raise ValueError(str(error)) from None
    return *streams, meta


def fingerprint(meta):
    """16 characters that identify the tokens of both splits. meta: as read_folder returns it."""
    both = meta["train"]["sha256"] + meta["val"]["sha256"]
    # a letter first: a spreadsheet would rewrite 4128e517 as a number
    return "t" + hashlib.sha256(both.encode()).hexdigest()[:15]


# ------------------------------------------------------------------------------------------------
# Finding texts


@dataclass
class Text:
    path: Path
    name: str                   # its path in the folder that was given
    field: str = "text"         # of a .jsonl file
    marks: bool = False         # lines <|endoftext|> end documents, and are no text
    share: float = FOR_TRAINING
    characters: int = 0         # filled in by measure


def files_below(folder, left_out, visited):
    """Yields the paths of the files below a folder, but hidden ones, which are added to left_out.
    Links are followed, but no folder is visited twice."""
    visited.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__MACOSX":
            left_out["hidden"].append(path)
        elif not path.is_dir():
            yield path
        elif path.resolve() not in visited:
            yield from files_below(path, left_out, visited)


def find_texts(source, left_out):
    """The Texts of a file or a folder. Adds what is left out, {reason: paths}. Raises ValueError if
    there is no text."""
    source = Path(source)
    require(os.path.lexists(source), f"there is no file or folder {source}; what can be downloaded "
                                     "is fineweb, fineweb_edu and shakespeare")
    paths = [source]
    if source.is_dir():
        paths = files_below(source, left_out, set())
    texts = []
    for path in paths:
        if path.is_file() and ENDING.search(path.name):
            texts.append(Text(path, str(path.relative_to(source))))
        else:
            left_out["neither .txt nor .md nor .jsonl"].append(path)
    require(texts or not made_by(source), already_data(source))
    require(texts, f"{source} is no text: a text is a file whose name ends in .txt, .md or .jsonl, "
                   "perhaps with .gz, or a folder of them; of token files (*train*.bin, *val*.bin) "
                   "give the folder")
    return texts


def already_data(folder):
    """The sentence that refuses a data folder as a source."""
    return f"{folder} is a data folder already: python train.py --data={shlex.quote(str(folder))}"


def say_left_out(left_out):
    """Prints the paths that are left out, {reason: paths}: a line a reason."""
    for reason, paths in left_out.items():
        names = ", ".join(map(str, paths[:5]))
        if len(paths) > 5:
            names += f" and {len(paths) - 5:,} more"
        print(f"left out ({reason}): {names}")


# ------------------------------------------------------------------------------------------------
# Reading texts


def open_text(path):
    """An open file of text, unpacked and decoded as its first bytes ask for. A byte that cannot be
    decoded becomes a surrogate, which no text holds."""
    file = open(path, "rb")
    if file.peek(2)[:2] == b"\x1f\x8b":
        file = gzip.open(file)
    encoding = "utf-8-sig"
    if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    errors = "surrogateescape"
    if path.suffix == ".py":
        # Python's standard library: measurements rest on these bytes, which stay what they were
        errors = "replace"
    return io.TextIOWrapper(file, encoding=encoding, errors=errors)


def json_text(line, field, place):
    """The text in a line of a .jsonl file; "" if the line is blank."""
    if line.isspace():
        return ""
    try:
        content = json.loads(line)[field]
    except (ValueError, RecursionError, TypeError, LookupError):
        content = None
    require(isinstance(content, str),
            f'{place}: no JSON object with a text "{field}" (--field=NAME chooses another)')
    require(not SURROGATE.search(content),
            f"{place}: half of a surrogate pair, which is no character")
    return content.replace("\r\n", "\n")


def lines_and_ends(text):
    """Yields (line, whether a document ends with it) of a text. What is longer than CHUNK comes in
    parts. Raises ValueError if the file is damaged or no text."""
    is_json = text.path.name.lower().endswith((".jsonl", ".jsonl.gz"))
    limit = -1 if is_json else CHUNK
    number = 1
    try:
        with open_text(text.path) as file:
            while line := file.readline(limit):
                if NO_TEXT.search(line):
                    raise ValueError(f"{text.path}, line {number:,}: this is neither UTF-8 nor "
                                     "UTF-16 with a byte order mark; iconv converts to UTF-8")
                if is_json:
                    content = json_text(line, text.field, f"{text.path}, line {number:,}")
                    for start in range(0, len(content), CHUNK):
                        yield content[start:start + CHUNK], False
                    yield "", True
                elif text.marks and line.strip() == MARK:
                    yield "", True
                else:
                    yield line, False
                number += line.endswith("\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{text.path} is damaged after line {number:,}: {error}") from None
    yield "", True


def documents(text):
    """Yields (piece, whether a document ends with it) of a text. A piece is some lines, of at most
    2 CHUNK characters. Empty documents are left out."""
    lines = []
    size = 0
    begun = False
    for line, ends in lines_and_ends(text):
        lines.append(line)
        size += len(line)
        begun = begun or size > 0
        if begun and (ends or size >= CHUNK):
            yield "".join(lines), ends
            lines = []
            size = 0
            begun = not ends


def split_text(text):
    """Yields (text, split, piece, whether a document ends with it). The first characters of a text
    are for training, the rest for validation."""
    left = round(text.characters * text.share)
    split = "train" if left > 0 else "val"
    for piece, ends in documents(text):
        if split == "train" and len(piece) > left:
            # the border falls into this document, which becomes two
            yield text, "train", piece[:left], True
            piece = piece[left:]
            split = "val"
        yield text, split, piece, ends
        left -= len(piece)
        if ends and left == 0:
            split = "val"


def measure(texts, progress):
    """Fills in how many characters each text has. Raises ValueError if one is no text."""
    marks = 0
    for text in tqdm(texts, desc="reading", unit=" files", delay=1, disable=not progress):
        for piece, _ in documents(text):
            text.characters += len(piece)
            marks += piece.count(MARK)
        if text.characters == 0:
            print(f"left out (empty): {text.path}")
    if marks > 0:
        print(f"{MARK} stays text in {marks:,} places: it ends a document only as a line of its "
              "own, and if the tokenizer has an end-of-text token")


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

    encode_prompt = encode

    def decode(self, tokens):
        return bytes(list(tokens)).decode(errors="replace")

    def count_bytes(self, tokens):
        return len(tokens)


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
        return self.encoding.encode_ordinary(text)

    def encode_prompt(self, text):
        """The tokens of a text in which <|endoftext|> is the end-of-text token, if there is one."""
        if self.end_of_text is None:
            return self.encode(text)
        tokens = []
        for part in text.split(MARK):
            tokens += [*self.encode(part), self.end_of_text]
        return tokens[:-1]

    def decode(self, tokens):
        return self.encoding.decode(list(tokens))

    def count_bytes(self, tokens):
        """How many bytes of text the tokens stand for."""
        text = tokens[tokens != self.end_of_text].tolist()
        return len(self.encoding.decode_bytes(text))


def tokenizer_names():
    return ["byte", *tiktoken.list_encoding_names()]


def get_tokenizer(name):
    """The Tokenizer of this name: "byte" or an encoding of tiktoken. It has encode(text),
    encode_prompt(text), decode(tokens), vocab_size and end_of_text (a token or None). Raises
    ValueError if there is none of this name, or no way to its vocabulary."""
    require(name in tokenizer_names(),
            f"there is no tokenizer {name!r}; choose one of {', '.join(tokenizer_names())}")
    if name == "byte":
        return ByteTokenizer()
    hint = ("set TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled elsewhere, or use "
            "--tokenizer=byte, or --vocab_size=N for tokens that you have")
    return Tokenizer(name, in_time(hint, tiktoken.get_encoding, name))


# ------------------------------------------------------------------------------------------------
# Data folders of text


def encode_piece(tokenizer, piece):
    """(split, tokens, bytes of text) of a piece of split_text. Raises ValueError if the tokenizer
    cannot take it."""
    text, split, content, ends = piece
    try:
        tokens = tokenizer.encode(content)
    except ValueError as error:
        raise ValueError(f"{text.path}: {error}") from None
    if ends and tokenizer.end_of_text is not None:
        tokens = [*tokens, tokenizer.end_of_text]
    return split, np.asarray(tokens), len(content.encode())


def encode_texts(texts, tokenizer, progress):
    """Yields (split, tokens, bytes of text), piece by piece. A thread a core encodes."""
    encode = functools.partial(encode_piece, tokenizer)
    pieces = itertools.chain.from_iterable(map(split_text, texts))
    total = sum(text.characters for text in texts)
    bar = tqdm(total=total, desc="encoding", unit=" characters", unit_scale=True, mininterval=1,
               disable=not progress)
    with bar, multiprocessing.pool.ThreadPool() as pool:
        while some := list(itertools.islice(pieces, 8 * os.cpu_count())):
            yield from pool.map(encode, some)
            bar.update(sum(len(content) for _, _, content, _ in some))


def write_tokens(folder, texts, tokenizer, progress):
    """Writes train.bin and val.bin to a folder; returns {split: bytes of text}. Raises ValueError
    if a split has no text, or more tokens than a file can hold."""
    kind = (20240520, 1) if tokenizer.vocab_size <= 2 ** 16 else (20240801, 7)
    dtype = FORMATS[kind]
    num_bytes = Counter()
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        for file in files.values():
            file.seek(HEADER_BYTES)
        for split, tokens, length in encode_texts(texts, tokenizer, progress):
            files[split].write(tokens.astype(dtype).tobytes())
            num_bytes[split] += length
        for split, file in files.items():
            tokens = (file.tell() - HEADER_BYTES) // dtype.itemsize
            require(num_bytes[split] > 0, f"the text, from {texts[0].path} on, is empty or too "
                                          f"short: none is left for {split}")
            require(tokens <= MAX_TOKENS, f"{tokens:,} tokens for {split} are too many: a file can "
                                          f"hold {MAX_TOKENS:,}")
            file.seek(0)
            file.write(np.array([*kind, tokens], "<i4").tobytes())
    return num_bytes


def write_folder(texts, out, maker, tokenizer, overwrite=False, progress=True):
    """Makes a data folder of texts; returns meta.json's content."""
    meta = {"made_by": maker, "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size}
    with new_folder(Path(out), maker, overwrite) as folder:
        measure(texts, progress)
        num_bytes = write_tokens(folder, texts, tokenizer, progress)
        for split in SPLITS:
            sync(folder / f"{split}.bin")
            meta[split] = {"bytes": num_bytes[split]}
            complete(folder, split, meta[split], tokenizer.vocab_size)
        write_json(folder / "meta.json", meta)
    return meta


def share_out(texts):
    """Lets each of many texts go to one split by a hash of its name, whatever texts are added."""
    if len(texts) >= SPLIT_BY_FILE_FROM:
        for text in texts:
            text.share = float(zlib.crc32(os.fsencode(text.name)) % 20 != 0)


def prepare_text(source, out, tokenizer="byte", val=None, field="text", overwrite=False,
                 progress=True):
    """Makes a data folder of a text or a folder of texts; returns its meta.json's content. val: a
    text or a folder for validation. Raises ValueError if anything is not right."""
    tokenizer = get_tokenizer(tokenizer)
    words = [os.path.abspath(source), f"--tokenizer={tokenizer.name}"]
    if field != "text":
        words.append(f"--field={field}")
    left_out = defaultdict(list)
    texts = find_texts(source, left_out)
    share_out(texts)
    if val:
        words.append(f"--val={os.path.abspath(val)}")
        val_texts = find_texts(val, left_out)
        for_val = {text.path.resolve() for text in val_texts}
        texts = [text for text in texts if text.path.resolve() not in for_val]
        require(texts, f"{source} has no text beside that of {val}")
        for text in texts:
            text.share = 1
        for text in val_texts:
            text.share = 0
        texts += val_texts
    for text in texts:
        text.field = field
        text.marks = tokenizer.end_of_text is not None
    say_left_out(left_out)
    return write_folder(texts, out, command(*words), tokenizer, overwrite, progress)


def prepare_stdlib(out="data/stdlib", progress=True, tokenizer="byte", overwrite=False):
    """Makes a data folder of Python's standard library, without its tests and what is installed
    beside it; returns its meta.json's content."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if path.stat().st_size > 0 and not skipped & set(name.parts):
            texts.append(Text(path, str(name)))
    share_out(texts)
    maker = command(f"--tokenizer={tokenizer}")
    return write_folder(texts, out, maker, get_tokenizer(tokenizer), overwrite, progress)


# ------------------------------------------------------------------------------------------------
# Data folders of token files


def find_tokens(folder):
    """The token files in a folder, {"train": names, "val": names}; {} if there are none, or if
    prepare_data.py made them of text. Raises ValueError for a name that says both."""
    meta = read_json(folder / "meta.json")
    if "made_by" in meta and "shards" not in meta.get("train", {}):
        return {}
    files = sorted(path.name for path in folder.glob("[!.]*.bin"))
    names = {split: [name for name in files if split in name.lower()] for split in SPLITS}
    for name in names["train"]:
        require(name not in names["val"], f"{name} in {folder}: which split is it for?")
    for name in names["train"] + names["val"]:
        # a name alone does not tell: pretrained.bin
        if name in OUTPUT_FILES or is_token_file(folder / name):
            return names
    return {}


def write_meta(out, source, names, maker, vocab_size, tokenizer, encoder):
    """Writes out/meta.json for token files in the folder source, {split: names}; returns its
    content. tokenizer: a name, or None. encoder: the Tokenizer, to count bytes of text, or None."""
    base = Path()       # so that a folder that has both can be moved
    if not os.path.samefile(out, source):
        base = Path(os.path.abspath(source))
    meta = {"made_by": maker, "tokenizer": tokenizer, "vocab_size": vocab_size}
    for split in SPLITS:
        meta[split] = {"shards": {str(base / file): None for file in names[split]}}
        path = source / f"{split}.bin"
        if names[split] == [path.name] and not is_token_file(path):
            meta[split]["format"] = RAW
            tokens = read_tokens(path, raw=True)
            require(len(tokens) < 64 or tokens[1::2].any(), f"{path} has a zero as every second "
                    "token: it seems to have tokens of four bytes, and only two are taken")
        stream = complete(out, split, meta[split], vocab_size)
    if encoder:
        meta["val"]["bytes"] = 0
        for tokens in stream.arrays:
            for start in range(0, len(tokens), CHUNK):
                meta["val"]["bytes"] += encoder.count_bytes(tokens[start:start + CHUNK])
    write_json(out / "meta.json", meta)
    return meta


def prepare_tokens(source, out, tokenizer=None, vocab_size=None, overwrite=False):
    """Makes a data folder, out, whose token files are those in the folder source; returns its
    meta.json's content. Token files are neither copied nor changed. Raises ValueError if anything
    is not right."""
    require((tokenizer is None) != (vocab_size is None), f"{source} holds token files: take them "
            "with --tokenizer=NAME, or with --vocab_size=N if it has no name here; to take a text "
            "beside them, give its file")
    source = Path(source)
    option = f"--vocab_size={vocab_size}"
    encoder = None
    if tokenizer:
        option = f"--tokenizer={tokenizer}"
        encoder = get_tokenizer(tokenizer)
        vocab_size = encoder.vocab_size
    maker = command(os.path.abspath(source), option)
    require(made_by(source) in (None, made_by(out)), already_data(source))
    check_place(out, ["meta.json"], maker, overwrite)
    names = find_tokens(source)
    for split in SPLITS:
        require(names[split], f"{source} holds token files, but none for {split}: a *{split}*.bin "
                              "is missing")
    out.mkdir(parents=True, exist_ok=True)
    return write_meta(out, source, names, maker, vocab_size, tokenizer, encoder)


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


def hugging_face():
    """The address of Hugging Face, or of a mirror."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/") + "/"


def download(url, path, check):
    """Downloads url to path.part, renamed to path once check(path.part) passes. Continues what is
    there. Raises ValueError after ATTEMPTS."""
    part = Path(f"{path}.part")
    for attempt in range(ATTEMPTS):
        time.sleep(BACKOFF * attempt ** 2)
        part.touch()
        headers = {"Range": f"bytes={part.stat().st_size}-", "Accept-Encoding": "identity"}
        token = os.environ.get("HF_TOKEN")
        if token and url.startswith(hugging_face()):
            headers["Authorization"] = f"Bearer {token}"
        try:
            with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as answer:
                wait = answer.headers.get("Retry-After", "")
                if answer.status_code in (429, 503) and wait.isdigit():
                    wait = min(int(wait), LONGEST_WAIT)
                    tqdm.write(f"{url}: the server is busy; waiting for {wait} s")
                    time.sleep(wait)
                if answer.status_code != 416:       # else nothing is lacking
                    answer.raise_for_status()
                    # a server may send all of it again
                    with open(part, "ab" if answer.status_code == 206 else "wb") as file:
                        for block in answer.iter_content(2 ** 16):
                            file.write(block)
            check(part)
            sync(part)
            os.replace(part, path)
            return
        except requests.RequestException as error:
            trouble = error
        except ValueError as error:     # what came is something else, such as an error page
            trouble = error
            part.unlink(missing_ok=True)
        tqdm.write(f"{url}: {trouble}")
    raise ValueError(f"{url} could not be downloaded ({trouble}); the same command continues")


def fetch(address, files, out, check):
    """Downloads those of files, {name: bytes}, that the folder out lacks. Raises ValueError if one
    cannot be had, or if the disk has no room for all."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in files if not (out / name).exists()]
    if not missing:
        return
    needed = sum(files[name] for name in missing)
    needed -= sum(part.stat().st_size for part in out.glob("*.part"))
    free = shutil.disk_usage(out).free
    require(needed <= free, f"{needed:,} bytes are to be downloaded to {out}, which has room for "
                            f"{free:,}; --out= chooses another place")
    # The answer does not matter. Without a network this says so within PATIENCE seconds.
    in_time("without a network, use `python prepare_data.py`", requests.head, address + missing[0])
    for name in tqdm(missing, desc=f"{needed / 1e6:,.0f} MB", unit=" files"):
        download(address + name, out / name, check)


def prepare_shakespeare(source, out, tokenizer="byte", overwrite=False):
    """Downloads Shakespeare's plays and makes a data folder of them; returns its meta.json's
    content. source: the word that meta.json records."""
    def check(path):
        require(hashlib.sha256(path.read_bytes()).hexdigest() == SHAKESPEARE_SHA256,
                f"{path} is not the text of Shakespeare's plays (its sha256 is another)")

    path = out / "input.txt"
    tokenizer = get_tokenizer(tokenizer)
    maker = command(source, f"--tokenizer={tokenizer.name}")
    check_place(out, OUTPUT_FILES, maker, overwrite)
    fetch(SHAKESPEARE, {path.name: SHAKESPEARE_BYTES}, out, check)
    check(path)     # also if it was there
    return write_folder([Text(path, path.name)], out, maker, tokenizer, overwrite)


def prepare_fineweb(source, out, tokens=1e9, overwrite=False):
    """Makes a data folder of downloaded shards; returns its meta.json's content. It has the
    validation shard of FINEWEB[source], and as many training shards as have so many tokens."""
    data_set, file, count = FINEWEB[source]
    require(1 <= tokens <= count * SHARD_TOKENS,
            f"--tokens must be between 1 and {count * SHARD_TOKENS:,}, not {tokens}")
    numbers = range(1, math.ceil(tokens / SHARD_TOKENS) + 1)
    names = {"train": [file.format("train", number) for number in numbers],
             "val": [file.format("val", 0)]}
    maker = command(source)
    check_place(out, ["meta.json"], maker, overwrite)
    sizes = dict.fromkeys(names["val"] + names["train"], HEADER_BYTES + 2 * SHARD_TOKENS)
    fetch(f"{hugging_face()}datasets/{data_set}/resolve/main/", sizes, out, read_tokens)
    encoder = None
    try:
        encoder = get_tokenizer("gpt2")
    except ValueError as error:
        print("bits per byte will be unknown, until this command is run again with GPT-2's "
              f"vocabulary: {error}")
    return write_meta(out, out, names, maker, GPT2_VOCABULARY, "gpt2", encoder)


# ------------------------------------------------------------------------------------------------
# Command line


def fail(sentence):
    sys.exit(f"prepare_data.py: {sentence}")


def parse_args():
    """The options that the command line gives, and "out"."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    add = parser.add_argument
    path = os.path.expanduser       # the shell leaves --out=~/data as it is
    add("source", nargs="?", type=path,
        help="a text, a folder of texts or of token files, fineweb, fineweb_edu or "
             "shakespeare; default: Python's standard library")
    add("--tokenizer", metavar="NAME",
        help="byte (the default for text), gpt2 or another of tiktoken")
    add("--val", type=path, metavar="TEXT",
        help="your own validation text, a file or a folder; default: one part in "
             "20 of the source")
    add("--field", metavar="NAME",
        help="which field of a .jsonl file's objects is the text; default: text")
    add("--vocab_size", type=int, metavar="N",
        help="of token files whose tokenizer has no name here; then no sample")
    add("--tokens", type=float, metavar="N",
        help="of fineweb to train on, in whole shards of 1e8; default: 1e9")
    add("--out", type=path, metavar="FOLDER",
        help="folder to write; default: data/NAME, after the source")
    add("--overwrite", action="store_true",
        help="replace what the output folder holds")
    options = vars(parser.parse_args())
    name = os.path.basename(os.path.abspath(options.get("source", "stdlib")))
    options["out"] = Path(options.get("out", f"data/{ENDING.sub('', name)}"))
    return options


def prepare(source=None, **options):
    """Makes the data folder that the command line asks for. Raises ValueError if it cannot."""
    make = prepare_text
    if source is None:
        make = prepare_stdlib
    elif source == "shakespeare":
        make = prepare_shakespeare
    elif source in FINEWEB:
        make = prepare_fineweb
    elif os.path.isdir(source) and find_tokens(Path(source)):
        make = prepare_tokens
    for name in options:
        require(name in inspect.signature(make).parameters,
                f"--{name} does not go with {source or 'the standard library'}")
    if source:
        options["source"] = source
    make(**options)


def report(out):
    """Prints what the data folder has, and how its text begins as the model will see it."""
    train, val, meta = read_folder(out)
    print(f"{out}: {len(train):,} tokens to train on and {len(val):,} to validate on")
    if meta["val"]["bytes"]:        # else there is no tokenizer, or no way to its vocabulary
        first = train[0:min(64, len(train))].tolist()
        words = get_tokenizer(meta["tokenizer"]).decode(first)[:80]
        words = words.rstrip("\ufffd")      # of the last character a part may be lacking
        print(f"it begins: {words!r}")


def main():
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:      # it is closed
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace")       # as stderr: for any terminal
    try:
        options = parse_args()
        prepare(**options)
        report(options["out"])
        sys.stdout.flush()
    except BrokenPipeError:     # nobody reads what is printed: `… | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        fail("interrupted; a download goes on with the same command")
    except (ValueError, OSError, KeyError) as error:    # KeyError: a number that is no token
        fail(error)


if __name__ == "__main__":
    main()
