"""The long text of the demo: six novels shipped with the package, or any text file."""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path

BOOK_PATH = Path(__file__).with_name("austen.txt.xz")
BOOK_SHA256 = "9f5898c21644f7bf8f7f56a90370728d6e3ec9da49baf77d9337eb362643cb71"
BOOK_TITLE = "six novels of Jane Austen"
HELD_OUT_CHARS = 684_771
"""The first novel (Pride and Prejudice) ends here; the demo model was never trained on it."""


def load_book() -> str:
    """The shipped book, 4,025,043 characters, checked against its SHA-256.

    Raises:
        ValueError: the file is damaged (its text is not the one that was packed).
    """
    try:
        data = lzma.decompress(BOOK_PATH.read_bytes())
    except lzma.LZMAError as error:
        raise ValueError(f"{BOOK_PATH.name}: expected an .xz file, got one that does not unpack ({error})") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != BOOK_SHA256:
        raise ValueError(f"{BOOK_PATH.name}: expected a text with SHA-256 {BOOK_SHA256}, got {digest}")
    return data.decode("utf-8")


def load_text(path: str | Path, name: str = "text") -> str:
    """A user's own UTF-8 text file, plain or packed (.xz). Errors begin with `name`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8 text, or nothing but white space in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a file, got {str(path)!r}")
    data = path.read_bytes()
    if path.suffix == ".xz":
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise ValueError(f"{name}: {str(path)!r} does not unpack as .xz ({error})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, got {str(path)!r} with {error}") from None
    if not text.strip():
        raise ValueError(f"{name}: expected some text, got {str(path)!r} with none")
    return text.replace("\r\n", "\n")
