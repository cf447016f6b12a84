"""
Text to token files for train.py.

    python prepare_data.py                              Python's standard library, as bytes, to data/stdlib: no network needed
    python prepare_data.py book.txt --tokenizer=gpt2    your text to data/book: a .txt or .txt.gz file, or a folder of them
    python prepare_data.py texts/ --out=data/mine
    python prepare_data.py fineweb_edu --tokens=1e9     web pages that teach something, as tokens of GPT-2, downloaded: 2 GB
    python prepare_data.py shakespeare                  his plays, downloaded: 1.1 MB

A data folder holds token files and meta.json: the tokenizer, its vocabulary's size and for "train" and "val" the numbers of
tokens and bytes. Each of the two is train.bin or val.bin, or the files listed as "shards", read one after the other.
A token file is in llm.c's format: 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens.
"""
import argparse
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import queue
import shutil
import sys
import sysconfig
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

FORMATS = {     # magic: (version, type of a token), as in llm.c's dev/data/data_common.py
    20240520: (1, np.dtype("<u2")),     # vocabularies up to 65,536
    20240801: (7, np.dtype("<u4")),     # larger ones
}
HEADER_BYTES = 256 * 4
FILE_TOKENS = 2 ** 30   # of a text in one file, whose header could count up to 2^31; those of a longer one go to several
VAL_SHARE = 20          # one part in 20 of the text is for validation
WHOLE_FILES = 200       # of so many files or more, each goes to one split as a whole
CHUNK = 1 << 20         # characters of a piece of text; about three pieces for each core are in memory at once

FINEWEB_EDU = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"
SHARDS, SHARD_TOKENS = 1001, 100_000_000        # for training; the last one may have fewer tokens
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
SHAKESPEARE_BYTES, SHAKESPEARE_SHA256 = 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATIENCE = 8            # seconds to wait for a server's answer, and then for more of it
ATTEMPTS = 5            # to download a file
BACKOFF = 1             # seconds before the second attempt, doubled before each further one


# ---------------------------------------------------------------- writing

def sync(path):
    """Wait until the file, or the folder's list of files, is on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path):
    """The name that a file has until it is whole. Those that killed processes have left are removed."""
    path = Path(path)
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        try:
            os.kill(int(leftover.name.split(".")[-2]), 0)       # sends nothing, but tells whether there is such a process
        except (ProcessLookupError, ValueError):
            leftover.unlink(missing_ok=True)
        except PermissionError:     # there is, of another user
            continue
    return Path(f"{path}.{os.getpid()}.tmp")


def write_aside(path, write):
    """write(a binary file), then rename: the file at `path` is the old one or the whole new one, never a part, even if the
    process is killed or the power fails."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
        sync(temporary)
        os.replace(temporary, path)
        sync(Path(path).parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_aside(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


class TokenWriter:
    """Writes a token file, tokens as they come. It has its own name only once `close` has made it whole."""
    def __init__(self, path, vocab_size):
        self.path, self.temporary = Path(path), temporary_name(path)
        self.magic = 20240520 if vocab_size <= 1 << 16 else 20240801
        self.version, self.dtype = FORMATS[self.magic]
        self.tokens = 0
        self.file = open(self.temporary, "wb")
        self.file.write(bytes(HEADER_BYTES))

    def write(self, tokens):
        self.file.write(np.asarray(tokens).astype(self.dtype).tobytes())
        self.tokens += len(tokens)

    def close(self):
        header = np.zeros(256, dtype="<i4")
        header[:3] = self.magic, self.version, self.tokens
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.close()
        sync(self.temporary)        # so that a power cut cannot leave the name without the tokens
        os.replace(self.temporary, self.path)


# ---------------------------------------------------------------- reading

def read_tokens(path):
    """
    The tokens of a token file as a read-only memory map (uint16 or uint32).
    Raises ValueError if the file is missing, is no token file, or is shorter or longer than its header says.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing; make it with prepare_data.py")
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or (int(header[0]), int(header[1])) not in {(magic, f[0]) for magic, f in FORMATS.items()}:
        raise ValueError(f"{path} is not a token file: it must begin with 256 int32, the first two being 20240520 and 1 "
                         "(uint16 tokens) or 20240801 and 7 (uint32 tokens)")
    dtype, count = FORMATS[int(header[0])][1], int(header[2])
    if size != HEADER_BYTES + count * dtype.itemsize:
        raise ValueError(f"{path} should hold {count:,} tokens in {HEADER_BYTES + count * dtype.itemsize:,} bytes, but has "
                         f"{size:,} bytes: it was cut or damaged; make it again")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


def check_tokens(path, vocab_size):
    """
    Raises ValueError if read_tokens does, or if some token is not below vocab_size. All tokens are read for that, but only once:
    verified.json, beside the file, remembers its size and time of change.
    """
    tokens, path, stat = read_tokens(path), Path(path), os.stat(path)
    memory = path.parent / "verified.json"
    name, seen = path.name.removesuffix(".part"), [stat.st_size, stat.st_mtime_ns, vocab_size]      # .part: see fetch
    try:
        verified = json.loads(memory.read_text())
    except (OSError, ValueError):       # there is none, or it is damaged; it only saves time
        verified = {}
    if verified.get(name) == seen:
        return
    if (largest := int(tokens.max(initial=0))) >= vocab_size:
        raise ValueError(f"{path} has the token {largest:,}, but its vocabulary ends at {vocab_size - 1:,}: make it again")
    try:
        write_json(memory, {**verified, name: seen})
    except OSError:     # a folder that cannot be written, a full disk: the next run reads all tokens again
        return


class Stream:
    """Arrays of tokens as one: len(stream), and stream[start:stop], which may reach across their ends. Only that is read."""
    def __init__(self, arrays):
        self.arrays, self.ends = arrays, np.cumsum([len(array) for array in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, piece):
        parts, start = [], piece.start
        while start < piece.stop:
            i = np.searchsorted(self.ends, start, side="right")
            begin = self.ends[i] - len(self.arrays[i])
            parts.append(self.arrays[i][start - begin:piece.stop - begin])
            start = self.ends[i]
        return np.concatenate(parts)


def read_folder(folder, check=True):
    """
    (train tokens, val tokens, meta) of a data folder, the tokens as Streams. Raises ValueError if it is none, or if a file is
    missing, damaged, or not what meta.json says. Tokens beyond the vocabulary are looked for if `check`: see check_tokens.
    """
    meta_path, streams = Path(folder) / "meta.json", []
    if not meta_path.exists():
        raise ValueError(f"{folder} is no data folder (it has no meta.json); make one with prepare_data.py")
    try:
        meta = json.loads(meta_path.read_text())
        vocab_size = int(meta["vocab_size"])
        splits = [dict(meta[split].get("shards") or {f"{split}.bin": meta[split]["tokens"]}) for split in ("train", "val")]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{meta_path} is damaged; make {folder} again with prepare_data.py") from None
    for files in splits:
        streams.append(Stream([read_tokens(Path(folder) / name) for name in files]))
        for (name, expected), tokens in zip(tqdm(files.items(), f"reading all of {folder} once", delay=10, disable=not check),
                                            streams[-1].arrays):
            if len(tokens) != expected:
                raise ValueError(f"{folder}/{name} has {len(tokens):,} tokens, but {meta_path} says {expected:,}")
            if check:
                check_tokens(Path(folder) / name, vocab_size)
    return *streams, meta


# ---------------------------------------------------------------- the network

def within(seconds, function, *args, **options):
    """function(*args, **options), or TimeoutError if that takes longer. In a thread, since the time-outs of sockets count neither
    the name service nor a server's further addresses, and some libraries set none."""
    results = queue.SimpleQueue()

    def call():
        try:
            results.put((function(*args, **options), None))
        except Exception as error:      # to be raised below
            results.put((None, error))
    threading.Thread(target=call, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds} s") from None
    if error:
        raise error
    return result


def receive(url, part, bar):
    """Append to the file `part` what it lacks of url; all of it if the server sends that. Raises what requests raises."""
    with open(part, "ab") as file:
        have = file.tell()
        headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}        # else the bytes may be those of a .gz
        with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as answer:
            if answer.status_code == 416:       # there are no more bytes
                return
            if answer.status_code not in (200, 206):
                raise requests.HTTPError(f"the server says {answer.status_code} {answer.reason}")
            if answer.status_code == 200:       # from the first byte on
                bar.update(-have)
                have = file.seek(file.truncate(0))
            for block in answer.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
            if file.tell() - have < int(answer.headers.get("Content-Length", 0)):      # urllib3 1 does not notice
                raise requests.ConnectionError("the connection was cut")
        file.flush()
        os.fsync(file.fileno())


def download(url, path, check, bar):
    """The file at url, as `path` once check(path.part) raises no ValueError. Raises ValueError if that fails ATTEMPTS times."""
    part = Path(f"{path}.part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            receive(url, part, bar)
            check(part)
            return os.replace(part, path)
        except requests.RequestException as error:
            trouble = f"{type(error).__name__}: {error}"
        except ValueError as error:     # an error page, say
            trouble = error
            bar.update(-part.stat().st_size)
            part.unlink()
        if attempt < ATTEMPTS:
            bar.write(f"{url}: {trouble}; trying again")
            time.sleep(BACKOFF * 2 ** (attempt - 1))
    raise ValueError(f"{url} could not be downloaded ({trouble}); the same command continues")


def fetch(base, files, out, check):
    """
    Download files, {name: bytes}, from base to the folder out, unless they are there and check(path) does not raise ValueError.
    What has come of a file is in NAME.part, where the next run goes on. Raises ValueError if a file cannot be had.
    """
    def is_missing(name):
        try:
            check(out / name)
        except ValueError:
            return True

    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)      # two processes would write to the same .part
        missing = [name for name in files if is_missing(name)]
        if not missing:
            return
        total, parts = sum(files[name] for name in missing), [Path(f"{out / name}.part") for name in missing]
        have = sum(part.stat().st_size for part in parts if part.exists())
        if total - have > (free := shutil.disk_usage(out).free):
            raise ValueError(f"{total - have:,} bytes are to be downloaded to {out}, which has room for {free:,}")
        try:
            within(PATIENCE, requests.head, base + missing[0], timeout=PATIENCE)
        except (requests.RequestException, TimeoutError) as error:
            raise ValueError(f"{base} does not answer ({type(error).__name__}); without a network, use "
                             "`python prepare_data.py`, which makes data of Python's standard library") from None
        with bytes_bar(total, out, initial=have) as bar:
            for name in missing:
                download(base + name, out / name, check, bar)
    except BlockingIOError:
        raise ValueError(f"another process is downloading to {out}") from None
    finally:
        os.close(folder)


def bytes_bar(total, out, **options):
    return tqdm(total=total, desc=str(out), unit="B", unit_scale=True, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10, **options)


# ---------------------------------------------------------------- tokenizers

def get_encoding(name):
    """An encoding of tiktoken. Raises ValueError within PATIENCE seconds if its vocabulary is neither cached nor to be had."""
    import tiktoken
    try:
        return within(PATIENCE, tiktoken.get_encoding, name)
    except (OSError, ValueError) as error:      # OSError: also what requests raises, and TimeoutError
        raise ValueError(f"tiktoken could not load the vocabulary of {name!r} ({type(error).__name__}): where there is a network "
                         f"run `TIKTOKEN_CACHE_DIR=vocab python -c \"import tiktoken; tiktoken.get_encoding('{name}')\"`, copy "
                         "vocab here and set TIKTOKEN_CACHE_DIR to it, or use --tokenizer=byte") from None


def get_tokenizer(name):
    """
    (encode: list of str -> list of token lists, decode: tokens -> str, vocabulary size, end-of-text token or None) of
    "byte" or of an encoding of tiktoken. Raises ValueError if there is no such encoding or it cannot be loaded.
    """
    if name == "byte":
        return (lambda texts: [np.frombuffer(text.encode(errors="replace"), np.uint8) for text in texts],
                lambda tokens: bytes(tokens).decode(errors="replace"), 256, None)
    import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"there is no tokenizer {name!r}; choose byte or one of {', '.join(tiktoken.list_encoding_names())}")
    encoding = get_encoding(name)
    return encoding.encode_ordinary_batch, encoding.decode, encoding.n_vocab, encoding.eot_token


def count_bytes(tokens, encoding):
    """How many bytes of text the tokens stand for; end-of-text stands for none."""
    lengths = np.array([len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)])
    lengths[encoding.eot_token] = 0
    return sum(int(lengths[tokens[i:i + CHUNK]].sum()) for i in range(0, len(tokens), CHUNK))


# ---------------------------------------------------------------- text

def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stdlib_files():
    """Folder of Python's standard library and its source files there, sorted; tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return root, sorted(path.relative_to(root) for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))


def text_files(source):
    """Folder and files, relative to it, of a text or of a folder of texts. Raises ValueError if there is no text."""
    root, files = Path(source), []
    if root.is_dir():
        files = sorted(path.relative_to(root) for path in root.rglob("*"))
    elif root.is_file():
        root, files = root.parent, [Path(root.name)]
    files = [file for file in files if file.name.endswith((".txt", ".txt.gz")) and (root / file).is_file()]
    if not files:
        raise ValueError(f"{source} must be a .txt or .txt.gz file, or a folder that holds some; or fineweb_edu, or shakespeare")
    return root, files


def text_chunks(path, bar):
    """The text of a .txt, .txt.gz or .py file, in pieces that end at a line's end, or after 2 CHUNK characters if none comes."""
    with open(path, "rb") as raw:
        file = io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, encoding="utf-8", errors="replace")
        position = 0
        while text := file.read(CHUNK) + file.readline(CHUNK):
            yield text
            bar.update(raw.tell() - position)       # in bytes of the file, also if they are packed
            position = raw.tell()


def documents(root, files, bar):
    """(path, number of its characters to train on; the rest is for validation) of each file. Of WHOLE_FILES or more, a hash of
    its path sends each to one split (it stays there when files are added); of fewer, the last part of each is for validation."""
    for file in files:
        if len(files) >= WHOLE_FILES:
            yield root / file, 0 if zlib.crc32(file.as_posix().encode()) % VAL_SHARE == 0 else sys.maxsize
        else:
            yield root / file, round(sum(map(len, text_chunks(root / file, bar))) * (1 - 1 / VAL_SHARE))


def pieces(root, files, bar):
    """The text of all files as (split, text), with None for the text where a document ends."""
    for path, train_length in documents(root, files, bar):
        left = train_length
        for text in text_chunks(path, bar):
            if left > 0:
                yield "train", text[:left]
            if left < len(text):
                yield "val", text[left:]
            left = max(0, left - len(text))
        if train_length > 0:
            yield "train", None
        if train_length < sys.maxsize:
            yield "val", None


def tokenize(pieces, encode, end_of_text):
    """(split, tokens, bytes) of each piece, in order. A thread for each core, which tiktoken lets run, encodes the next ones.
    Only where a piece ends, once a MB, can the tokens differ from those of the whole text: white space is not joined there."""
    def work(split, text):
        if text is None:
            return split, [] if end_of_text is None else [end_of_text], 0
        return split, np.asarray(encode([text])[0], np.uint32), len(text.encode(errors="replace"))

    cores, waiting = os.cpu_count(), deque()
    with ThreadPoolExecutor(cores) as pool:
        for piece in pieces:
            waiting.append(pool.submit(work, *piece))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prepare(root, files, out, tokenizer="byte", progress=True):
    """Tokenize files (relative to the folder root) into out/train.bin, out/val.bin and out/meta.json; returns the latter.
    Raises ValueError if the tokenizer cannot be had or one of the two splits would be empty."""
    encode, _, vocab_size, end_of_text = get_tokenizer(tokenizer)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    writers, text_bytes = {split: [TokenWriter(out / f"{split}.bin", vocab_size)] for split in ("train", "val")}, Counter()
    total = sum((root / file).stat().st_size for file in files) * (1 if len(files) >= WHOLE_FILES else 2)    # 2: see documents
    try:
        with bytes_bar(total, out, disable=not progress) as bar:
            for split, tokens, size in tokenize(pieces(root, files, bar), encode, end_of_text):
                if writers[split][-1].tokens + len(tokens) > FILE_TOKENS:
                    writers[split].append(TokenWriter(out / f"{split}_{len(writers[split]):06d}.bin", vocab_size))
                writers[split][-1].write(tokens)
                text_bytes[split] += size
        if empty := [split for split in writers if text_bytes[split] == 0]:
            raise ValueError(f"no text for {' and '.join(empty)}: {root} needs more of it")
        for writer in (*writers["train"], *writers["val"]):
            writer.close()
    finally:
        for writer in (*writers["train"], *writers["val"]):
            writer.temporary.unlink(missing_ok=True)
    meta = dict(tokenizer=tokenizer, vocab_size=vocab_size)
    for split, (first, *more) in writers.items():
        meta[split] = dict(tokens=first.tokens, bytes=text_bytes[split], sha256=sha256(first.path))
        if more:
            shards = {writer.path.name: writer.tokens for writer in (first, *more)}
            meta[split] = dict(tokens=sum(shards.values()), bytes=text_bytes[split], shards=shards)
    write_json(out / "meta.json", meta)
    return meta


# ---------------------------------------------------------------- sources

def prepare_stdlib(out="data/stdlib", progress=True):
    return prepare(*stdlib_files(), out, progress=progress)


def prepare_shakespeare(out, tokenizer):
    def check(path):
        if not path.exists() or sha256(path) != SHAKESPEARE_SHA256:
            raise ValueError(f"{path} is not the text it should be")
    fetch(SHAKESPEARE, {"input.txt": SHAKESPEARE_BYTES}, out, check)
    return prepare(out, [Path("input.txt")], out, tokenizer)


def prepare_fineweb_edu(out, tokens):
    """Validation shard and the first shards for training that have so many tokens, as GPT-2's tokenizer made them, to out."""
    if not 1 <= tokens <= SHARDS * SHARD_TOKENS:
        raise ValueError(f"--tokens must be between 1 and {SHARDS * SHARD_TOKENS:,}, not {tokens}")
    names = dict(train=[f"edu_fineweb_train_{i:06d}.bin" for i in range(1, math.ceil(tokens / SHARD_TOKENS) + 1)],
                 val=["edu_fineweb_val_000000.bin"])
    meta = dict(tokenizer="gpt2", vocab_size=50257)
    fetch(FINEWEB_EDU, dict.fromkeys(names["val"] + names["train"], HEADER_BYTES + 2 * SHARD_TOKENS), out,
          lambda path: check_tokens(path, meta["vocab_size"]))
    for split in names:
        shards = {name: len(read_tokens(out / name)) for name in names[split]}
        meta[split] = dict(tokens=sum(shards.values()), bytes=None, shards=shards)
    try:
        meta["val"]["bytes"] = count_bytes(read_tokens(out / names["val"][0]), get_encoding("gpt2"))
    except ValueError as error:
        print(f"bits per byte will be unknown, until this command is run again with GPT-2's vocabulary: {error}")
    write_json(out / "meta.json", meta)
    return meta


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("source", nargs="?", help="a .txt or .txt.gz file, a folder of them, fineweb_edu or shakespeare; without "
                                                  "one, Python's standard library")
    parser.add_argument("--tokenizer", help="byte (default), gpt2 or another encoding of tiktoken; fineweb_edu has gpt2")
    parser.add_argument("--tokens", type=float, help="how many of fineweb_edu to train on, in whole shards of 1e8; default 1e9")
    parser.add_argument("--out", help="folder to write; default data/NAME, after the source")
    parser.error = lambda message: sys.exit(f"prepare_data.py: {message} (see --help)")
    args = parser.parse_args()
    if args.source == "fineweb_edu" and args.tokenizer not in (None, "gpt2"):
        parser.error(f"fineweb_edu comes as tokens of gpt2, not of {args.tokenizer}")
    if args.source != "fineweb_edu" and args.tokens is not None:
        parser.error("--tokens goes with fineweb_edu alone")
    out = Path(args.out or Path("data") / Path(args.source or "stdlib").resolve().name.removesuffix(".gz").removesuffix(".txt"))
    try:
        if args.source == "fineweb_edu":
            meta = prepare_fineweb_edu(out, 1e9 if args.tokens is None else args.tokens)
        elif args.source == "shakespeare":
            meta = prepare_shakespeare(out, args.tokenizer or "byte")
        else:
            meta = prepare(*(text_files(args.source) if args.source else stdlib_files()), out, args.tokenizer or "byte")
    except (ValueError, OSError, EOFError, zlib.error) as error:       # the last two: a damaged .gz
        parser.error(error)
    except KeyboardInterrupt:
        parser.error("interrupted; the same command goes on with a download, and begins again with a text")
    print(f"{out}: {meta['train']['tokens']:,} tokens to train on and {meta['val']['tokens']:,} to validate on, "
          f"vocabulary {meta['vocab_size']:,} ({meta['tokenizer']})")


if __name__ == "__main__":
    main()
