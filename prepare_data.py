"""
Text to token files for train.py.

    python prepare_data.py                              Python's standard library, as bytes, to data/stdlib: no network
    python prepare_data.py book.txt --tokenizer=gpt2    your text to data/book: a .txt or .txt.gz, or a folder of them
    python prepare_data.py fineweb_edu --tokens=1e9     educational web pages in tokens of GPT-2, downloaded: 2 GB
    python prepare_data.py shakespeare                  his plays, downloaded: 1.1 MB

A data folder holds token files and meta.json: the tokenizer, its vocabulary size, and the numbers of tokens and bytes
of "train" and "val". Each of the two is train.bin or val.bin, or the files listed as "shards", read as one stream.
A token file has llm.c's format: 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens.
"""
import argparse, fcntl, functools, gzip, hashlib, itertools, json, os, shutil, sys, sysconfig, time, zlib
import multiprocessing.pool
from pathlib import Path

import numpy as np
import requests
import tiktoken
from tqdm import tqdm

FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}     # (magic, version): type of a token
HEADER_BYTES = 256 * 4
MAX_TOKENS = 2 ** 31 - 1    # that the header can count
VAL_SHARE = 20              # one part in 20 of the text is for validation
WHOLE_FILES = 200           # of so many files or more, each goes to one split as a whole
CHUNK = 1 << 20             # characters of a piece of text
FINEWEB_EDU = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"
SHARDS, SHARD_TOKENS = 1001, 100_000_000        # for training; the last shard may have fewer tokens
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATIENCE = 8                # seconds to wait for a server's answer, and then for more of it
ATTEMPTS, BACKOFF = 5, 1    # to download a file, and seconds before the second one
BAR = dict(unit="B", unit_scale=True, mininterval=1)


# ---------------------------------------------------------------- files

def sync(path):
    """Returns once the file, or the folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

def write_aside(path, write):
    """Calls write(binary file). Whatever happens meanwhile, path is the old file or the whole new one, on the disk."""
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
    write_aside(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))

def read_tokens(path, expected=None):
    """Tokens of a token file: a read-only memory map of uint16 or uint32, shape (tokens,). Raises ValueError if the
    file is missing, is no token file, or has another length than its header says, or than `expected` tokens."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing; make it with prepare_data.py")
    size, header = os.path.getsize(path), np.fromfile(path, dtype="<i4", count=256).tolist()
    dtype, tokens = FORMATS.get(tuple(header[:2])), header[2] if len(header) == 256 else 0
    if dtype is None or size < HEADER_BYTES:
        raise ValueError(f"{path} is not a token file as at the head of prepare_data.py; delete it and make it again")
    if size != HEADER_BYTES + tokens * dtype.itemsize:
        raise ValueError(f"{path} was cut: {size:,} bytes cannot be {tokens:,} tokens; delete it and make it again")
    if expected not in (None, tokens):
        raise ValueError(f"{path} has {tokens:,} tokens, but meta.json says {expected:,}; make its folder again")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(tokens,))

class Stream:
    """Arrays of tokens as one: len(stream), and stream[start:stop], which may cross from an array to the next."""
    def __init__(self, arrays):
        self.arrays, self.ends = arrays, np.cumsum([len(array) for array in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, piece):
        first, last = np.searchsorted(self.ends, (piece.start, piece.stop - 1), side="right")
        parts = [(array, end - len(array)) for array, end in zip(self.arrays[first:last + 1], self.ends[first:])]
        return np.concatenate([array[max(0, piece.start - begin):piece.stop - begin] for array, begin in parts])

def read_folder(folder):
    """(train Stream, val Stream, meta.json's content) of a data folder. Raises ValueError if a file is not right."""
    folder, streams = Path(folder), []
    try:
        meta = json.loads((folder / "meta.json").read_text(errors="replace"))
        for split in ("train", "val"):
            files = meta[split].get("shards") or {f"{split}.bin": meta[split]["tokens"]}
            streams.append(Stream([read_tokens(folder / name, tokens) for name, tokens in files.items()]))
        return *streams, meta
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is no data folder (it has no meta.json); make one with prepare_data.py") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder}/meta.json is damaged; make {folder} again with prepare_data.py") from None

@functools.lru_cache(maxsize=2)
def epoch_starts(seed, epoch, seq_len, num_tokens):
    """Where the windows of an epoch begin: each epoch cuts the tokens at another offset, and has another order."""
    offset = epoch % ((num_tokens - 1) % seq_len + 1)
    return offset + seq_len * np.random.default_rng((seed, epoch)).permutation((num_tokens - 1) // seq_len)

def batch_starts(seed, step, batch_size, seq_len, num_tokens):
    """Where the sequences of batch `step` begin: a pure function of (seed, step). Each epoch has every window once."""
    places = [divmod(i, (num_tokens - 1) // seq_len) for i in range(step * batch_size, (step + 1) * batch_size)]
    return [int(epoch_starts(seed, epoch, seq_len, num_tokens)[i]) for epoch, i in places]

def validation_starts(num_tokens, seq_len, eval_tokens):
    """Where the sequences of an evaluation begin: about eval_tokens tokens, spread evenly over num_tokens."""
    windows = (num_tokens - 1) // seq_len
    count = min(windows, max(1, eval_tokens // seq_len))
    return [i * windows // count * seq_len for i in range(count)]


# ---------------------------------------------------------------- the network

def in_time(hint, function, *args):
    """function(*args). Raises ValueError with the hint after PATIENCE seconds, even if a name server hangs."""
    try:
        with multiprocessing.pool.ThreadPool(1) as pool:
            return pool.apply_async(function, args).get(PATIENCE)
    except (OSError, ValueError, multiprocessing.TimeoutError) as error:
        raise ValueError(f"could not get {args[0]} ({type(error).__name__}): {hint}") from None

def download(url, path, verify, bar):
    """Downloads url to path.part, renamed to path once verify(path.part) passes. Raises ValueError after ATTEMPTS."""
    part = Path(f"{path}.part")
    for attempt in range(ATTEMPTS):
        time.sleep(BACKOFF * attempt ** 2)
        try:
            part.touch()
            headers = {"Range": f"bytes={part.stat().st_size}-", "Accept-Encoding": "identity"}
            with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as answer:
                if answer.status_code != 416:       # 416: no bytes are left
                    answer.raise_for_status()
                    with open(part, "ab" if answer.status_code == 206 else "wb") as file:
                        for block in answer.iter_content(1 << 16):
                            bar.update(file.write(block))
            verify(part)
            sync(part)
            return os.replace(part, path)
        except (requests.RequestException, ValueError) as error:
            if not isinstance(error, requests.RequestException):        # what came fails verify: an error page, say
                part.unlink()
            trouble = f"{type(error).__name__}: {error}"
        bar.write(f"{url}: {trouble}")
    raise ValueError(f"{url} could not be downloaded ({trouble}); the same command continues")

def fetch(base, files, out, verify):
    """Downloads those of files, {name: bytes}, that the folder out lacks. Raises ValueError if a file cannot be had."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)        # two processes would write to one .part
        missing = [name for name in files if not (out / name).exists()]
        have, total = sum(part.stat().st_size for part in out.glob("*.part")), sum(files[name] for name in missing)
        if total - have > (free := shutil.disk_usage(out).free):
            raise ValueError(f"{total - have:,} bytes are to be downloaded to {out}, which has room for {free:,}")
        if missing:
            in_time("without a network, use `python prepare_data.py`", requests.head, base + missing[0])
        with tqdm(total=total, initial=have, desc=str(out), **BAR) as bar:
            for name in missing:
                download(base + name, out / name, verify, bar)


# ---------------------------------------------------------------- text to tokens

def get_tokenizer(name):
    """(encode: list of str -> list of token lists, decode: tokens -> str, vocab_size, end-of-text token or None) of
    "byte" or an encoding of tiktoken. Raises ValueError if there is no such encoding, or no way to its vocabulary."""
    if name == "byte":
        return (lambda texts: [np.frombuffer(text.encode(errors="replace"), np.uint8) for text in texts],
                lambda tokens: bytes(tokens).decode(errors="replace"), 256, None)
    if name not in (names := tiktoken.list_encoding_names()):
        raise ValueError(f"there is no tokenizer {name!r}; choose byte or one of {', '.join(names)}")
    encoding = in_time("set TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled elsewhere, or use --tokenizer=byte",
                       tiktoken.get_encoding, name)
    return (lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()),
            encoding.decode, encoding.n_vocab, encoding.eot_token)

def text_files(source):
    """(folder, sorted paths in it) of a text or of a folder of texts. Raises ValueError if there is no text."""
    root, paths = (source, sorted(source.rglob("*"))) if source.is_dir() else (source.parent, [source])
    files = [path.relative_to(root) for path in paths if path.name.endswith((".txt", ".txt.gz")) and path.is_file()]
    if not files:
        raise ValueError(f"{source} must be a .txt or .txt.gz file, a folder of them, fineweb_edu or shakespeare")
    return root, files

def text_chunks(path):
    """Yields the text of a file in pieces that end at a line's end, or after 2 CHUNK characters if no line ends."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace") as file:
        while text := file.read(CHUNK) + file.readline(CHUNK):
            yield text

def split_chunks(root, files):
    """Yields (split, text), with text None where a document ends. Of WHOLE_FILES or more, each goes to one split by a
    hash of its path, and stays there when others are added. Of fewer, the last part of each is for validation."""
    for file in files:
        if len(files) >= WHOLE_FILES:
            split = "val" if zlib.crc32(file.as_posix().encode()) % VAL_SHARE == 0 else "train"
            yield from ((split, text) for text in text_chunks(root / file))
            yield split, None
        else:
            train_left = round(sum(map(len, text_chunks(root / file))) * (1 - 1 / VAL_SHARE))
            for text in text_chunks(root / file):
                yield "train", text[:train_left]
                yield "val", text[train_left:]
                train_left = max(0, train_left - len(text))
            yield from (("train", None), ("val", None))

def prepare(root, files, out, tokenizer="byte", progress=True):
    """meta.json's content, written to the folder out with train.bin and val.bin, from text files in the folder root.
    Raises ValueError if the tokenizer cannot be had, or a split would have no text or more than MAX_TOKENS tokens."""
    encode, _, vocab_size, end_of_text = get_tokenizer(tokenizer)
    (magic, version), dtype = list(FORMATS.items())[vocab_size > 1 << 16]
    meta, text_bytes = dict(tokenizer=tokenizer, vocab_size=vocab_size), dict(train=0, val=0)
    out, chunks, batch_size = Path(out), split_chunks(root, files), 2 * os.cpu_count()      # half of them may be empty
    def write(train, val):
        token_files = dict(train=train, val=val)
        for file in token_files.values():
            file.seek(HEADER_BYTES)
        while batch := list(itertools.islice(chunks, batch_size)):
            for (split, text), tokens in zip(batch, encode([text or "" for _, text in batch])):
                if text is None and end_of_text is not None:
                    tokens = [end_of_text]
                token_files[split].write(np.asarray(tokens, dtype).tobytes())
                text_bytes[split] += len((text or "").encode(errors="replace"))
            bar.update(sum(text_bytes.values()) - bar.n)
        for split, file in token_files.items():
            count = (file.tell() - HEADER_BYTES) // dtype.itemsize
            if text_bytes[split] == 0 or count > MAX_TOKENS:
                raise ValueError(f"{root} has {count:,} tokens of text for {split}; 1 to {MAX_TOKENS:,} fit a file")
            meta[split] = dict(tokens=count, bytes=text_bytes[split])
            file.seek(0)
            file.write(np.array([magic, version, count], "<i4").tobytes())
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock, tqdm(desc=str(out), disable=not progress, **BAR) as bar:
        fcntl.flock(lock, fcntl.LOCK_EX)        # two processes would write to one .tmp
        write_aside(out / "train.bin", lambda train: write_aside(out / "val.bin", lambda val: write(train, val)))
        for split in ("train", "val"):
            meta[split]["sha256"] = hashlib.sha256(np.memmap(out / f"{split}.bin", np.uint8, "r")).hexdigest()
        write_json(out / "meta.json", meta)
    return meta

def prepare_stdlib(out="data/stdlib", progress=True, tokenizer="byte"):
    """meta.json's content, of data made of the source of Python's standard library without tests and packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return prepare(root, [file for file in files if not left_out & set(file.parts)], out, tokenizer, progress)

def prepare_shakespeare(out, tokenizer):
    def verify(path):
        if hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest() != SHAKESPEARE_SHA256:
            raise ValueError(f"{path} has not the sha256 of Shakespeare's plays; delete it")
    fetch(SHAKESPEARE, {"input.txt": 1_115_394}, out, verify)
    verify(out / "input.txt")       # also if it was there
    return prepare(out, [Path("input.txt")], out, tokenizer)

def prepare_fineweb_edu(out, tokens):
    """meta.json's content, written to out with the validation shard and the first training shards of so many tokens."""
    if not 1 <= tokens <= SHARDS * SHARD_TOKENS:
        raise ValueError(f"--tokens must be between 1 and {SHARDS * SHARD_TOKENS:,}, not {tokens}")
    vocab_size, meta = 50257, dict(tokenizer="gpt2", vocab_size=50257)
    def verify(path):
        if (largest := int(read_tokens(path).max(initial=0))) >= vocab_size:
            raise ValueError(f"{path} has the token {largest:,}, but its vocabulary ends at {vocab_size - 1:,}")
    names = dict(train=[f"edu_fineweb_train_{i + 1:06d}.bin" for i in range(SHARDS) if i * SHARD_TOKENS < tokens],
                 val=["edu_fineweb_val_000000.bin"])
    fetch(FINEWEB_EDU, dict.fromkeys(names["val"] + names["train"], HEADER_BYTES + 2 * SHARD_TOKENS), out, verify)
    for split in names:
        shards = {name: len(read_tokens(out / name)) for name in names[split]}
        meta[split] = dict(tokens=sum(shards.values()), bytes=None, shards=shards)
    try:
        get_tokenizer("gpt2")
        encoding, tokens = tiktoken.get_encoding("gpt2"), read_tokens(out / names["val"][0])
        sizes = np.array([len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)])
        sizes[encoding.eot_token] = 0
        meta["val"]["bytes"] = sum(int(sizes[tokens[i:i + CHUNK]].sum()) for i in range(0, len(tokens), CHUNK))
    except ValueError as error:
        print(f"bits per byte will be unknown, until this command is run again with GPT-2's vocabulary: {error}")
    write_json(out / "meta.json", meta)
    return meta

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="text, folder, fineweb_edu or shakespeare; default Python's library")
    parser.add_argument("--tokenizer", help="byte (default), gpt2 or another of tiktoken; fineweb_edu has gpt2")
    parser.add_argument("--tokens", type=float, help="of fineweb_edu to train on, in whole shards of 1e8; default 1e9")
    parser.add_argument("--out", help="folder to write; default data/NAME, after the source")
    parser.error = lambda message: sys.exit(f"prepare_data.py: {message} (see --help)")
    args = parser.parse_args()
    fineweb = args.source == "fineweb_edu"
    if fineweb and args.tokenizer not in (None, "gpt2") or not fineweb and args.tokens is not None:
        parser.error("--tokens goes with fineweb_edu alone, which comes as tokens of gpt2")
    name = Path(args.source or "stdlib").resolve().name.removesuffix(".gz").removesuffix(".txt")
    out, tokenizer = Path(args.out or f"data/{name}"), args.tokenizer or "byte"
    try:
        if fineweb:
            meta = prepare_fineweb_edu(out, 1e9 if args.tokens is None else args.tokens)
        elif args.source == "shakespeare":
            meta = prepare_shakespeare(out, tokenizer)
        elif args.source:
            meta = prepare(*text_files(Path(args.source)), out, tokenizer)
        else:
            meta = prepare_stdlib(out, tokenizer=tokenizer)
    except BlockingIOError:
        parser.error(f"another process is writing to {out}")
    except (ValueError, OSError, EOFError, zlib.error, KeyboardInterrupt) as error:     # EOFError, zlib: a damaged .gz
        parser.error(str(error) or "interrupted; a download goes on with the same command")
    print(f"{out}: {meta['train']['tokens']:,} tokens to train on and {meta['val']['tokens']:,} to validate on")

if __name__ == "__main__":
    main()
