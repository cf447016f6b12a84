"""
Text to token files for train.py.

    python prepare_data.py                              Python's standard library, as bytes, to data/stdlib: no network needed
    python prepare_data.py book.txt --tokenizer=gpt2    your text to data/book: a .txt or .txt.gz file, or a folder of them
    python prepare_data.py texts/ --out=data/mine

Each data folder holds train.bin, val.bin and meta.json (tokenizer, vocabulary, token and byte counts, sha256 of each file).
A .bin file is llm.c's format: 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens.
"""
import argparse
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

FORMATS = {     # magic: (version, type of a token), as in llm.c's dev/data/data_common.py
    20240520: (1, np.dtype("<u2")),     # vocabularies up to 65,536
    20240801: (7, np.dtype("<u4")),     # larger ones
}
HEADER_BYTES = 256 * 4
VAL_SHARE = 20          # one part in 20 of the text is for validation
CHUNK = 1 << 20         # characters of text in memory at once, for each core


class TokenWriter:
    """Writes a token file, tokens as they come. It has its own name only once `close` has made it whole."""
    def __init__(self, path, vocab_size):
        self.path, self.temporary = Path(path), Path(f"{path}.{os.getpid()}.tmp")
        self.magic = 20240520 if vocab_size <= 1 << 16 else 20240801
        self.version, self.dtype = FORMATS[self.magic]
        self.tokens = self.text_bytes = 0
        self.file = open(self.temporary, "wb")
        self.file.write(bytes(HEADER_BYTES))

    def write(self, tokens, text_bytes):
        self.file.write(np.asarray(tokens).astype(self.dtype).tobytes())
        self.tokens, self.text_bytes = self.tokens + len(tokens), self.text_bytes + text_bytes
        if self.tokens >= 2 ** 31:
            raise ValueError(f"{self.path} would have more than 2^31 tokens, which its header cannot hold; give it less text")

    def close(self):
        header = np.zeros(256, dtype="<i4")
        header[:3] = self.magic, self.version, self.tokens
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.close()
        os.replace(self.temporary, self.path)


def read_tokens(path):
    """
    The tokens of a .bin file as a read-only memory map (uint16 or uint32).
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


def get_tokenizer(name):
    """
    (encode: list of str -> list of token lists, decode: tokens -> str, vocabulary size, end-of-text token or None) of
    "byte" or of an encoding of tiktoken. Raises ValueError if there is no such encoding or it cannot be loaded.
    """
    if name == "byte":
        return (lambda texts: [np.frombuffer(text.encode(errors="replace"), np.uint8) for text in texts],
                lambda tokens: bytes(tokens).decode(errors="replace"), 256, None)
    import requests
    import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"there is no tokenizer {name!r}; choose byte or one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (requests.RequestException, OSError) as error:
        raise ValueError(f"tiktoken could not load the vocabulary of {name!r} ({type(error).__name__}): connect to the network, "
                         "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=byte") from None
    return encoding.encode_ordinary_batch, encoding.decode, encoding.n_vocab, encoding.eot_token


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


def text_chunks(path, start=0, stop=None):
    """The characters start:stop of a .txt, .txt.gz or .py file, in pieces of about CHUNK that end at a line's end."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        position = 0
        while lines := file.readlines(CHUNK):
            text = "".join(lines)
            piece = text[max(0, start - position):None if stop is None else max(0, stop - position)]
            position += len(text)
            if piece:
                yield piece


def documents(root, files):
    """(split, path, start, stop) of each part of each file. Of 200 files or more, a hash of its path sends each whole file
    to one split (the split then survives the addition of a file); of fewer, each file's last part is validation text."""
    for file in files:
        if len(files) >= 200:
            validates = zlib.crc32(file.as_posix().encode()) % VAL_SHARE == 0
            yield "val" if validates else "train", root / file, 0, None
        else:
            cut = round(sum(map(len, text_chunks(root / file))) * (1 - 1 / VAL_SHARE))
            yield "train", root / file, 0, cut
            yield "val", root / file, cut, None


def prepare(root, files, out, tokenizer="byte", progress=True):
    """Tokenize files (relative to the folder root) into out/train.bin, out/val.bin and out/meta.json; returns the latter.
    Raises ValueError if the tokenizer cannot be had or one of the two splits would be empty."""
    encode, _, vocab_size, end_of_text = get_tokenizer(tokenizer)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    writers = {split: TokenWriter(out / f"{split}.bin", vocab_size) for split in ("train", "val")}
    try:
        for split, path, start, stop in tqdm(list(documents(root, files)), desc=str(out), unit=" files", disable=not progress):
            for text in text_chunks(path, start, stop):
                for tokens in encode([text]):
                    writers[split].write(tokens, len(text.encode(errors="replace")))
            if end_of_text is not None:
                writers[split].write([end_of_text], 0)
        if empty := [split for split, writer in writers.items() if writer.text_bytes == 0]:
            raise ValueError(f"no text for {' and '.join(empty)}: {root} needs more of it")
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.temporary.unlink(missing_ok=True)
    meta = dict(tokenizer=tokenizer, vocab_size=vocab_size)
    for split, writer in writers.items():
        meta[split] = dict(tokens=writer.tokens, bytes=writer.text_bytes, sha256=sha256(writer.path))
    (out / "meta.json.tmp").write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(out / "meta.json.tmp", out / "meta.json")
    return meta


def prepare_stdlib(out="data/stdlib", progress=True):
    return prepare(*stdlib_files(), out, progress=progress)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("source", nargs="?", help="a .txt or .txt.gz file or a folder of them; without it, Python's standard library")
    parser.add_argument("--tokenizer", default="byte", help="byte (default), gpt2 or another encoding of tiktoken")
    parser.add_argument("--out", help="folder to write; default data/NAME, after the source")
    parser.error = lambda message: sys.exit(f"prepare_data.py: {message} (see --help)")
    args = parser.parse_args()
    if args.source is None:
        root, files = stdlib_files()
    elif os.path.isdir(args.source):
        root = Path(args.source)
        files = sorted(path.relative_to(root) for path in root.rglob("*") if path.name.endswith((".txt", ".txt.gz")))
    else:
        root, files = Path(args.source).parent, [Path(Path(args.source).name)]
    if args.source is not None and not (files and all((root / f).is_file() and f.name.endswith((".txt", ".txt.gz")) for f in files)):
        parser.error(f"{args.source} must be a .txt or .txt.gz file, or a folder that holds some")
    name = "stdlib" if args.source is None else Path(args.source).resolve().name.removesuffix(".gz").removesuffix(".txt")
    try:
        meta = prepare(root, files, args.out or Path("data") / name, args.tokenizer)
    except (ValueError, OSError, EOFError, zlib.error) as error:       # the last two: a damaged .gz
        parser.error(error)
    print(f"{args.out or Path('data') / name}: {meta['train']['tokens']:,} tokens to train on and {meta['val']['tokens']:,} to "
          f"validate on, vocabulary {meta['vocab_size']:,} ({meta['tokenizer']})")


if __name__ == "__main__":
    main()
