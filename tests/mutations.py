"""Inputs for llb's readers that no tool writes: seeds in all formats, and mutations of them.

A mutation takes the data and a random.Random, and gives other data.
"""

import io
import json
import random
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from llb.encoders.weights import read_tensors

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
SIDES = [0, 1, 21, 1000, 9000, 30_000, 65_535, 10**6, 16_842_752, 2**31 - 1, 2**32 - 1]
OPCODES = b"(.012FIJKLMNPRSTUVX]abcdeghijlopqrstu}\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x94\x95"  # of pickles
ODD = [
    None,
    True,
    -1,
    2**70,
    1e999,
    "",
    " ",
    "\0",
    "../x",
    "/etc/passwd",
    "a" * 5000,
    "\n",
    "\x1b[2J",
    "\udc80",
    [],
    {},
]
REFERENCE = Path(__file__).parent / "reference"
Seeds = dict[str, bytes]  # file name → content


# ---- seeds ----


FORMATS = {  # ending → Pillow's name, modes, ways of saving
    "png": ("PNG", "1 L LA P RGB RGBA I;16", [{}, {"optimize": True}]),
    "jpg": ("JPEG", "L RGB CMYK", [{}, {"progressive": True}]),
    "bmp": ("BMP", "1 L P RGB RGBA", [{}]),
    "tif": ("TIFF", "1 L LA P RGB RGBA CMYK YCbCr I;16 I F", [{"compression": c} for c in (None, "tiff_lzw")]),
    "tiff": ("TIFF", "L RGB", [{"compression": c} for c in ("packbits", "tiff_adobe_deflate", "jpeg")]),
    "gif": ("GIF", "L P", [{}, {"save_all": True}]),
    "webp": ("WEBP", "RGB RGBA", [{}, {"lossless": True}, {"save_all": True}]),
    "jp2": ("JPEG2000", "L LA RGB RGBA I;16", [{}]),
    "avif": ("AVIF", "RGB RGBA", [{}]),
    "tga": ("TGA", "1 L LA P RGB RGBA", [{}]),
    "rle.tga": ("TGA", "L LA P RGB RGBA", [{"compression": "tga_rle"}]),
    "ppm": ("PPM", "1 L RGB I", [{}]),
    "pfm": ("PPM", "F", [{}]),
    "mpo": ("MPO", "RGB", [{"save_all": True}]),
    "pages.tif": ("TIFF", "1 RGB", [{"save_all": True}]),
}


def image_seeds(_folder: Path) -> Seeds:
    """A picture of 24 × 20 pixels in all formats and modes that llb reads, written by Pillow or by hand."""
    draws = np.random.default_rng(0)
    grey = draws.integers(0, 256, (20, 24), np.uint8)
    colour = Image.fromarray(draws.integers(0, 256, (20, 24, 3), np.uint8))
    modes = {mode: colour.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")}
    modes |= {"I;16": Image.fromarray(grey.astype(np.uint16) * 17), "F": Image.fromarray(grey.astype(np.float32) / 255)}
    modes |= {"I": Image.fromarray(grey.astype(np.int32))}
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation
    seeds = {}
    for ending, (kind, names, ways) in FORMATS.items():
        for mode in names.split():
            for number, way in enumerate(ways):
                file, way = io.BytesIO(), dict(way)
                if "save_all" in way:
                    way["append_images"] = [modes[mode].transpose(Image.Transpose.ROTATE_180)]
                if kind in ("PNG", "JPEG", "WEBP"):
                    way["exif"] = turned
                modes[mode].save(file, kind, **way)
                seeds[f"{mode.replace(';', '')}{number}.{ending}"] = file.getvalue()
    seeds["text.pgm"] = b"P2\n# a comment\n24 20 4095\n" + b" ".join(b"%d" % (16 * int(v)) for v in grey.ravel())
    seeds["text.ppm"] = b"P3 4 4 255\n" + b" ".join(b"%d" % v for v in grey.ravel()[:48])
    seeds["text.pbm"] = b"P1 24 20\n" + b" ".join(b"%d" % (v > 99) for v in grey.ravel())
    return seeds


def weight_seeds(_folder: Path) -> Seeds:
    """PyTorch's own files of both formats, and the same tensors as safetensors."""
    names = ("encoder_zip.pth", "encoder_legacy.pth", "tensors_zip.pth", "tensors_legacy.pth")
    seeds = {name: (REFERENCE / name).read_bytes() for name in names}
    for name in names[1:3]:
        tensors = {key: np.ascontiguousarray(value) for key, value in read_tensors(REFERENCE / name).items()}
        seeds[name.replace(".pth", ".safetensors")] = safetensors.numpy.save(tensors, {"format": "pt"})
    return seeds


def list_seeds(folder: Path) -> Seeds:
    """Two small trees, and the lists of their images. The names are paths below the folder."""

    def picture(path: str) -> str:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 9).save(file)
        return path

    rows = ["object,split,label,image,mask"]
    for i in range(4):
        part = "train" if i < 3 else "test"
        picture(f"visa/candle/Data/Images/Normal/{i}.png")
        rows.append(f"candle,{part},normal,candle/Data/Images/Normal/{i}.png,")
    for i in range(2):
        picture(f"visa/candle/Data/Images/Anomaly/{i}.png")
        picture(f"visa/candle/Data/Masks/Anomaly/{i}.png")
        rows.append(f"candle,test,anomaly,candle/Data/Images/Anomaly/{i}.png,candle/Data/Masks/Anomaly/{i}.png")
    entries = []
    for i in range(6):
        path = picture(f"realiad/realiad_256/cap/{'OK' if i < 4 else 'NG/AK'}/{i}.jpg").split("cap/")[1]
        mask = picture(f"realiad/realiad_256/cap/NG/AK/{i}.png").split("cap/")[1] if i > 3 else None
        kind = "OK" if i < 4 else "AK"
        entries.append({"category": "cap", "anomaly_class": kind, "image_path": path, "mask_path": mask})
    split = {"meta": {"normal_class": "OK", "prefix": "cap/"}, "train": entries[:3], "test": entries[3:]}
    return {
        "visa/split_csv/1cls.csv": "\n".join([*rows, ""]).encode(),
        "realiad/realiad_jsons_fuiad_0.0/cap.json": json.dumps(split).encode(),
    }


# ---- mutations: (data, random numbers) → data ----


def flip(data: bytes, draws: random.Random) -> bytes:
    """Up to 16 bits, mostly near the beginning or the end, where headers are."""
    changed = bytearray(data)
    for _ in range(draws.choice((1, 1, 2, 4, 16))):
        changed[place(len(data), draws)] ^= 1 << draws.randrange(8)
    return bytes(changed)


def place(length: int, draws: random.Random) -> int:
    near = min(length, 128)
    return draws.choice((draws.randrange(length), draws.randrange(near), length - 1 - draws.randrange(near)))


def truncate(data: bytes, draws: random.Random) -> bytes:
    return data[: draws.randrange(len(data))]


def set_field(data: bytes, draws: random.Random) -> bytes:
    """One to three fields of 1, 2, 4 or 8 bytes become extreme numbers."""
    for _ in range(draws.randrange(1, 4)):
        size, at = draws.choice((1, 2, 4, 4, 8)), place(len(data), draws)
        number = draws.choice(EXTREMES) % 256**size
        data = data[:at] + number.to_bytes(size, draws.choice(("little", "big"))) + data[at + size :]
    return data


def claim_size(data: bytes, draws: random.Random) -> bytes:
    """A field that holds the seeds' width or height (24, 20) claims another."""
    size, order = draws.choice((2, 4)), draws.choice(("little", "big"))
    places = [m.start() for side in (24, 20) for m in re.finditer(re.escape(side.to_bytes(size, order)), data)]
    if not places:
        return set_field(data, draws)
    at = draws.choice(places[:6])
    claimed = draws.choice(SIDES) % 256**size
    return resealed(split(data[:at] + claimed.to_bytes(size, order) + data[at + size :]))


def rearrange(data: bytes, draws: random.Random) -> bytes:
    """Parts of the file are removed, doubled, exchanged or damaged; a PNG's chunks get the right checksums again."""
    parts = split(data)
    for _ in range(draws.randrange(1, 4)):
        here, there = draws.randrange(len(parts)), draws.randrange(len(parts))
        match draws.randrange(5):
            case 0 if len(parts) > 1:
                del parts[here]
            case 1:
                parts[here:here] = [parts[here]] * draws.choice((1, 1, 300))
            case 2:
                parts[here], parts[there] = parts[there], parts[here]
            case _ if parts[here]:
                parts[here] = draws.choice((flip, set_field, truncate))(parts[here], draws)
    return resealed(parts) or b"\0"


def split(data: bytes) -> list[bytes]:
    """The chunks of a PNG, the segments of a JPEG, the directory of a TIFF; of other files equal parts."""
    if data.startswith(b"\x89PNG"):
        parts, at = [data[:8]], 8
        while at < len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            parts.append(data[at:end])
            at = end
        return parts
    if data.startswith(b"\xff\xd8"):
        return re.split(rb"(?=\xff[\xc0-\xfe])", data)[1:]
    start, step = 0, max(4, len(data) // 24)
    if data.startswith((b"II*\0", b"MM\0*")):
        start, step = int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big") + 2, 12
    return [data[:start]] * (start > 0) + [data[i : i + step] for i in range(start, len(data), step)]


def resealed(parts: list[bytes]) -> bytes:
    """The parts as a file; the chunks of a PNG get the length and the checksum of what they hold."""
    if parts and parts[0].startswith(b"\x89PNG"):
        bodies = [part[4:-4] if len(part) >= 12 else b"" for part in parts]
        parts = [
            struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) if body else part
            for body, part in zip(bodies, parts)
        ]
    return b"".join(parts)


def change_inside(data: bytes, draws: random.Random) -> bytes:
    """Damage inside what checksums and lengths protect: an archive's entries, or the header of safetensors."""
    inner = draws.choice((flip, set_field, rearrange, opcodes))
    if data.startswith(b"PK"):
        written = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(written, "w") as changed:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
            chosen = draws.choice([name for name in entries if name.endswith("data.pkl")] + list(entries))
            for name, content in entries.items():
                changed.writestr(name, inner(content, draws) if name == chosen and content else content)
        return written.getvalue()
    if data[8:9] == b"{":
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(change_tree(json.loads(data[8 : 8 + length]), draws), allow_nan=True).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return inner(data, draws)


def opcodes(data: bytes, draws: random.Random) -> bytes:
    """Opcodes of pickles between bytes or in their place, also many of one."""
    for _ in range(draws.randrange(1, 4)):
        at, new = draws.randrange(len(data)), bytes([draws.choice(OPCODES)])
        data = data[:at] + new * draws.choice((1, 1, 1, 5, 100_000)) + data[at + draws.randrange(2) :]
    return data


def change_tree(tree: Any, draws: random.Random) -> Any:
    """JSON in which one value has become another kind of value, is gone, or is nested deeply."""
    if isinstance(tree, dict | list) and tree and draws.random() < 0.85:
        key = draws.choice(list(tree)) if isinstance(tree, dict) else draws.randrange(len(tree))
        changed = tree.copy()
        if draws.random() < 0.1:
            changed.pop(key)
        else:
            changed[key] = change_tree(tree[key], draws)
        return changed
    if draws.random() < 0.05:
        for _ in range(900):  # json.dumps writes no more; deeper ones are made of text
            tree = [tree]
        return tree
    return draws.choice(ODD)


def change_list(data: bytes, draws: random.Random) -> bytes:
    """A JSON list or a CSV table with odd values, or in an odd encoding."""
    if data.startswith(b"{"):
        if draws.random() < 0.1:
            return data.replace(b"null", draws.choice((b"[" * 10**5, b'{"a":' * 10**5, b"1" * 10**5, b"NaN")), 1)
        text = json.dumps(change_tree(json.loads(data), draws), ensure_ascii=draws.random() < 0.5)
    else:
        rows = [line.split(",") for line in data.decode().splitlines()]
        for _ in range(draws.randrange(1, 4)):
            row = draws.choice(rows)
            column = draws.randrange(len(row))
            old = row[column]
            row[column] = draws.choice([*map(str, ODD), '"', 'a"b', old.upper(), f" {old} ", f'"{old}"', rf"..\{old}"])
            if draws.random() < 0.2:
                row.append(row.pop(0))
        mark = draws.choice((",", ",", ";", "\t"))
        text = "\n".join(mark.join(row) for row in rows)
    return text.encode(draws.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig", "utf-32")), "surrogatepass")
